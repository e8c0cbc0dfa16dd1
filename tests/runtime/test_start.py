"""Where the learner starts: after `no-pool`, bit for bit, at the mean of the teachers, and the same after a resume."""

import json
from pathlib import Path

import pytest
import torch

from ray_dfml.config import RunConfig, build, resolve
from ray_dfml.errors import UsageError
from ray_dfml.methods import METHODS, no_pool
from ray_dfml.methods.baselines import fetch, mean
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import driver
from ray_dfml.runtime.estimate import estimate
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.types import Job
from tests.runtime import toy

SMALL = tuple(text.removeprefix("method.") for text in toy.NO_POOL)
WARM = ("learner.start=no-pool", *(f"start.{text}" for text in SMALL))


def trainer(config: RunConfig) -> Trainer:
    """A run of one process that has not begun."""
    inputs = driver.read_inputs(config)
    return Trainer(config.model_dump(mode="json"), inputs.world, [], LocalBackend(inputs.teachers.__getitem__), None)


def after(config: RunConfig, rounds: int) -> Trainer:
    """A run of one process after some rounds."""
    one = trainer(config)
    for r in range(rounds):
        one.round(r)
    return one


@pytest.mark.parametrize("method", ["free", "purer", "bidf-mkd"])
def test_the_start_of_a_method_is_a_run_of_no_pool(method: str, toy_pool: Path) -> None:
    config = toy.config(method, toy_pool, None, *WARM)
    assert (config.start_rounds, config.total_rounds) == (2, 2 + config.method.total_rounds)
    warm, control = after(config, 2), after(toy.config("no-pool", toy_pool, None), 2)
    for name in ("theta", "stats"):
        assert torch.equal(warm.state[name], control.state[name])
    begun = METHODS[method].init(config.method, warm.world)
    assert warm.state.keys() == trainer(config).state.keys()
    toy.assert_equal({k: v for k, v in warm.state.items() if k in begun and k not in ("theta", "stats")},
                     {k: v for k, v in begun.items() if k not in ("theta", "stats")})  # fmt: skip
    assert not warm.learned()
    assert "recover/tasks" in warm.round(2)


def test_the_method_begins_with_its_own_round_0(toy_pool: Path) -> None:
    """Its teachers and recoveries are those of a run that starts at random; FREE's first round moves the generator."""
    warm, plain = after(toy.config("free", toy_pool, None, *WARM), 3), after(toy.config("free", toy_pool, None), 1)
    assert torch.equal(warm.state["theta_g"], plain.state["theta_g"])
    assert not torch.equal(warm.state["theta"], plain.state["theta"])


def test_an_average_start_is_the_mean_of_the_teachers(toy_pool: Path) -> None:
    config = toy.config("purer", toy_pool, None, "learner.start=average")
    one = after(config, 1)
    found = fetch(one.world.cards, lambda op, jobs, shared: one._backend.map(op, list[Job](jobs), shared))
    assert torch.equal(one.state["theta"], mean([teacher.theta for teacher in found]))
    assert torch.equal(one.state["stats"], mean([teacher.stats for teacher in found]))
    assert not one.learned()


def test_a_run_that_is_stopped_after_every_round_has_the_same_bits(
    tmp_path: Path, toy_pool: Path, toy_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.config("free", toy_pool, toy_data, *WARM, "method.rounds=2")
    toy.train(config, tmp_path / "whole")
    toy.stopped_after_each_round(config, tmp_path / "run", monkeypatch)
    toy.assert_same_run(tmp_path / "run", tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert ["start/accuracy" in line for line in lines] == [True, True, False, False]
    assert [line["validation"] is None for line in lines] == [True, True, True, False]
    notes = toy.status(tmp_path / "whole")["notes"]
    assert "the learner starts after 6 meta-updates of no-pool" in notes
    assert any("which assumes" in line for line in notes)


def test_a_preset_of_no_pool_is_a_start_and_can_be_changed() -> None:
    config = resolve(
        "free", settings=["learner.start=no-pool-characters", "start.rounds=3", "start.images=strokes,dip"]
    )
    values = no_pool.PRESETS["no-pool-characters"].values["method"]
    assert config.start == no_pool.Config.model_validate(values | {"rounds": 3, "images": ("strokes", "dip")})
    assert build(config.model_dump(mode="json")) == config
    assert resolve("free").start is None


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("free", ["learner.start=no-poll"], r"no start 'no-poll', did you mean 'no-pool'\?|no start 'no-poll'"),
        ("free", ["start.rounds=3"], "start.rounds is a setting of learner.start=no-pool"),
        ("free", ["learner.start=average", "start.rounds=3"], "start.rounds is a setting of learner.start=no-pool"),
        ("free", ["learner.start=no-pool", "start.image=dip"], "unknown key start.image.*'images'"),
        ("free", ["learner.start=no-pool", "start.rounds=0"], "config: start.rounds"),
        ("no-pool", ["learner.start=no-pool"], "no-pool trains no learner that could start elsewhere"),
        ("ideal", ["learner.start=average"], "ideal trains no learner that could start elsewhere"),
    ],
)
def test_a_start_that_cannot_be_is_refused(method: str, settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(method, settings=settings)


def test_teachers_unlike_the_learner_have_no_mean(toy_pool: Path) -> None:
    config = toy.config("purer", toy_pool, None, "learner.start=average", "learner.arch=conv4-64")
    with pytest.raises(
        UsageError, match=r"learner\.start=average: merges weights, so every teacher must be the learner"
    ):
        driver.read_inputs(config)


def test_too_few_images_of_a_class_of_the_start_are_refused(toy_pool: Path) -> None:
    with pytest.raises(UsageError, match=r"start\.images_per_class is 2; raise it"):
        driver.read_inputs(toy.config("free", toy_pool, None, *WARM, "start.images_per_class=2"))


def test_a_dry_run_counts_the_rounds_and_the_updates_of_the_start(toy_pool: Path) -> None:
    """Two rounds of three updates before PURER's four rounds, of which three make two updates."""
    config = toy.config("purer", toy_pool, None, *WARM)
    plan = estimate(config, driver.read_inputs(config), toy.LOCAL)
    assert (plan["rounds"], plan["meta-updates"]) == (2 + 4, str(2 * 3 + 3 * 2))
