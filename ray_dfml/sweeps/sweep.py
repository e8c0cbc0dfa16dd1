"""A sweep from its file to its results: the pool, the trials on Ray Tune, the test of the winners, and the report.

The sweep's folder holds `sweep.yaml`, `status.json`, the runs in `trials/`, and the results. Nothing else is needed to
go on: a trial whose run folder says that it has ended is not begun again.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ray_dfml import yaml_text
from ray_dfml.config import RunConfig, build
from ray_dfml.errors import DfmlError, Interrupted, ResourceError, UsageError
from ray_dfml.runtime import cost_lines, driver, locks
from ray_dfml.runtime.driver import Machine, interruptible
from ray_dfml.runtime.rundir import RunFolder, update_status, write_text
from ray_dfml.sweeps import page, pbt, plan, pools, results, spec, trial
from ray_dfml.sweeps.optuna_search import proposed
from ray_dfml.sweeps.plan import Trial
from ray_dfml.sweeps.results import Row
from ray_dfml.sweeps.spec import PoolRecipe, Sweep
from ray_dfml.sweeps.trial import Task

TRIALS = "trials"
"""The folder of the run folders of a sweep."""

TUNE = "tune"
"""The folder of what Ray Tune's loggers write."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sweep is computed: the machine of one trial, and the most trials at a time."""

    machine: Machine
    concurrent: int | None = None
    trackers: Sequence[str] = ()
    """`mlflow`, `wandb`: who gets the figures of the trials beside Ray Tune's own files"""


def run(sweep: Sweep, folder: Path, place: Place, *, resume: bool, say: Say) -> list[Row]:
    """Run a sweep, or what is left of it. Returns the points, the best one first.

    Raises UsageError if the folder exists and `resume` is not given, or if it holds another sweep; ResourceError if a
    trial does not fit in the cluster; and Interrupted.
    """
    _check_packages(place.trackers)
    trials = plan.trials(sweep, pools.of(sweep, folder))  # faults of the file are found before anything is made
    _open(sweep, folder, resume)
    with _locked(folder), interruptible():
        try:
            rows = _run(sweep, trials, folder, place, say)
        except KeyboardInterrupt:
            update_status(folder, state="interrupted")
            raise Interrupted(f"interrupted; continue with the same command and --resume: {folder}") from None
        except Exception as error:
            update_status(folder, state="failed", last_error=f"{type(error).__name__}: {error}".splitlines()[0])
            raise
    return rows


def _check_packages(trackers: Sequence[str]) -> None:
    """Raise ResourceError if the package of a tracker, which has its name, is not installed."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ResourceError(f"--track {name} needs a package: pip install 'ray-dfml[{name}]', or leave it out")


def _run(sweep: Sweep, trials: Sequence[Trial], folder: Path, place: Place, say: Say) -> list[Row]:
    from ray_dfml.sweeps import ray_tune

    update_status(folder, state="starting", trials=len(trials))
    with ray_tune.connected(place.machine):
        if isinstance(sweep.pool, PoolRecipe):
            pools.build(sweep.pool, folder / pools.POOL, local=place.machine.backend == "local", say=say)
        inputs = driver.read_inputs(_first(sweep, folder))  # a pool or data that cannot be used ends the sweep here
        if sweep.scheduler.type == "pbt":
            pbt.check(sweep, trials, inputs.world)
        for line in _announced(sweep, trials, _first(sweep, folder), inputs):
            say(line)
        count, tests = _planned(sweep, trials), _tests(sweep)
        ends = [_first(sweep, folder), _first(sweep, folder, end=-1)]
        say(cost_lines.of_sweep(count, ends, inputs, place.machine, place.concurrent, tests))
        update_status(folder, state="running")
        trials = _train(sweep, trials, folder, place, say)
        rows = results.collect(trials, folder / TRIALS)
        update_status(folder, state="testing")
        _test(sweep, trials, rows, folder, place, say)
    rows = results.collect(trials, folder / TRIALS)
    axes = plan.axes(sweep, pools.of(sweep, folder))
    results.write(folder, rows, [axis.key for axis in axes])
    page.write(folder, sweep, rows, axes)
    failed = sum(row.failed for row in rows)
    update_status(folder, state="done", failed=failed, last_error=None)
    if failed:
        say(f"{failed} of {len(trials)} trials failed; their status.json says why, and --resume tries them again")
    if all(row.validation is None for row in rows):
        raise DfmlError(f"{folder}: no trial has a validation; name data, or see status.json of the trials")
    return rows


def _train(sweep: Sweep, trials: Sequence[Trial], folder: Path, place: Place, say: Say) -> Sequence[Trial]:
    """Run the trials that have not ended. Returns those that count: with PBT some have gone on in a new run folder.

    With PBT a member that failed is not run again once others have gone on without it.
    """
    if sweep.search == "optuna":
        return _search(sweep, trials, folder, place, say)
    if sweep.scheduler.type != "pbt":
        _run_tasks([_task(one, folder, place) for one in trials], sweep.scheduler, folder, place, say)
        return trials
    members, rounds = list(trials), trials[0].config.total_rounds
    where, axes = pools.of(sweep, folder), plan.axes(sweep, pools.of(sweep, folder))
    for done in pbt.boundaries(rounds, sweep.scheduler.interval):
        if not any((folder / TRIALS).glob(f"*-from{done}")):
            tasks = [_task(one, folder, place, until=done) for one in members]
            _run_tasks(tasks, spec.Scheduler(), folder, place, say)
        if done < rounds:
            members = pbt.next_members(sweep, axes, members, folder / TRIALS, done, where)
    return members


def _search(sweep: Sweep, trials: Sequence[Trial], folder: Path, place: Place, say: Say) -> Sequence[Trial]:
    """Run the points that Optuna proposes, batch after batch. Returns all trials.

    A batch is not run again once the next one has begun, since that was proposed from what was known then.
    """
    where = pools.of(sweep, folder)
    found, scores, axes = list(trials), [], plan.axes(sweep, where)
    _run_tasks([_task(one, folder, place) for one in trials], sweep.scheduler, folder, place, say)
    for start in range(0, sweep.samples, sweep.batch):
        count = min(start + sweep.batch, sweep.samples)
        points = proposed(axes, scores, count, batch=sweep.batch, seed=sweep.search_seed)[start:]
        first = int(sweep.defaults) + start
        made = [one for n, point in enumerate(points, first) for one in plan.of_point(sweep, where, n, point)]
        if not _begun(folder, first + len(points)):
            say(f"points {start + 1} to {count} of {sweep.samples}")
            _run_tasks([_task(one, folder, place) for one in made], sweep.scheduler, folder, place, say)
        rows = {row.number: row for row in results.collect(made, folder / TRIALS)}
        ordered = [rows[n] for n in sorted(rows)]
        scores += [row.validation[0] if row.whole and row.validation else None for row in ordered]
        found += made
    return found


def _begun(folder: Path, number: int) -> bool:
    """Whether a trial of a point of this number, or of a later one, has begun: any of a batch may be the first."""
    names = (path.name.partition("-")[0] for path in (folder / TRIALS).iterdir())
    return any(name.isdigit() and int(name) >= number for name in names)


def _first(sweep: Sweep, folder: Path, end: int = 0) -> RunConfig:
    """The configuration of a run with the first value of each axis, or with `end` -1 the last value of each.

    An axis keeps its first value where its last one does not go with those before.
    """
    where = pools.of(sweep, folder)
    axes = plan.axes(sweep, where)
    point = {axis.key: axis.ends[0] for axis in axes}
    found = plan.config_of(sweep, where, point, sweep.seeds[0])
    for axis in axes if end else ():
        with suppress(UsageError):
            found = plan.config_of(sweep, where, point | {axis.key: axis.ends[end]}, sweep.seeds[0])
            point[axis.key] = axis.ends[end]
    return found


def _planned(sweep: Sweep, trials: Sequence[Trial]) -> int:
    """How many trials a sweep has in all."""
    return len(trials) + (sweep.samples * len(sweep.seeds) if sweep.search == "optuna" else 0)


def _tests(sweep: Sweep) -> int:
    """How many runs of winners are tested, and of the defaults."""
    return (sweep.winners + sweep.defaults) * len(sweep.seeds) if sweep.data else 0


def _run_tasks(tasks: Sequence[Task], scheduler: spec.Scheduler, folder: Path, place: Place, say: Say) -> None:
    """Run tasks up to their ends. With ASHA those that have ended tell their rounds again, since it compares them."""
    from ray_dfml.sweeps import ray_tune

    asha = scheduler.type == "asha"
    todo = [task for task in tasks if not trial.has_ended(task)]
    if not todo:
        return
    ended = 0 if asha else len(tasks) - len(todo)

    def on_end(task: Task, error: str | None) -> None:
        nonlocal ended
        ended += 1
        found = trial.look(task.path)
        if asha and not error and not found.final:  # it is stopped before it could say so
            whole = found.rounds >= build(task.config).total_rounds
            RunFolder(task.path).status(state=driver.TRAINED if whole else driver.STOPPED, exit_code=0)
            found = trial.look(task.path)
        best = trial.validation(found.rows, task.config["name"])
        score = "no validation" if best is None else f"validation {best:.2f} %"
        state = f"failed: {error}" if error else found.state
        say(f"[{ended}/{len(tasks)}] {task.path.name}, {task.label}: {state}, {found.rounds} rounds, {score}")

    rounds = max(build(task.config).total_rounds for task in tasks)
    ray_tune.run(
        tasks if asha else todo, folder / TUNE, scheduler, rounds=rounds, concurrent=place.concurrent, on_end=on_end,
        trackers=place.trackers,
    )  # fmt: skip


def _test(sweep: Sweep, trials: Sequence[Trial], rows: Sequence[Row], folder: Path, place: Place, say: Say) -> None:
    """Test the winners and the defaults on all seeds: the only tests of a sweep."""
    from ray_dfml.sweeps import ray_tune

    wanted = _winners(sweep, rows)
    tasks = [_task(one, folder, place, test=True) for one in trials if one.number in wanted and one.config.data]
    todo = [task for task in tasks if trial.look(task.path).state not in ("done", driver.BUDGET)]
    if not todo:
        return
    say(f"{len(todo)} runs of {len(wanted)} points are tested")

    def on_end(task: Task, error: str | None) -> None:
        if error:
            say(f"the test of {task.path.name} failed: {error}")

    ray_tune.run(
        todo, folder / TUNE, spec.Scheduler(), rounds=1, concurrent=place.concurrent, on_end=on_end,
        trackers=place.trackers,
    )  # fmt: skip


def _winners(sweep: Sweep, rows: Sequence[Row]) -> list[int]:
    """The points that are tested: the best ones, with PBT those of each seed's population, and the defaults."""
    whole = [row for row in rows if row.whole]
    groups = [[row for row in whole if row.seeds == [seed]] for seed in sweep.seeds]
    best = [group[: sweep.winners] for group in (groups if sweep.scheduler.type == "pbt" else [whole])]
    found = [row.number for group in best for row in group]
    return found + [row.number for row in whole if not row.point and row.number not in found]


def _task(one: Trial, folder: Path, place: Place, *, until: int | None = None, test: bool = False) -> Task:
    return Task(
        path=folder / TRIALS / one.name, config=one.config.model_dump(mode="json"), machine=place.machine, until=until,
        test=test, label=one.label, shown={"seed": one.seed} | dict(one.point),
    )  # fmt: skip


def _announced(sweep: Sweep, trials: Sequence[Trial], first: RunConfig, inputs: driver.Inputs) -> Iterator[str]:
    """What a sweep is about to do and spend."""
    count, rounds = _planned(sweep, trials), max([first.total_rounds, *(one.config.total_rounds for one in trials)])
    yield f"{count} trials on {len(sweep.seeds)} seeds, of {rounds} rounds at most"
    if inputs.accounts.asked:
        each = first.budget.queries
        limit = "budget.queries limits them" if each is None else f"at most {each * count} images in all"
        yield f"teachers are asked, and each trial pays for its own queries; {limit}"


def _open(sweep: Sweep, folder: Path, resume: bool) -> None:
    """Make the folder of a sweep in one step, or check that it holds this one."""
    path, text = folder / "sweep.yaml", yaml_text.dump(sweep.model_dump(mode="json"))
    if not resume:
        if folder.exists():
            raise UsageError(f"{folder}: exists already; add --resume to continue that sweep, or choose another")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        (temporary / TRIALS).mkdir(parents=True, exist_ok=True)
        write_text(temporary / path.name, text)
        os.rename(temporary, folder)
        return
    if not path.is_file():
        raise UsageError(f"{folder}: not the folder of a sweep (no sweep.yaml); leave out --resume to begin one")
    if path.read_bytes() != text.encode():
        raise UsageError(f"{folder}: holds another sweep than the file says; begin a new one in another folder")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = locks.hold(folder / ".lock", f"{folder}: another process is at work in this sweep")
    try:
        yield
    finally:
        lock.release()
