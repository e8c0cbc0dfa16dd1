"""What a sweep has found, read from its run folders: one row for each point, ranked by validation."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_dfml.core.scoring import mean_of_seeds
from ray_dfml.methods import UNTRAINED
from ray_dfml.runtime import driver
from ray_dfml.runtime.rundir import write_table, write_text
from ray_dfml.sweeps import pbt, plan, trial
from ray_dfml.sweeps.plan import Trial

Interval = tuple[float, float | None]
"""A mean, and the half-width of its 95 % interval; None with fewer than two values."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A point of the sweep with what its runs found. Accuracies are in percent."""

    number: int
    point: Mapping[str, Any]
    runs: Sequence[str]
    seeds: Sequence[int]
    values: Sequence[float]
    """validation of each run that has one"""
    rounds: float
    """mean over runs"""
    stopped: int
    failed: int
    seconds: float
    queries: int
    tests: Mapping[str, Interval] = field(default_factory=dict)
    """"DATA k-shot" -> mean over seeds, for points that were tested"""

    @property
    def whole(self) -> bool:
        """Whether every seed has a validation."""
        return len(self.values) == len(self.seeds)

    @property
    def validation(self) -> Interval | None:
        """Mean over seeds, or None if no run has a validation."""
        return mean_of_seeds(self.values) if self.values else None


def collect(trials: Sequence[Trial], folder: Path) -> list[Row]:
    """One row for each point, the best first. Points with a seed that failed come after the others."""
    points: dict[int, list[Trial]] = {}
    for one in trials:
        points.setdefault(one.number, []).append(one)
    rows = [_row(number, members, folder) for number, members in points.items()]
    return sorted(rows, key=lambda row: (not row.whole, -row.validation[0] if row.validation else 0.0, row.number))


def _row(number: int, members: Sequence[Trial], folder: Path) -> Row:
    found = [trial.look(folder / one.name) for one in members]
    values = [of.validation(one.config.name) for one, of in zip(members, found, strict=True)]
    states = [of.state for of in found]
    return Row(
        number=number, point=members[0].point, runs=[one.name for one in members], seeds=[one.seed for one in members],
        values=[value for value in values if value is not None],
        rounds=float(np.mean([of.rounds for of in found])), stopped=states.count(driver.STOPPED),
        failed=sum(not of.final and of.state != driver.STOPPED for of in found),
        seconds=sum(row.get("seconds/round", 0.0) for of in found for row in of.rows),
        queries=sum(pbt.own_queries(run) for one in members for run in _runs(one, folder)),
        tests=_tests([folder / one.name for one in members]),
    )  # fmt: skip


def _runs(one: Trial, folder: Path) -> list[Path]:
    """The run folders of a trial: with PBT also those that it left when it took over the state of another one."""
    return sorted(folder.glob(f"{one.number:04d}-seed{one.seed}")) + sorted(
        folder.glob(f"{one.number:04d}-seed{one.seed}-from*")
    )


def _tests(runs: Sequence[Path]) -> dict[str, Interval]:
    """The test scores that all runs of a point have, of the weights that each run selected: means over runs."""
    found: list[dict[str, list[float]]] = []
    for run in runs:
        path, of = run / "scores.json", {}
        scores = json.loads(path.read_text()) if path.exists() else []
        own = [one for one in scores if one["method"] != UNTRAINED]
        selection = "val" if any(one["selection"] == "val" for one in own) else "last"
        for one in own:
            if one["selection"] == selection:
                kind = f"{one['data']} top-1" if one["shot"] is None else f"{one['data']} {one['shot']}-shot"
                of.setdefault(kind, []).append(one["mean"])
        found.append(of)
    kinds = [kind for kind in found[0] if all(kind in of for of in found)] if found else []
    return {kind: mean_of_seeds([float(np.mean(of[kind])) for of in found]) for kind in kinds}


def columns(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, list[Any]]:
    """The table of a sweep, column by column. `keys` are the settings that vary; a point without one has None."""
    table: dict[str, list[Any]] = {"rank": list(range(1, len(rows) + 1)), "point": [row.number for row in rows]}
    table |= {key: [_plain(row.point.get(key)) for row in rows] for key in keys}
    valid = [row.validation or (None, None) for row in rows]
    table |= {"validation": [v[0] for v in valid], "validation_ci95": [v[1] for v in valid]}
    for kind in dict.fromkeys(kind for row in rows for kind in row.tests):
        tests = [row.tests.get(kind, (None, None)) for row in rows]
        table |= {f"test {kind}": [t[0] for t in tests], f"test {kind} ci95": [t[1] for t in tests]}
    for name in ("rounds", "stopped", "failed", "seconds", "queries"):
        table[name] = [getattr(row, name) for row in rows]
    table["seeds"] = [len(row.seeds) for row in rows]
    table["runs"] = [" ".join(row.runs) for row in rows]
    return table


def _plain(value: Any) -> Any:
    return plan.shown(value) if isinstance(value, tuple | list) else value


def write(folder: Path, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Write `results.csv` and `results.parquet`."""
    table = columns(rows, keys)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    write_text(folder / "results.csv", text.getvalue())
    whole = {name: _of_one_kind(values) for name, values in table.items()}
    write_table(folder / "results.parquet", pa.table(whole))


def _of_one_kind(values: Sequence[Any]) -> Sequence[Any]:
    """A column of one type: as it is, or floats, or texts."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1:
        return values
    as_type = float if kinds == {int, float} else str
    return [None if value is None else as_type(value) for value in values]
