"""The sweeps in `tune_configs`: what each file says of itself, its plan, and its small form, run for two trials."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_dfml.cli import cli
from ray_dfml.sweeps import plan, spec
from tests.runtime import toy

FOLDER = Path(__file__).parent.parent.parent / "tune_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
NAMES = {
    "free_adaptation-steps", "ideal_lambda-eg", "free-black-box_steps-lambda-eg", "free_pool-size",
    "free_weak-teachers", "free_ablation", "purer_curriculum", "bidf_queries", "heads",
}  # fmt: skip

for_each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_they_are_all_there() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == NAMES


@for_each_file
def test_the_first_line_starts_it(path: Path) -> None:
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert words[:3] == ["ray-dfml", "tune", f"tune_configs/{path.name}"]
    command: Any = cli.get_command(None, "tune")  # type: ignore[arg-type]
    command.make_context("tune", words[2:])


@for_each_file
def test_a_comment_stands_above_each_key(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line for line in lines if len(line) > 120] == []
    keys = [i for i, line in enumerate(lines) if re.match(r" {0,2}[a-z_]+:", line)]
    assert len(keys) > 12
    assert [lines[i] for i in keys if not lines[i - 1].lstrip().startswith("# ")] == []


@for_each_file
@pytest.mark.parametrize("small", [False, True], ids=["full", "small"])
def test_each_form_has_a_plan(path: Path, small: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All settings are those of the method, and all values in their range, though nothing is read yet."""
    monkeypatch.setenv("RAY_DFML_DATA", str(tmp_path))
    sweep = spec.read(path, small=small)
    trials = plan.trials(sweep, ["pool"])
    assert isinstance(sweep.pool, spec.PoolRecipe)
    points = {one.number for one in trials}
    assert len(points) >= (2 if small else 3)
    assert len(trials) == len(points) * (1 if small else 3)
    for one in trials:
        assert one.config.total_rounds > 1
        assert any(one.config.validates(r) for r in range(one.config.total_rounds))


def test_black_boxes_are_swept_over_k_lambda_and_generator_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_DFML_DATA", str(tmp_path))
    sweep = spec.read(FOLDER / "free-black-box_steps-lambda-eg.yaml")
    assert [axis.key for axis in plan.axes(sweep, ["pool"])] == [
        "method.steps", "method.surrogate.lam", "method.surrogate.generator_steps",
    ]  # fmt: skip


def cut(path: Path, to: Path) -> Path:
    """A copy of a sweep with two points on one seed in its small form."""
    tree = yaml.safe_load(path.read_text())
    small, sweep = tree["small"], spec.read(path, small=True)
    first, *rest = plan.axes(sweep, ["pool"])
    small["space"] = {axis.key: {"grid": list(axis.values[:1])} for axis in rest}
    small["space"] |= {first.key: {"grid": [first.values[0], first.values[-1]]}}
    small |= {"defaults": False, "samples": 1}
    to.write_text(yaml.safe_dump(tree))
    return to


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "name",
    [
        "free_pool-size",
        *(pytest.param(name, marks=pytest.mark.data) for name in sorted(NAMES - {"free_pool-size"})),
    ],
)  # fmt: skip
def test_the_small_form_runs(name: str, tmp_path: Path, command: Any) -> None:
    """Two trials, each in one process; the winner is tested. Most of them only where there are real data, and time."""
    file = cut(FOLDER / f"{name}.yaml", tmp_path / "sweep.yaml")
    done = command("tune", file, "--run-dir", tmp_path / "sweep", "--small", "--backend", "local")
    assert done.code == 0, done.err
    states = [toy.status(path)["state"] for path in sorted((tmp_path / "sweep" / "trials").iterdir())]
    assert len(states) == 2
    assert {"done", "budget"} & set(states)
    assert set(states) <= {"done", "budget", "trained", "stopped"}
    assert "<svg" in (tmp_path / "sweep" / "report.html").read_text()
