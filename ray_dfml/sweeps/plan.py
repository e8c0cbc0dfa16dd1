"""The trials of a sweep: one for each point and seed, with the whole configuration of its run.

A plan is made of the sweep alone, so it is the same whenever it is made again. A random axis is checked at both ends.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_dfml.config import RunConfig, resolve
from ray_dfml.errors import UsageError
from ray_dfml.sweeps.space import Axis, Point, axes_of, points
from ray_dfml.sweeps.spec import Sweep

OPTIONS = ("preset", "profile")
"""Keys of the space that are not settings but name sets of them."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: the number of its point, what that point sets, the run's name, seed and configuration."""

    number: int
    point: Point
    name: str
    seed: int
    config: RunConfig

    @property
    def label(self) -> str:
        """The point for people, such as `steps=5 seed 0`."""
        return f"{label(self.point)} seed {self.seed}"


def label(point: Mapping[str, Any]) -> str:
    """A point in one line, with the last part of each key."""
    parts = [f"{key.rpartition('.')[2]}={shown(value)}" for key, value in point.items()]
    return " ".join(parts) or "defaults"


def shown(value: Any) -> str:
    """A value of a setting in short."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "+".join(map(shown, value)) if isinstance(value, tuple | list) else str(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a nested mapping, with dotted keys."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def config_of(sweep: Sweep, pools: Sequence[str], point: Point, seed: int) -> RunConfig:
    """The configuration of one run. Raises UsageError for a setting that the method does not have or take."""
    given = {key: point[key] for key in OPTIONS if key in point}
    settings = dict(flat(sweep.set)) | {f"budget.{key}": value for key, value in sweep.budget if value is not None}
    settings |= {key: value for key, value in point.items() if key not in OPTIONS}
    return resolve(
        sweep.method, profile=given.get("profile", sweep.profile), preset=given.get("preset", sweep.preset),
        settings=[f"{key}={json.dumps(value)}" for key, value in settings.items()], seed=seed, pool=tuple(pools),
        data=sweep.data,
    )  # fmt: skip


def axes(sweep: Sweep, pools: Sequence[str]) -> list[Axis]:
    """The axes of a sweep. Raises UsageError if a setting does not take one of the values, or an end of a range."""
    found = axes_of(sweep.space)
    first = {axis.key: axis.ends[0] for axis in found}
    fixed = {key: "set" for key, _ in flat(sweep.set)}
    fixed |= {f"budget.{key}": "budget" for key, value in sweep.budget if value is not None}
    for axis in found:
        for key, where in fixed.items():
            if f"{axis.key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{axis.key}."):
                raise UsageError(f"space.{axis.key}: is under `{where}` too; leave it out there")
        for value in axis.ends:
            config_of(sweep, pools, first | {axis.key: value}, sweep.seeds[0])
    return found


def trials(sweep: Sweep, pools: Sequence[str]) -> list[Trial]:
    """All trials whose points are known before the sweep begins, point after point.

    With Optuna these are the defaults alone, if they are a point. Raises UsageError for settings that are none.
    """
    if sweep.search == "optuna" and sweep.scheduler.type != "none":
        raise UsageError(f"search: optuna takes the scheduler none, not {sweep.scheduler.type}")
    checked = axes(sweep, pools)
    found = [] if sweep.search == "optuna" else list(points(checked, samples=sweep.samples, seed=sweep.search_seed))
    if sweep.defaults:
        found = [{}, *found]
    made = [trial for number, point in enumerate(found) for trial in of_point(sweep, pools, number, point)]
    if sweep.scheduler.type != "pbt":
        return made
    return [  # each is on its own, since its point changes as it runs
        replace(one, number=number, name=f"{number:04d}-seed{one.seed}") for number, one in enumerate(made)
    ]


def of_point(sweep: Sweep, pools: Sequence[str], number: int, point: Point) -> list[Trial]:
    """The trials of one point: one for each seed."""
    return [
        Trial(number, point, f"{number:04d}-seed{seed}", seed, config_of(sweep, pools, point, seed))
        for seed in sweep.seeds
    ]
