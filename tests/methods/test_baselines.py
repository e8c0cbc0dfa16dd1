"""The baselines: the mean of weights, the best teacher, the fresh learner, and the ceiling on real images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods import METHODS, baselines
from ray_dfml.methods.base import MethodConfig, State, World, learner_weights
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import driver
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.types import Arrays, Job, TeacherCard
from tests.runtime import toy
from tests.support import FakeShard, card, image_spec, small_world

WORLD = small_world()
CONFIG = MethodConfig()


def made(device: torch.device, method: str, world: World) -> State:
    """The state after the method's one round."""
    shard = FakeShard(world, device=device)

    def send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        assert op == "weights"
        return baselines.weights(shard, jobs, shared)

    state = METHODS[method].init(CONFIG, world)
    assert METHODS[method].plan(CONFIG, world, state, 0) == []
    assert METHODS[method].shared(CONFIG, world, state, 0) == {}
    found, metrics = METHODS[method].learn(CONFIG, world, state, 0, [], send)
    assert metrics == {}
    return found


def with_accuracies(*accuracies: float | None) -> World:
    return replace(WORLD, cards=tuple(replace(c, accuracy=a) for c, a in zip(WORLD.cards, accuracies, strict=True)))


def test_the_average_is_the_mean_of_weights_and_statistics(device: torch.device) -> None:
    world = small_world(cards=2)
    a, b = (FakeShard(world).teacher(c.id) for c in world.cards)
    found = made(device, "average", world)
    torch.testing.assert_close(found["theta"], (a.theta + b.theta) / 2, rtol=0, atol=1e-7)
    torch.testing.assert_close(found["stats"], (a.stats + b.stats) / 2, rtol=1e-6, atol=1e-7)


def test_the_average_of_one_teacher_is_that_teacher(device: torch.device) -> None:
    world = small_world(cards=1)
    assert made(device, "average", world)["theta"].equal(FakeShard(world).teacher("conv4-0").theta)


def refusal(method: str, world: World) -> str:
    """The one line with which the method refuses to start."""
    with pytest.raises(UsageError) as error:
        METHODS[method].init(METHODS[method].Config(), world)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("method", ["average", "ota", "dro"])
@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (card(9, arch="resnet10"), "resnet10-9 is resnet10 of 3x16x16 images and 2 classes"),
        (card(9, way=3), "conv4-9 is conv4 of 3x16x16 images and 3 classes"),
        (card(9, size=32), "conv4-9 is conv4 of 3x32x32 images and 2 classes"),
        (card(9, channels=1), "conv4-9 is conv4 of 1x16x16 images and 2 classes"),
    ],
)
def test_weights_of_unlike_networks_are_not_merged(method: str, odd: TeacherCard, what: str) -> None:
    assert refusal(method, replace(WORLD, cards=(*WORLD.cards, odd))) == (
        f"{method}: merges weights, so every teacher must be the learner's network, conv4 of 3x16x16 images and 2 "
        f"classes; {what}; split the pool, or use a method that learns from outputs, such as free"
    )


@pytest.mark.parametrize("method", ["average", "ota", "dro"])
@pytest.mark.parametrize("change", [{"arch": "resnet10"}, {"way": 5}])
def test_a_learner_unlike_all_teachers_is_told_how_to_be_like_them(method: str, change: dict[str, Any]) -> None:
    text = refusal(method, replace(WORLD, **change))
    assert "conv4-0 is conv4 of 3x16x16 images and 2 classes" in text
    assert text.endswith("; use --set learner.arch=conv4 --set learner.way=2")


@pytest.mark.parametrize("method", ["average", "ota", "dro"])
def test_a_learner_of_another_input_than_all_teachers_needs_another_method(method: str) -> None:
    assert refusal(method, replace(WORLD, image=image_spec(3, 32))).endswith("such as free")


@pytest.mark.parametrize("method", ["average", "ota", "dro"])
def test_without_teachers_there_is_nothing_to_merge(method: str) -> None:
    assert refusal(method, replace(WORLD, cards=())) == (
        f"{method}: merges the weights of teachers; name a pool with --pool"
    )


def test_teachers_that_cannot_be_read_are_left_out(device: torch.device) -> None:
    """The results name their teachers. If no teacher could be read, that is an error."""
    shard = FakeShard(WORLD, device=device)

    def send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        assert [(job.index, job.cost, job.memory) for job in jobs] == [
            (0, macs, size),
            (1, macs, size),
            (2, macs, size),
        ]
        return baselines.weights(shard, [job for job in jobs if job.teacher != "conv4-1"], shared)

    macs, size = float(WORLD.net.macs), 4 * (WORLD.net.layout.numel + WORLD.net.stats_layout.numel)
    found = baselines.fetch(WORLD.cards, send)
    assert [one.teacher for one in found] == ["conv4-0", "conv4-2"]
    assert found[1].theta.equal(shard.teacher("conv4-2").theta.cpu())
    assert found[1].stats.equal(shard.teacher("conv4-2").stats.cpu())
    with pytest.raises(RejectedError, match="no teacher of the pool could be read"):
        baselines.fetch(WORLD.cards, lambda *_: [])


@pytest.mark.parametrize(
    ("accuracies", "best"), [((70.0, 90.0, 80.0), 1), ((None, 10.0, None), 1), ((0.0, None, None), 0), ((5, 5, 5), 2)]
)
def test_the_best_model_has_the_highest_reported_accuracy(
    device: torch.device, accuracies: tuple[float | None, ...], best: int
) -> None:
    """Of equal accuracies the last id wins, so the choice does not depend on the order of the pool."""
    world = with_accuracies(*accuracies)
    found = made(device, "best-model", world)
    teacher = FakeShard(world).teacher(WORLD.cards[best].id)
    assert found["theta"].equal(teacher.theta)
    assert found["stats"].equal(teacher.stats)
    assert (found["teacher"], found["network"]["arch"], found["network"]["outputs"]) == (
        WORLD.cards[best].id,
        "conv4",
        2,
    )
    backwards = made(device, "best-model", replace(world, cards=world.cards[::-1]))
    assert backwards["teacher"] == found["teacher"]


def test_the_best_model_may_be_of_another_architecture(device: torch.device) -> None:
    world = replace(
        WORLD, cards=(replace(WORLD.cards[0], accuracy=1.0), replace(card(7, arch="resnet10"), accuracy=2.0))
    )
    found = made(device, "best-model", world)
    assert (found["network"]["arch"], found["teacher"]) == ("resnet10", "resnet10-7")
    assert len(found["theta"]) != WORLD.net.layout.numel


def mixed(*accuracies: float | None) -> World:
    """A pool of a small grey, a large and three fitting teachers, of which the last has most classes."""
    cards = (card(5, channels=1), card(6, size=32), card(7), card(8, arch="resnet10"), card(9, way=4))
    return replace(WORLD, cards=tuple(replace(c, accuracy=a) for c, a in zip(cards, accuracies, strict=True)), way=2)


def test_the_best_model_of_a_mixed_pool_takes_the_input_of_the_learner(device: torch.device) -> None:
    world = mixed(99.0, 98.0, 70.0, 80.0, None)
    assert made(device, "best-model", world)["teacher"] == "resnet10-8"
    assert METHODS["best-model"].notes(CONFIG, world) == [
        "best-model takes resnet10-8 (80.0 %): conv4-5 (99.0 %) takes 1x16x16 images and has 2 classes, which does not "
        "fit the episodes"
    ]
    best = mixed(1.0, 1.0, 70.0, 80.0, 90.0)
    found = made(device, "best-model", best)
    assert (found["teacher"], found["network"]["outputs"], len(found["theta"])) == (
        "conv4-9",
        4,
        WORLD.net.layout.numel + 66,
    )
    assert METHODS["best-model"].notes(CONFIG, best) == []


def test_the_best_model_of_few_classes_is_passed_over(device: torch.device) -> None:
    assert made(device, "best-model", replace(mixed(9.0, 9.0, 70.0, 80.0, 50.0), way=3))["teacher"] == "conv4-9"


def test_the_best_model_sees_images_normalised_as_in_its_training(device: torch.device) -> None:
    """Exactly, also where the learner's images are normalised otherwise."""
    world = with_accuracies(1.0, 2.0, 3.0)
    odd = replace(world, image=replace(world.image, mean=(0.4,) * 3))
    for method, image in (("best-model", world.cards[2].image), ("random", odd.image)):
        assert learner_weights(odd, made(device, method, odd), steps=1, lr=0.1).image == image
    assert METHODS["best-model"].notes(CONFIG, odd) == []


def test_the_best_model_needs_a_claim_and_episodes_that_fit() -> None:
    assert refusal("best-model", WORLD) == (
        "best-model: no teacher of the pool reports an accuracy; give one with `pool add --accuracy`"
    )
    assert refusal("best-model", mixed(9.0, 10.0, None, None, None)) == (
        "best-model: no teacher that reports an accuracy takes 3x16x16 images and has 2 classes, as the episodes need; "
        "conv4-6 takes 3x32x32 and has 2; use another pool, or a smaller learner.way"
    )
    assert "has 5 classes, as the episodes need; conv4-0 takes 3x16x16 and has 2" in refusal(
        "best-model", replace(with_accuracies(9.0, None, None), way=5)
    )


def test_the_other_baselines_have_nothing_to_note() -> None:
    assert [METHODS[name].notes(METHODS[name].Config(), WORLD) for name in ("random", "average", "ota")] == [[], [], []]


def test_the_best_model_is_read_in_three_ways(toy_pool: Path, toy_data: str) -> None:
    rows = driver_scores("best-model", toy_pool, toy_data)
    assert sorted(rows) == ["best-model-assign", "best-model-direct", "best-model-finetune"]
    assert rows["best-model-assign"].tolist() != rows["best-model-finetune"].tolist()


def test_random_is_independent_of_the_pool(device: torch.device) -> None:
    found = made(device, "random", WORLD)
    other = made(device, "random", small_world(cards=1))
    none = made(device, "random", replace(WORLD, cards=()))
    assert found["theta"].equal(other["theta"])
    assert found["theta"].equal(none["theta"])
    assert not found["theta"].equal(made(device, "random", replace(WORLD, seed=1))["theta"])


def driver_scores(method: str, pool: Path | None, data: str, *more: str) -> dict[str, np.ndarray]:
    """Test accuracies of the last weights, by name, after all rounds in this process."""
    config = toy.config(method, pool, data, *more)
    inputs = driver.read_inputs(config)
    trainer = Trainer(
        config.model_dump(mode="json"), inputs.world, inputs.sets, LocalBackend(inputs.teachers.__getitem__), None
    )
    for r in range(config.method.rounds):
        trainer.round(r)
    return {score.method: score.accuracies for score in toy.scores_of(trainer, "last")}


def test_the_oracle_learns_from_real_images(toy_data: str) -> None:
    """Five ways of separable classes it has never seen: well above the fresh learner on the same episodes."""
    test = ("eval.lr=0.05", "eval.lrs=[]")
    more = ("method.rounds=5", "method.updates_per_round=10", "method.replay.inner_lr=0.05", *test)
    oracle = driver_scores("maml-oracle", None, toy_data, *more, "method.replay.lr=0.01")["maml-oracle"]
    random = driver_scores("random", None, toy_data, *test)["random"]
    assert len(oracle) == len(random) == 20
    spread = np.std(oracle - random, ddof=1) / np.sqrt(20)
    assert (oracle - random).mean() > 2 * spread
    assert oracle.mean() > 60.0
