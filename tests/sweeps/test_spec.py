"""The file of a sweep, its space, and the trials that are planned from it. No Ray."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_dfml import yaml_text
from ray_dfml.config import ChoiceConfig
from ray_dfml.errors import UsageError
from ray_dfml.sweeps import plan, spec
from ray_dfml.sweeps.space import Axis, axes_of, points
from tests.runtime import toy

LR = {"loguniform": [1e-4, 1e-1]}


def sweep(space: dict[str, Any], **changes: Any) -> spec.Sweep:
    return spec.build({"method": "free", "pool": "p", "data": "glyphs", "space": space} | changes, "s.yaml")


def test_points_are_grids_crossed_with_draws() -> None:
    axes = axes_of({"method": {"steps": {"grid": [1, 2]}, "lr_meta": LR}, "learner.head": {"grid": ["maml", "anil"]}})
    found = list(points(axes, samples=3, seed=0))
    assert len(found) == 12
    assert list(found[0]) == ["method.steps", "method.lr_meta", "learner.head"]
    assert [(p["method.steps"], p["learner.head"]) for p in found[::3]] == [
        (1, "maml"), (1, "anil"), (2, "maml"), (2, "anil"),
    ]  # fmt: skip
    assert len({p["method.lr_meta"] for p in found}) == 12
    assert found == list(points(axes, samples=3, seed=0))
    assert found != list(points(axes, samples=3, seed=1))


def test_a_draw_is_the_same_whatever_else_is_drawn() -> None:
    few = list(points(axes_of({"method": {"lr_meta": LR}}), samples=2, seed=0))
    more = list(points(axes_of({"method": {"lr_meta": LR, "warmup": {"randint": [0, 9]}}}), samples=5, seed=0))
    assert [p["method.lr_meta"] for p in few] == [p["method.lr_meta"] for p in more[:2]]


@pytest.mark.parametrize(
    ("kind", "low", "high", "middle"),
    [("uniform", 1.0, 3.0, 2.0), ("loguniform", 1e-4, 1.0, 1e-2), ("randint", 1, 4, 2)],
)
def test_draws_fill_their_range(kind: str, low: float, high: float, middle: float) -> None:
    """The median is where the distribution has it."""
    axis = Axis("a", kind, (low, high))
    drawn = sorted(p["a"] for p in points([axis], samples=401, seed=0))
    assert drawn[0] >= low
    assert drawn[-1] < high
    assert low + (drawn[0] - low) < drawn[200] < drawn[-1]
    assert drawn[200] == pytest.approx(middle, rel=0.35)
    assert kind != "randint" or set(drawn) == {1, 2, 3}


def test_choices_are_each_as_likely() -> None:
    drawn = [p["a"] for p in points([Axis("a", "choice", ("x", "y"))], samples=400, seed=0)]
    assert 160 < drawn.count("x") < 240


def test_trials_are_points_on_seeds_with_their_whole_configuration() -> None:
    found = plan.trials(
        sweep({"method": {"steps": {"grid": [1, 2]}}, "preset": {"grid": ["quickstart"]}}, seeds=[3, 5], defaults=True,
              set={"eval": {"every": 2}}, budget={"queries": 7}),
        ["p"],
    )  # fmt: skip
    assert [one.name for one in found] == [f"{n:04d}-seed{s}" for n in (0, 1, 2) for s in (3, 5)]
    assert [one.config.seed for one in found] == [3, 5] * 3
    assert found[0].point == {}
    assert found[0].label == "defaults seed 3"
    assert [one.config.preset for one in found] == [None, None, *["quickstart"] * 4]
    assert [one.config.method.model_dump()["steps"] for one in found[2:]] == [1, 1, 2, 2]
    assert {(one.config.eval.every, one.config.budget.queries) for one in found} == {(2, 7)}
    assert found[-1].label == "steps=2 preset=quickstart seed 5"


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"seedz": 1}, r"s.yaml: unknown key seedz \(did you mean 'seeds'\?\)"),
    ({"scheduler": {"type": "asha", "grase": 1}}, r"unknown key scheduler.grase \(did you mean 'grace'\?\)"),
    ({"pool": {"data": "glyphs", "modells": 3}}, r"unknown key pool.modells \(did you mean 'models'\?\)"),
    ({"pool": {"data": "glyphs", "models": 3, "way": 1}}, "pool.way: input should be greater than or equal to 2"),
    ({"seeds": [1, 1]}, "seeds: expected different seeds"),
    ({"seeds": 0}, "seeds: "),
    ({"scheduler": {"type": "bohb"}}, "scheduler.type: input should be 'none', 'asha' or 'pbt'"),
    ({"space": {}}, "space: expected settings"),
    ({"space": {"method": {"stepz": {"grid": [1]}}}}, r"unknown key method.stepz \(did you mean 'steps'\?\)"),
    ({"space": {"method": {"steps": {"gird": [1]}}}}, r"space.method.steps: unknown kind 'gird' \(did you mean 'grid'"),
    ({"space": {"method": {"steps": {"uniform": [1.5, 5]}}}}, "method.steps: input should be a valid integer"),
    ({"space": {"method": {"steps": {"randint": [1, 1]}}}}, "takes two numbers, the lower one first"),
    ({"space": {"method": {"lr_meta": {"loguniform": [0, 1]}}}}, "loguniform takes numbers above 0"),
    ({"space": {"method": {"lr_meta": {"uniform": [-1, 1]}}}}, "method.lr_meta: input should be greater than or equal"),
    ({"space": {"method": {"steps": {"grid": [1, 1]}}}}, "grid takes different values"),
    ({"space": {"method": {"steps": {"grid": [{"a": 1}]}}}}, "space.method.steps: grid takes plain values"),
    ({"space": {"method": {"steps": {"choice": [[[1]]]}}}}, "space.method.steps: choice takes plain values"),
    ({"space": {"method": {"lr_meta": {"loguniform": [1e-3, math.inf]}}}}, "takes two numbers, the lower one first"),
    ({"scheduler": {"type": "asha", "reduction": math.inf}}, "scheduler.reduction: input should be a finite number"),
    ({"set": {"method": [1]}}, "space.method.steps: is under `set` too"),
    ({"space": {"budget": {"queries": {"grid": [5]}}}, "budget": {"queries": 7}}, "queries: is under `budget` too"),
    ({"space": {"method": {"steps": 3}}}, "space.method.steps: expected settings such as"),
    ({"set": {"method": {"steps": 3}}}, "space.method.steps: is under `set` too"),
    ({"method": "fre"}, r"unknown method 'fre' \(did you mean 'free'\?\)"),
    ({"budget": {"querys": 3}}, r"unknown key budget.querys \(did you mean 'queries'\?\)"),
]


@pytest.mark.parametrize(("changes", "said"), FAULTS)
def test_a_fault_is_named_before_anything_runs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        plan.trials(sweep(**{"space": {"method": {"steps": {"grid": [1, 2]}}}} | changes), ["p"])
    assert "\n" not in str(error.value)


PAGE = (Path(__file__).parent.parent.parent / "docs" / "sweeps.md").read_text("utf-8")


def test_the_page_has_a_sweep_that_can_be_planned_and_names_all_settings_of_pools() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)
    sweep_of_page = spec.build(yaml_text.load(text), "docs/sweeps.md")
    assert len(plan.trials(sweep_of_page.model_copy(update={"data": ()}), ["p"])) == 4 * 10 * 3
    assert set(re.findall(r"^\| `pool\.(\w+)`", PAGE, flags=re.M)) == set(ChoiceConfig.model_fields)
    recipe = re.search(r"recipe such as (\{.*\})", text)
    assert recipe
    assert spec.PoolRecipe.model_validate(yaml_text.load(recipe[1]))


SMALL = """
method: free
seeds: 5
data: glyphs
set: {method: {rounds: 9, lr_meta: 1e-4}}
space: {method: {steps: {grid: [1, 2, 3]}}}
small:
  seeds: 1
  set: {method: {rounds: 2}}
  space: {method: {steps: {grid: [1]}}}
"""


def test_the_small_form_replaces_values_above_it(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SMALL)
    whole, small = spec.read(path), spec.read(path, small=True)
    assert whole.seeds == (0, 1, 2, 3, 4)
    assert small.seeds == (0,)
    assert small.set == {"method": {"rounds": 2, "lr_meta": 1e-4}}
    assert small.space == {"method": {"steps": {"grid": [1]}}}
    path.write_text(SMALL.partition("small:")[0])
    with pytest.raises(UsageError, match="has no key `small`; leave out --small"):
        spec.read(path, small=True)


@pytest.mark.parametrize(("text", "said"), [("a: [", "no YAML"), ("- 1", "expected keys"), ("", "expected keys")])
def test_a_file_that_is_no_sweep(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        spec.read(path)
    with pytest.raises(UsageError, match="name the YAML file"):
        spec.read(tmp_path / "none.yaml")


def test_a_file_is_read_up_to_a_limit_whatever_size_it_says() -> None:
    with pytest.raises(UsageError, match="/dev/zero: larger than 1 MiB, so it is no sweep"):
        spec.read(Path("/dev/zero"))


def test_a_key_that_is_given_twice_is_refused_in_one_line(tmp_path: Path, command: Callable[..., toy.Done]) -> None:
    (tmp_path / "sweep.yaml").write_text("method: free\nseeds: 1\nspace: {}\nseeds: 2\n")
    done = command("tune", tmp_path / "sweep.yaml", "--run-dir", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "the key 'seeds' is given twice" in done.err
    assert "line 4" in done.err


@pytest.mark.parametrize(
    "words", [("s3://b/sweep.yaml", "--run-dir", "out"), ("sweep.yaml", "--run-dir", "s3://b/out")]
)
def test_sweeps_are_on_disks(words: tuple[str, ...], command: Callable[..., toy.Done]) -> None:
    done = command("tune", *words)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "s3://b/" in done.err
    assert "a path on a disk is needed here" in done.err
