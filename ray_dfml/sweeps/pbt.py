"""Population-based training: runs take over the state of better ones, and go on from it with settings of their own.

All members train for `interval` rounds; then those of the lowest `quantile` by their last validation each take over the
state of one of the highest, with settings near those of that one; and so on. A member that takes over goes on in a new
run folder, whose manifest names the run and the round that it came from.

Who takes over from whom, and with which settings, depends on the metrics in the run folders and on the sweep's seed,
and on nothing else. So a sweep that is resumed comes to the same decisions, without a memory of its own.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ray_dfml.core import seeds
from ray_dfml.errors import UsageError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import World
from ray_dfml.runtime import locks
from ray_dfml.runtime.rundir import RunFolder
from ray_dfml.sweeps import plan, trial
from ray_dfml.sweeps.plan import Trial
from ray_dfml.sweeps.space import RANGES, Axis, Point, axes_of
from ray_dfml.sweeps.spec import Sweep

FACTORS = (0.8, 1.2)
"""What a number is multiplied by, one as likely as the other."""


def boundaries(rounds: int, interval: int) -> list[int]:
    """The rounds after which members are compared, and last the end."""
    return [*range(interval, rounds, interval), rounds]


def moved(point: Point, axes: Sequence[Axis], resample: float, rng: torch.Generator) -> Point:
    """A point near another one. Each setting is drawn anew with chance `resample`, and moves otherwise.

    A number of a range is multiplied by 0.8 or 1.2 and stays in its range, and a value of a list goes to a neighbour.
    """
    found = dict(point)
    for axis in axes:
        anew, up = (torch.rand(2, generator=rng) < torch.tensor([resample, 0.5])).tolist()
        drawn = Axis(axis.key, "choice", axis.values).draw(rng) if axis.kind not in RANGES else axis.draw(rng)
        found[axis.key] = drawn if anew else _step(point[axis.key], axis, up)
    return found


def _step(value: object, axis: Axis, up: bool) -> object:
    if axis.kind not in RANGES:
        place = axis.values.index(value) + (1 if up else -1)
        return axis.values[min(max(place, 0), len(axis.values) - 1)]
    assert isinstance(value, int | float)
    low, high = axis.ends
    number = value * FACTORS[up]
    if axis.kind == "randint":
        number = value + (1 if up else -1) if round(number) == value else round(number)
    return min(max(number, low), high)


def exchanges(scores: Sequence[float | None], quantile: float, rng: torch.Generator) -> dict[int, int]:
    """Place of each member that takes over -> the place of the one whose state it takes.

    The lowest `quantile` of the members, at least one, take over from as many of the highest. A member without a score
    is the lowest. With fewer than two members nobody takes over, and none from a member without a score.
    """
    order = sorted(range(len(scores)), key=lambda i: (scores[i] is not None, scores[i] or 0.0, -i))
    count = min(max(1, round(quantile * len(order))), len(order) // 2)
    best = [i for i in order[len(order) - count :] if scores[i] is not None]
    if not best:
        return {}
    return {i: best[int(torch.randint(len(best), (), generator=rng))] for i in order[:count]}


def next_members(
    sweep: Sweep, axes: Sequence[Axis], members: Sequence[Trial], folder: Path, done: int, pools: Sequence[str]
) -> list[Trial]:
    """The members that go on after `done` rounds; those that take over are new, and their run folders are made here.

    Members of one seed are a population of their own.
    """
    cfg, found = sweep.scheduler, list(members)
    for seed in sweep.seeds:
        places = [i for i, one in enumerate(members) if one.seed == seed]
        scores = [_last_validation(folder / members[i].name, done) for i in places]
        for low, high in exchanges(scores, cfg.quantile, seeds.rng(sweep.search_seed, "pbt", seed, done)).items():
            loser, better = members[places[low]], members[places[high]]
            rng = seeds.rng(sweep.search_seed, "pbt", seed, done, loser.number)
            point = moved(better.point, axes, cfg.resample, rng)
            name = f"{loser.number:04d}-seed{seed}-from{done}"
            config = plan.config_of(sweep, pools, point, seed)
            found[places[low]] = replace(loser, point=point, name=name, config=config)
            if not (folder / name).exists():
                _fork(folder / better.name, folder / name, done, found[places[low]])
    return found


def _last_validation(run: Path, rounds: int) -> float | None:
    """The last validation of a run within its first rounds, which tells how good the state is that others may take."""
    found = trial.look(run)
    if found.rounds < rounds:
        return None  # it failed before
    rows = [row["validation"] for row in found.rows if row["round"] < rounds]
    return next((value for value in reversed(rows) if value is not None), None)


def _fork(parent: Path, child: Path, rounds: int, to: Trial) -> None:
    """Copy a run that is stopped after `rounds` rounds to a new folder with other settings, in one step."""
    temporary = child.with_name(f".{child.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    lock = locks.hold(parent / ".lock", f"{parent}: another process is at work in this run folder")
    try:
        shutil.copytree(parent, temporary, ignore=shutil.ignore_patterns(".lock"))
    finally:
        lock.release()
    (temporary / "config.yaml").write_text(yaml.safe_dump(to.config.model_dump(mode="json"), sort_keys=False))
    began = {"run": parent.name, "round": rounds, "queries": sent(temporary)}
    noted = json.loads((temporary / "manifest.json").read_text()) | {"parent": began}
    (temporary / "manifest.json").write_text(json.dumps(noted, indent=2))
    os.rename(temporary, child)


def own_queries(run: Path) -> int:
    """How many images a run has sent to teachers itself, without those of the run whose state it took over."""
    if not (run / "manifest.json").exists():
        return 0
    return sent(run) - int((RunFolder(run).manifest().get("parent") or {}).get("queries", 0))


def sent(run: Path) -> int:
    """How many images the ledger of a run says were sent, with those of runs before it."""
    return int(RunFolder(run).read_status().get("queries", {}).get("sent", 0))


def check(sweep: Sweep, trials: Sequence[Trial], world: World) -> None:
    """Raise UsageError if the trials cannot take over each other's state, or if there are too few of them.

    `world` is that of a trial. Each pair of trials must begin with states of the same keys and shapes.
    """
    axes, cfg = axes_of(sweep.space), sweep.scheduler
    method, rounds = METHODS[sweep.method], trials[0].config.total_rounds
    settled = {f"method.{name}" for name in method.settled}
    if other := [axis.key for axis in axes if not axis.key.startswith("method.") or axis.key in settled]:
        raise UsageError(f"scheduler pbt: {other[0]} cannot change while a run goes on")
    if len(trials) < 2 * len(sweep.seeds):
        raise UsageError("scheduler pbt: needs two points or more; raise `samples`, or name more values")
    if cfg.interval >= rounds:
        raise UsageError(f"scheduler pbt: interval {cfg.interval} leaves no exchange in {rounds} rounds")
    first = trials[0]
    wanted = _shapes(method.init(first.config.method, world))
    for axis in axes:
        for value in axis.ends:
            config = plan.config_of(sweep, first.config.pool, first.point | {axis.key: value}, first.seed)
            if config.total_rounds != rounds:
                raise UsageError(f"scheduler pbt: {axis.key} changes the number of rounds, which a run keeps")
            if _shapes(method.init(config.method, world)) != wanted:
                raise UsageError(f"scheduler pbt: {axis.key} changes the shape of the state, so none can take it over")


def _shapes(state: object) -> object:
    if isinstance(state, Mapping):
        return {key: _shapes(value) for key, value in state.items()}
    return tuple(getattr(state, "shape", ()))
