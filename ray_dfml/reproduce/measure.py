"""Reads a number, with its interval, from what commands left, and says whether two measurements agree."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml import plots, report
from ray_dfml.compare.entries import FIELDS, entries_of
from ray_dfml.core.scoring import mean_ci95, mean_of_seeds
from ray_dfml.errors import RejectedError
from ray_dfml.reproduce.registry import Metric, Number, Reading, Score, Step, Table, filled


@dataclass(frozen=True)
class Measured:
    """A value, the half-width of its 95 % interval, and the value of each seed."""

    value: float
    half: float
    each: tuple[float, ...]


def agree(value: float, half: float, other: float, other_half: float) -> bool:
    """Whether two measurements differ by no more than sqrt(half^2 + other_half^2)."""
    return abs(value - other) <= math.hypot(half, other_half)


def placeholders(step: Step, seed: int, out: Path) -> dict[str, str]:
    """What stands for `{out}`, `{seed}` and the keys of `by_seed`."""
    return {name: texts[seed] for name, texts in step.by_seed.items()} | {"out": str(out), "seed": str(seed)}


def measure(table: Table, number: Number, out: Path) -> Measured:
    """The number as it is in the folder `out`.

    Raises RejectedError if what its commands make is not there, is not whole, or, for a difference, is not of the same
    episodes, and UsageError for a folder that is no run.
    """
    found = []
    for seed in number.seeds:
        values, where = _values(table, number.of, seed, out)
        if number.minus is not None:
            base, other = _values(table, number.minus, seed, out)
            if base.shape != values.shape:
                raise RejectedError(f"{number.id}: {values.size} episodes and {base.size} cannot be paired")
            if unlike := [f"{name} {a} and {b}" for name, a, b in zip(FIELDS, where, other, strict=False) if a != b]:
                raise RejectedError(f"{number.id}: seed {seed}: episodes of {', '.join(unlike)} cannot be paired")
            values = values - base
        found.append(values)
    each = tuple(round(float(values.mean()), 4) for values in found)
    if number.covers == "seeds":
        mean, half = mean_of_seeds([float(values.mean()) for values in found])
        assert half is not None  # `Number` has two seeds or more here
    else:
        if len({values.shape for values in found}) > 1:
            raise RejectedError(f"{number.id}: the seeds were tested on different numbers of episodes")
        mean, half = mean_ci95(np.mean(found, axis=0))
    return Measured(round(mean, 4), round(half, 4), each)


def _values(table: Table, reading: Reading, seed: int, out: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """The accuracies [episodes] of a reading, or its only value [1]; for a score also the FIELDS of its episodes."""
    step = table.steps[reading.step]
    (place,) = map(Path, filled([str(out / step.makes)], placeholders(step, seed, out)))
    if isinstance(reading, Score):
        return _accuracies(place, reading)
    if isinstance(reading, Metric):
        _, values = plots.series(report.read(place).metrics, reading.metric)
        if not len(values):
            raise RejectedError(f"{place}: no round has the metric {reading.metric}")
        return values[-1:], ()
    (name,) = filled([reading.file], placeholders(step, seed, out))
    return _listed(place / name, reading.key), ()


def _accuracies(run: Path, reading: Score) -> tuple[np.ndarray, tuple[str, ...]]:
    """The accuracies [episodes] of a score of a run folder, and the FIELDS of its episodes."""
    wanted = (reading.method, reading.shot, reading.selection)
    found = [
        entry for entry in entries_of(report.read(run))
        if tuple(entry.row[key] for key in ("method", "shot", "selection")) == wanted
        and reading.data in (None, str(entry.row["data"]).split("@")[0].split()[0])
    ]  # fmt: skip
    of = " ".join(str(part) for part in (*wanted, reading.data) if part is not None)
    if not found:
        raise RejectedError(f"{run}: no score of {of}; the run may not have ended")
    if len(found) > 1:
        raise RejectedError(f"{run}: {len(found)} scores of {of}; name one of its data sets in `data`")
    if found[0].accuracies is None:
        raise RejectedError(f"{run}: {reading.method}: {found[0].flaw}")
    return found[0].accuracies, found[0].where


def _listed(file: Path, key: tuple[str, ...]) -> np.ndarray:
    """The accuracies [episodes] in a JSON file."""
    try:
        value: Any = json.loads(file.read_bytes())
        for name in key:
            value = value[name]
        return np.array(value, dtype=np.float64).reshape(-1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RejectedError(f"{file}: cannot be read: {type(error).__name__} at {' > '.join(key)}") from None
