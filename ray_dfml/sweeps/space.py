"""The space of a sweep: which settings vary, over what, and the points that are drawn from it.

A leaf of the space is a mapping with one key, the kind of its axis:

    steps: {grid: [1, 2, 3]}            every value, crossed with the other grids
    arch: {choice: [conv4, resnet10]}   one of the values, each as likely
    inner_lr: {loguniform: [1e-3, 0.1]} a number whose logarithm is uniform
    momentum: {uniform: [0, 0.9]}       a number
    updates: {randint: [1, 10]}         a whole number; 10 is not drawn
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ray_dfml.core import seeds
from ray_dfml.errors import UsageError, did_you_mean

LISTS = ("grid", "choice")
RANGES = ("uniform", "loguniform", "randint")
KINDS = (*LISTS, *RANGES)

Point = dict[str, Any]
"""Setting, dotted -> value."""


@dataclass(frozen=True)
class Axis:
    """One setting that varies: its dotted key, the kind of its axis, and the values, or the two ends of a range."""

    key: str
    kind: str
    values: tuple[Any, ...]

    @property
    def ordered(self) -> bool:
        """Whether all values are numbers, so that they have an order."""
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that show whether a setting takes this axis: all of a list, or the lowest and the highest."""
        return (self.values[0], self.values[1] - 1) if self.kind == "randint" else self.values

    def draw(self, rng: torch.Generator) -> Any:
        """A random value. Grids have none."""
        u = float(torch.rand((), generator=rng, dtype=torch.float64))
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        low, high = self.values
        if self.kind == "randint":
            return low + int(u * (high - low))
        if self.kind == "loguniform":
            return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        return low + u * (high - low)


def axes_of(tree: Any, prefix: str = "") -> list[Axis]:
    """The axes of a nested space, in its order. Raises UsageError that names the key of the fault."""
    if not isinstance(tree, Mapping) or not tree:
        raise UsageError(f"space{prefix and '.' + prefix}: expected settings such as `steps: {{grid: [1, 2]}}`")
    found: list[Axis] = []
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping) and len(value) == 1 and isinstance(next(iter(value.values())), list):
            ((kind, values),) = value.items()
            found.append(_axis(key, str(kind), values))
        else:
            found += axes_of(value, key)
    twice = [one.key for n, one in enumerate(found) if one.key in [other.key for other in found[:n]]]
    if twice:
        raise UsageError(f"space.{twice[0]}: named twice")
    return found


def _axis(key: str, kind: str, values: Sequence[Any]) -> Axis:
    if kind not in KINDS:
        raise UsageError(f"space.{key}: unknown kind {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}")
    if any(isinstance(part, Mapping | list) for v in values for part in (v if isinstance(v, list) else [v])):
        raise UsageError(f"space.{key}: {kind} takes plain values, or lists of them, got {values}")
    axis = Axis(key, kind, tuple(tuple(v) if isinstance(v, list) else v for v in values))
    if kind in LISTS:
        if not values or len(set(axis.values)) < len(axis.values):
            raise UsageError(f"space.{key}: {kind} takes different values, got {values}")
        return axis
    if len(values) != 2 or not axis.ordered or not -math.inf < values[0] < values[1] < math.inf:
        raise UsageError(f"space.{key}: {kind} takes two numbers, the lower one first, got {values}")
    if kind == "loguniform" and values[0] <= 0:
        raise UsageError(f"space.{key}: loguniform takes numbers above 0, got {values}")
    if kind == "randint" and not all(isinstance(v, int) for v in values):
        raise UsageError(f"space.{key}: randint takes whole numbers, got {values}")
    return axis


def points(axes: Sequence[Axis], *, samples: int, seed: int) -> Iterator[Point]:
    """The points of a space: all combinations of the grids, each with `samples` draws of the other axes.

    Draw n of a combination has the same bits whatever the other axes and samples are.
    """
    grids = [axis for axis in axes if axis.kind == "grid"]
    drawn = [axis for axis in axes if axis.kind != "grid"]
    for number, values in enumerate(product(*(axis.values for axis in grids))):
        fixed = dict(zip((axis.key for axis in grids), values, strict=True))
        for n in range(samples if drawn else 1):
            point = fixed | {axis.key: axis.draw(seeds.rng(seed, axis.key, number, n)) for axis in drawn}
            yield {axis.key: point[axis.key] for axis in axes}
