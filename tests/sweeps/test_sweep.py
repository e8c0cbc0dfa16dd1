"""Whole sweeps on Ray Tune: trials, ranking, the test of the winners; a sweep that is killed and resumed."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_dfml.runtime.rundir import RunFolder
from tests.runtime import toy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_grid_of_two(tmp_path: Path, sweep_file: Callable[..., Path], command: Callable[..., toy.Done]) -> None:
    """Each trial is a learner with a shard. The better one is tested, and the run equals one of `train`."""
    folder = tmp_path / "sweep"
    done = command("tune", sweep_file(), "--run-dir", folder, "--json")
    assert done.code == 0, done.err
    points = json.loads(done.out)["points"]
    assert [point["rank"] for point in points] == [1, 2]
    assert {point["method.steps"] for point in points} == {1, 2}
    assert points[0]["validation"] >= points[1]["validation"]
    states = {path.name: toy.status(path)["state"] for path in (folder / "trials").iterdir()}
    best = points[0]["runs"]
    assert states == {"0000-seed0": "trained", "0001-seed0": "trained"} | {best: "done"}
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["runs"] for row in rows] == [point["runs"] for point in points]
    (test,) = [key for key in rows[0] if key.startswith("test ") and not key.endswith("ci95")]
    assert rows[0][test]
    assert not rows[1][test]
    toy.train(RunFolder(folder / "trials" / best).config(), tmp_path / "alone")
    toy.assert_same_run(folder / "trials" / best, tmp_path / "alone")
