"""A new method is one module and one line of `METHODS`: all else of the package finds what it brings.

Each test runs in a process of its own, where the line stands before the command line is imported.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime import toy

ROOT = Path(__file__).parent.parent
LINE = "from tests import noise_method; noise_method.register()\n"
MAIN = LINE + "import sys; from ray_dfml.cli import main; main(sys.argv[1:])"
OF_THE_TEST = [word for text in toy.EVAL for word in ("--set", text)]


def python(program: str, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A program that ends with the given code."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def noise_run(tmp_path_factory: pytest.TempPathFactory, toy_pool: Path, toy_data: str) -> tuple[Path, str]:
    """A run of the command line with a preset and a setting, and what it said on stderr."""
    path = tmp_path_factory.mktemp("noise") / "run"
    words = ("--pool", toy_pool, "--data", toy_data, "--run-dir", path, "--backend", "local", "--preset", "loud")
    done = python(MAIN, "train", "noise", *words, "--set", "method.images=8", *OF_THE_TEST)
    return path, done.stderr


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_through_the_command_line(noise_run: tuple[Path, str]) -> None:
    """The preset sets two rounds, `--set` eight images of each of four teachers; its op counts them."""
    run, said = noise_run
    assert [row["noise/images"] for row in lines(run)] == [32, 32]
    assert {"noise", "random"} == {row["method"] for row in json.loads((run / "scores.json").read_text())}
    assert "noise has no classes of its own" in toy.status(run)["notes"]
    assert f"confidence {lines(run)[-1]['noise/confidence']:.1f} %" in said


def test_its_report_has_its_plots(noise_run: tuple[Path, str]) -> None:
    page = (noise_run[0] / "report.html").read_text()
    assert "Confidence on noise" in page
    assert "Replay" not in page.replace("replay/", "")


def test_runs_of_it_are_compared_with_others(noise_run: tuple[Path, str]) -> None:
    rows = json.loads(python(MAIN, "report", noise_run[0], "--json").stdout)["runs"]
    (own,) = [row for row in rows if row["method"] == "noise" and row["selection"] == "last"]
    assert own["preset"] == "loud"
    assert own["against"].startswith("random")


def test_a_dry_run_plans_it(tmp_path: Path, toy_pool: Path) -> None:
    words = ("--pool", toy_pool, "--run-dir", tmp_path / "run", "--backend", "local", *OF_THE_TEST)
    plan = json.loads(python(MAIN, "train", "noise", *words, "--dry-run", "--json").stdout)
    assert (plan["recovered images"], plan["meta-updates"]) == (3 * 20 * 4, "0 to 3")
    assert "training minutes" in plan


def test_its_mistakes_are_named(tmp_path: Path, toy_pool: Path) -> None:
    words = ("--pool", toy_pool, "--run-dir", tmp_path / "run", "--backend", "local")
    said = python(MAIN, "train", "noise", *words, "--set", "method.contrst=1", code=2).stderr
    assert "did you mean 'contrast'?" in said
    said = python(MAIN, "train", "free", *words, "--preset", "loud", code=2).stderr
    assert "preset 'loud' is for noise, not for free" in said


def test_it_trains_through_the_trainer() -> None:
    program = (
        LINE
        + """
import numpy as np
from ray_dfml.config import resolve
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime.local import LocalBackend
from tests.support import random_teacher, small_world
world = small_world()
teachers = {c.id: (c, random_teacher(c).theta.numpy(), random_teacher(c).stats.numpy()) for c in world.cards}
config = resolve("noise", profile="paper")
assert config.method.contrast == 1.0
run = Trainer(config.model_dump(mode="json"), world, [], LocalBackend(teachers.__getitem__), None)
begun = run.state["theta"].clone()
rows = [run.round(r) for r in range(3)]
assert [row["noise/images"] for row in rows] == [60] * 3
assert all(np.isfinite(row["seconds/noise.recover"]) for row in rows)
assert rows[-1]["bank/data_sets"] == 1
assert (run.state["theta"] != begun).any()
"""
    )
    python(program)
