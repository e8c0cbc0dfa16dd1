"""Whole sweeps on Ray Tune: trials, ranking, the test of the winners; a sweep that is killed and resumed.

A trial of Ray Tune costs seconds, so there are few, and what needs none is tested beside this file.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_dfml.cli import main
from ray_dfml.runtime.rundir import RunFolder
from tests.runtime import toy
from tests.sweeps.conftest import SweepFile, write_sweep

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 240.0


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """`results.csv` without what depends on the machine."""
    rows = list(csv.DictReader((folder / "results.csv").open()))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path, toy_data: str) -> tuple[Path, Path]:
    """The file and the folder of a sweep of two trials, each a learner with one shard."""

    root = tmp_path_factory.mktemp("sweeps")
    file = write_sweep(root / "sweep.yaml", toy_pool, toy_data)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", str(file), "--run-dir", str(root / "whole")])
    assert not stopped.value.code
    return file, root / "whole"


def test_a_grid_of_two(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    """The better one is tested, and it equals a run of `train` with the same settings, bit for bit."""
    _, folder = undisturbed
    rows = rows_of(folder)
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert {row["method.steps"] for row in rows} == {"1", "2"}
    assert float(rows[0]["validation"]) >= float(rows[1]["validation"])
    states = {path.name: toy.status(path)["state"] for path in (folder / "trials").iterdir()}
    best = rows[0]["runs"]
    assert states == {"0000-seed0": "trained", "0001-seed0": "trained"} | {best: "done"}
    (test,) = [key for key in rows[0] if key.startswith("test ") and not key.endswith("ci95")]
    assert rows[0][test]
    assert not rows[1][test]
    assert toy.status(folder)["state"] == "done"
    assert "<svg" in (folder / "report.html").read_text()
    toy.train(RunFolder(folder / "trials" / best).config(), tmp_path / "alone")
    toy.assert_same_run(folder / "trials" / best, tmp_path / "alone")


def test_the_loggers_of_tune_write_events_csv_and_json(undisturbed: tuple[Path, Path]) -> None:
    """One row for each round, with the settings of the trial."""
    found = undisturbed[1] / "tune" / "1" / "0001-seed0"
    assert list(found.glob("events.out.tfevents.*"))
    rounds = [int(row["round"]) for row in csv.DictReader((found / "progress.csv").open())]
    assert rounds == [1, 2, 3, 4, 5, 6]
    last = json.loads((found / "result.json").read_text().splitlines()[-1])
    assert last["config"]["trial"] == {"seed": 0, "method.steps": 2}


def test_a_sweep_that_is_killed_and_resumed_equals_the_undisturbed_one(
    undisturbed: tuple[Path, Path], tmp_path: Path, command: Callable[..., toy.Done]
) -> None:
    """SIGKILL within the second trial. What is resumed reads run folders only: what Tune has pickled is gone."""
    file, whole = undisturbed
    folder, words = tmp_path / "killed", ["tune", str(file), "--backend", "local", "--concurrent", "1", "--run-dir"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_dfml", *words, str(folder)], cwd=ROOT, stderr=subprocess.PIPE
    )
    status, until = folder / "trials" / "0001-seed0" / "status.json", time.monotonic() + PATIENCE
    while not (status.exists() and json.loads(status.read_text()).get("round")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert toy.status(folder)["state"] == "running"
    before = (folder / "trials" / "0000-seed0" / "checkpoints" / "round-000005.json").stat().st_mtime_ns
    for path in (folder / "tune").rglob("*.pkl"):
        path.unlink()
    assert command(*words, folder).code == 2  # it exists
    done = command(*words, folder, "--resume")
    assert done.code == 0, done.err
    after = (folder / "trials" / "0000-seed0" / "checkpoints" / "round-000005.json").stat().st_mtime_ns
    assert before == after, "a trial that has ended is not trained again"
    assert rows_of(folder) == rows_of(whole)
    for name in ("0000-seed0", "0001-seed0"):
        toy.assert_equal(toy.last_state(folder / "trials" / name), toy.last_state(whole / "trials" / name))
    best = rows_of(whole)[0]["runs"]
    toy.assert_same_run(folder / "trials" / best, whole / "trials" / best)


def test_asha_stops_a_trial_that_is_behind(
    tmp_path: Path, sweep_file: SweepFile, command: Callable[..., toy.Done]
) -> None:
    """The second trial does not adapt to a support, so it is behind at its first validation and always."""
    settings = sweep_file.settings()
    settings["method"]["steps"] = 1
    settings["eval"]["lrs"] = []
    file = sweep_file(
        set=settings, space={"eval": {"lr": {"grid": [0.01, 1e-9]}}},
        scheduler={"type": "asha", "grace": 2, "reduction": 2},
    )  # fmt: skip
    folder = tmp_path / "sweep"
    words = ("tune", file, "--run-dir", folder, "--backend", "local", "--concurrent", 1)
    done = command(*words)
    assert done.code == 0, done.err
    states = [toy.status(folder / "trials" / name) for name in ("0000-seed0", "0001-seed0")]
    assert [state["state"] for state in states] == ["done", "stopped"]
    assert [state["round"] for state in states] == [6, 2]
    rows, tune_folders = rows_of(folder), list((folder / "tune").iterdir())
    assert [row["stopped"] for row in rows] == ["0", "1"]
    assert command(*words, "--resume").code == 0
    assert rows_of(folder) == rows
    assert list((folder / "tune").iterdir()) == tune_folders, "all trials have ended, so none is begun"


def test_a_group_that_never_fits_is_refused_before_it_starts(
    tmp_path: Path, sweep_file: SweepFile, command: Callable[..., toy.Done]
) -> None:
    done = command("tune", sweep_file(), "--run-dir", tmp_path / "sweep", "--workers", 3)
    assert done.code == 5
    assert "a trial needs 3 shards of 1 CPU, and the cluster has room for 2 (2 CPU in all): 1 too few" in done.err
    assert not (tmp_path / "sweep" / "tune").exists()


def test_a_folder_holds_one_sweep(
    tmp_path: Path, undisturbed: tuple[Path, Path], sweep_file: SweepFile, command: Callable[..., toy.Done]
) -> None:
    other = command("tune", sweep_file(seeds=2), "--run-dir", undisturbed[1], "--resume")
    assert other.code == 2
    assert "holds another sweep than the file says" in other.err
    none = command("tune", sweep_file(), "--run-dir", tmp_path / "none", "--resume")
    assert none.code == 2
    assert "leave out --resume to begin one" in none.err
