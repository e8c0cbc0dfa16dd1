"""The table and the picture of a sweep, from rows and from run folders that no trial made."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from ray_dfml.core.scoring import mean_of_seeds
from ray_dfml.sweeps import page, plan, results, spec
from ray_dfml.sweeps.picture import picture
from ray_dfml.sweeps.results import Row, collect
from ray_dfml.sweeps.space import Axis, axes_of
from tests import run_folders


def row(number: int, point: dict[str, Any], *values: float) -> Row:
    return Row(
        number=number, point=point, runs=[f"{number}"], seeds=list(range(len(values))), values=values, rounds=2.0,
        stopped=0, failed=0, seconds=1.0, queries=0,
    )  # fmt: skip


def test_the_interval_of_seeds_is_students() -> None:
    values = [60.0, 64.0, 71.0]
    mean, half = mean_of_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - (half or 0.0), mean + (half or 0.0)) == pytest.approx((low, high))
    assert mean_of_seeds([61.0]) == (61.0, None)


SPACES: list[tuple[dict[str, Any], str, str]] = [
    ({"steps": {"grid": [1, 2, 5]}}, "over method.steps, with the 95 % interval", "method.steps"),
    ({"draws": {"choice": ["turns", "replacement"]}}, "over method.draws", "replacement"),
    ({"steps": {"grid": [1, 2]}, "draws": {"grid": ["turns", "replacement"]}}, "over method.steps and", "turns"),
    ({"steps": {"grid": [1, 2]}, "lr_meta": {"loguniform": [1e-4, 1e-1]}}, "of each point of", "method.lr_meta"),
    ({"steps": {"grid": [1, 2]}, "lr_meta": {"uniform": [0, 1]}, "warmup": {"randint": [0, 9]}}, "one line", "warmup"),
]


@pytest.mark.parametrize(("space", "said", "text"), SPACES)
def test_the_picture_fits_the_space(space: dict[str, Any], said: str, text: str) -> None:
    axes = axes_of({"method": space})
    found = list(plan.points(axes, samples=3, seed=0))
    drawn = picture([row(n, point, 50.27 + n, 50.47 + n) for n, point in enumerate(found)], axes)
    assert drawn is not None
    about, svg = drawn
    assert said in about
    assert svg.startswith("<svg role=")
    assert text in svg
    if len(axes) == 2 and all(axis.kind == "grid" for axis in axes):
        assert all(f">{50.37 + n:.1f}<" in svg for n in range(len(found)))  # the mean in each cell


def test_without_a_validation_there_is_no_picture() -> None:
    assert picture([row(0, {"method.steps": 1})], axes_of({"method": {"steps": {"grid": [1]}}})) is None


@pytest.fixture
def sweep() -> spec.Sweep:
    tree = {
        "method": "free",
        "pool": "p",
        "data": "glyphs",
        "seeds": 2,
        "space": {"method": {"steps": {"grid": [1, 2]}}},
    }
    return spec.build(tree, "here")


def test_rows_are_ranked_by_validation_and_tests_are_of_what_was_selected(tmp_path: Path, sweep: spec.Sweep) -> None:
    """Two points on two seeds; a seed that failed puts its point last, however good the other one is."""
    trials = plan.trials(sweep, ["p"])
    for one, validation, state in zip(
        trials, (40.0, 44.0, 90.0, None), ("done", "done", "trained", "failed"), strict=True
    ):
        scores = {"free/val": [50.0, 60.0], "free/last": [1.0, 1.0], "random/last": [20.0]} if state == "done" else {}
        run = run_folders.make(tmp_path / one.name, scores, seed=one.seed, state=state)
        lines = [
            json.loads(line) | {"validation": validation} for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        lines[-1]["validation"] = None
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"round": 2, "cut')
    rows = collect(trials, tmp_path)
    assert [(one.number, one.whole, one.failed) for one in rows] == [(0, True, 0), (1, False, 1)]
    assert rows[0].validation == mean_of_seeds([40.0, 44.0])
    assert list(rows[0].tests.values()) == [(55.0, 0.0)]
    assert rows[1].tests == {}
    results.write(tmp_path, rows, ["method.steps"])
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    written = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [one["validation"] for one in table] == [42.0, 90.0]
    assert [one["method.steps"] for one in table] == [1, 2]
    assert [float(one["validation"]) for one in written] == [42.0, 90.0]
    assert list(table[0]) == list(written[0])
    page.write(tmp_path, sweep, rows, [Axis("method.steps", "grid", (1, 2))])
    text = (tmp_path / "report.html").read_text()
    assert "55.00 ± 0.00" in text
    assert text.count("<svg") == 1
