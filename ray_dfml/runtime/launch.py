"""Starts a run from a configuration, or continues one from its folder, for the command line and `ray_dfml.train`."""

import json
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_dfml import published, report
from ray_dfml.config import RunConfig, resolve, with_budget
from ray_dfml.errors import BudgetReached, NobodyLeft, UsageError, first_of, shown_reason
from ray_dfml.files import Uri, located
from ray_dfml.methods import METHODS
from ray_dfml.runtime import cost_lines, driver, rundir
from ray_dfml.runtime.driver import Machine, OnRound
from ray_dfml.runtime.progress import Progress
from ray_dfml.runtime.remote_run import check_ledger, working
from ray_dfml.runtime.rundir import RunFolder

if TYPE_CHECKING:
    from ray_dfml.runtime.cluster import Cluster


def train(
    method: str,
    *,
    pool: str | Path | Sequence[str | Path] = (),
    data: str | Sequence[str] = (),
    run_dir: str | Path,
    profile: str = "fixed",
    preset: str | None = None,
    settings: Sequence[str] = (),
    seed: int = 0,
    backend: str = "local",
    workers: int = 1,
    job_seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Do what `ray-dfml train` does, from Python. Returns the rows of `scores.json`; the rest is in `run_dir`.

    Raises UsageError, RejectedError, BudgetReached, ResourceError and Interrupted where the command exits with 2, 3, 4,
    5 and 130. After BudgetReached, and after NobodyLeft, a RejectedError, `run_dir` holds the learner and the scores of
    the rounds that are done.
    """
    pools = (pool,) if isinstance(pool, str | Path) else tuple(pool)
    specs = (data,) if isinstance(data, str) else tuple(data)
    config = resolve(
        method,
        profile=profile,
        preset=preset,
        settings=settings,
        seed=seed,
        pool=tuple(str(p) for p in pools),
        data=specs,
    )
    return new_run(config, located(run_dir), Machine(backend=backend, workers=workers, job_seconds=job_seconds))


def new_run(
    config: RunConfig, place: Path | Uri, machine: Machine, *, quiet: bool = False, cluster: "Cluster | None" = None
) -> list[dict[str, Any]]:
    """Make the run folder, train, test, and write the report. Returns the rows of `scores.json`.

    With Ray the run uses `cluster`, or starts one. With `quiet` no progress is shown. Raises UsageError if there is
    something at `place`.
    """
    with working(located(place), new=True) as (path, remote):
        if path.exists():
            raise UsageError(f"{path}: exists already; add --resume to continue that run, or choose another --run-dir")
        inputs = driver.read_inputs(config)
        manifest = rundir.manifest(config, pools=inputs.pools, data=inputs.data)
        if remote:
            manifest["scratch"] = {"host": socket.gethostname(), "folder": str(path)}
        folder = RunFolder.create(path, config, manifest, remote)
        return _finish(config, inputs, folder, machine, quiet, cluster)


def train_only(config: RunConfig, path: Path, machine: Machine, on_round: OnRound, **origin: Any) -> None:
    """Train without a test: make the run folder, or go on from the last checkpoint in it.

    Nothing is printed. `on_round` may end the run before its last round. `origin` goes to a new manifest. The run can
    be tested later with `continue_run`. Raises UsageError if the folder holds a run of another configuration, and what
    `new_run` raises.
    """
    inputs = driver.read_inputs(config)
    if path.exists():
        folder = RunFolder.open(path)
        if folder.config() != config:
            raise UsageError(f"{path}: is a run with other settings; choose another --run-dir")
        _check_unchanged(folder, inputs)
    else:
        folder = RunFolder.create(path, config, rundir.manifest(config, pools=inputs.pools, data=inputs.data) | origin)
    driver.run(config, inputs, folder, machine, Progress(quiet=True, notes=False), on_round=on_round, test=False)


def continue_run(
    place: Path | Uri, method: str, machine: Machine, *, budget: Sequence[str] = (), quiet: bool = False
) -> list[dict[str, Any]]:
    """Continue a run from its last checkpoint, with its own configuration, on any machine.

    `budget` are changes of its budgets, such as `budget.queries=20000`, which are written to `config.yaml`. A run that
    is done stays as it is, unless a service was away and its student has rounds to come. Raises UsageError if there is
    no such run, if its pool or data have changed, or if it is in an object store, asks services, and its ledger is
    elsewhere.
    """
    with working(located(place), new=False) as (path, remote):
        folder = RunFolder.open(path, remote)
        config = folder.config()
        if config.name != method:
            raise UsageError(f"{place}: is a run of {config.name}, not of {method}")
        changed = with_budget(config, budget)
        status = folder.read_status()
        if status.get("state") == "done" and not status.get("behind"):
            if not (path / "report.html").exists():
                report.write(path)
                folder.publish()
            return folder.read_scores()
        config, before = changed, config
        inputs = driver.read_inputs(config)
        _check_unchanged(folder, inputs)
        if remote and inputs.accounts.asked:
            check_ledger(path, folder.manifest().get("scratch"))
        if config != before:
            folder.change_budget(config)
        return _finish(config, inputs, folder, machine, quiet)


def _check_unchanged(folder: RunFolder, inputs: driver.Inputs) -> None:
    """Raise UsageError if the pool or the data of a run are not those that it began with."""
    began = folder.manifest()
    for kind, now in (("pool", inputs.pools), ("data", inputs.data)):
        for then, one in zip(began[kind], now, strict=True):
            if then != one:
                raise UsageError(f"{folder.place}: the {kind} has changed since the run began ({one}); start a new run")


def start_or_continue(
    config: RunConfig, place: Path | Uri, machine: Machine, *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Continue the run at `place` if there is one, else start it there. So a command may be given any number of times.

    The settings must be those that the run began with, but for its budgets, which are taken from `config`. Raises
    UsageError otherwise, or if `place` is no run folder.
    """
    place = located(place)
    if not (published.exists(place) if isinstance(place, Uri) else place.exists()):
        return new_run(config, place, machine, quiet=quiet)
    began = _began_with(place)
    if config.name == began.name:
        differs = first_difference(began.model_dump(mode="json"), config.model_dump(mode="json"))
        if differs:
            raise UsageError(f"{place}: is a run with another {differs}; give its own settings, or another --run-dir")
    budget = [f"budget.{key}={json.dumps(value)}" for key, value in config.model_dump(mode="json")["budget"].items()]
    return continue_run(place, config.name, machine, budget=budget, quiet=quiet)


def _began_with(place: Path | Uri) -> RunConfig:
    """The configuration of a run. No copy of it is left if this process is killed later."""
    if isinstance(place, Path):
        return RunFolder.open(place).config()
    with tempfile.TemporaryDirectory(prefix="ray-dfml-") as copy:
        published.fetch(place, Path(copy), wanted="config.yaml".__eq__)
        return RunFolder.open(Path(copy)).config()


def first_difference(one: Any, other: Any, key: str = "") -> str:
    """The first dotted key at which two trees of settings differ. Empty if none does; budgets are left out."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [k for k in {**one, **other} if (key, k) != ("", "budget")]
        found = (first_difference(one.get(k), other.get(k), f"{key}.{k}".lstrip(".")) for k in keys)
        return next((name for name in found if name), "")
    return key if one != other else ""


def _finish(
    config: RunConfig, inputs: driver.Inputs, folder: RunFolder, machine: Machine, quiet: bool,
    cluster: "Cluster | None" = None,
) -> list[dict[str, Any]]:  # fmt: skip
    progress = Progress(
        METHODS[config.name].shown, quiet=quiet, cost=lambda done: cost_lines.of_run(config, inputs, machine, done)
    )  # fmt: skip
    for line in left_out(inputs.rejected, len(inputs.world.cards)):
        progress.note(line)
    if folder.remote and inputs.accounts.asked:
        progress.note(f"the ledger of this run stays on this machine, so it can go on here alone: {folder.path}")
    try:
        rows = driver.run(config, inputs, folder, machine, progress, cluster)
    except (BudgetReached, NobodyLeft):
        report.write(folder.path)
        raise
    report.write(folder.path)
    folder.publish()
    status = folder.read_status()
    rejected, behind = status.get("rejected", {}), status.get("behind", [])
    for line in left_out(rejected, len(inputs.world.cards) + len(inputs.rejected) - len(rejected)):
        progress.note(line)
    if behind:
        progress.note(f"when {first_of(behind)} can be reached again, --resume goes on with what is missing")
    return rows


def left_out(rejected: Mapping[str, str], used: int) -> list[str]:
    """A line that names the teachers that are left out, with the reasons, if there are any."""
    if not rejected:
        return []
    reasons = [shown_reason(id, why) for id, why in rejected.items()]
    return [f"{len(rejected)} of {len(rejected) + used} teachers left out: {first_of(reasons, 3)}"]
