"""The baselines: the mean of weights, the best teacher, the fresh learner, and the ceiling on real images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_dfml.errors import UsageError
from ray_dfml.methods import METHODS, baselines
from ray_dfml.methods.base import MethodConfig, World
from ray_dfml.pipeline import Trainer
from ray_dfml.runtime import driver
from ray_dfml.runtime.local import LocalBackend
from ray_dfml.types import Arrays, Job
from tests.runtime import toy
from tests.support import FakeWorker, card, small_world

WORLD = small_world()
CONFIG = MethodConfig()


def made(method: str, world: World) -> dict[str, torch.Tensor]:
    """The state after the method's one round."""
    worker = FakeWorker(world)

    def send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        assert op == "weights"
        return baselines.weights(worker, jobs, shared)

    state = METHODS[method].init(CONFIG, world)
    assert METHODS[method].plan(CONFIG, world, state, 0) == []
    assert METHODS[method].shared(CONFIG, world, state, 0) == {}
    found, metrics = METHODS[method].learn(CONFIG, world, state, 0, [], send)
    assert metrics == {}
    return found


def with_accuracies(*accuracies: float | None) -> World:
    return replace(WORLD, cards=tuple(replace(c, accuracy=a) for c, a in zip(WORLD.cards, accuracies, strict=True)))


def test_the_average_is_the_mean_of_weights_and_statistics() -> None:
    world = small_world(cards=2)
    a, b = (FakeWorker(world).teacher(c.id) for c in world.cards)
    found = made("average", world)
    torch.testing.assert_close(found["theta"], (a.theta + b.theta) / 2, rtol=0, atol=1e-7)
    torch.testing.assert_close(found["stats"], (a.stats + b.stats) / 2, rtol=1e-6, atol=1e-7)


def test_the_average_of_one_teacher_is_that_teacher() -> None:
    world = small_world(cards=1)
    assert made("average", world)["theta"].equal(FakeWorker(world).teacher("conv4-0").theta)


@pytest.mark.parametrize("odd", [card(9, way=2, arch="resnet10"), card(9, way=3)])
def test_the_average_refuses_what_has_no_mean(odd: object) -> None:
    world = replace(WORLD, cards=(*WORLD.cards, odd))  # type: ignore[arg-type]
    state = METHODS["average"].init(CONFIG, world)
    with pytest.raises(UsageError, match=r"one architecture and number of classes, conv4 with 2; .*-9 is"):
        METHODS["average"].learn(CONFIG, world, state, 0, [], lambda *_: pytest.fail("nothing may be sent"))


@pytest.mark.parametrize(
    ("accuracies", "best"), [((70.0, 90.0, 80.0), 1), ((None, 10.0, None), 1), ((0.0, None, None), 0), ((5, 5, 5), 2)]
)
def test_the_best_model_has_the_highest_reported_accuracy(accuracies: tuple[float | None, ...], best: int) -> None:
    """The last by id among equals, so that the choice does not depend on the order of the pool."""
    world = with_accuracies(*accuracies)
    found = made("best-model", world)
    teacher = FakeWorker(world).teacher(WORLD.cards[best].id)
    assert found["theta"].equal(teacher.theta)
    assert found["stats"].equal(teacher.stats)
    assert (found["teacher"], found["arch"], found["outputs"]) == (WORLD.cards[best].id, "conv4", 2)
    backwards = made("best-model", replace(world, cards=world.cards[::-1]))
    assert backwards["teacher"] == found["teacher"]


def test_the_best_model_may_be_of_another_architecture() -> None:
    world = replace(
        WORLD, cards=(replace(WORLD.cards[0], accuracy=1.0), replace(card(7, arch="resnet10"), accuracy=2.0))
    )
    found = made("best-model", world)
    assert (found["arch"], found["teacher"]) == ("resnet10", "resnet10-7")
    assert len(found["theta"]) != WORLD.net.layout.numel


def test_the_best_model_needs_a_claim_and_enough_classes() -> None:
    with pytest.raises(UsageError, match="no teacher of the pool reports an accuracy"):
        made("best-model", WORLD)
    with pytest.raises(UsageError, match="conv4-0 has 2 classes, episodes need 5"):
        made("best-model", replace(with_accuracies(9.0, None, None), way=5))


def test_the_best_model_is_read_in_three_ways(toy_pool: Path, toy_data: str) -> None:
    rows = driver_scores("best-model", toy_pool, toy_data)
    assert sorted(rows) == ["best-model-assign", "best-model-direct", "best-model-finetune"]
    assert rows["best-model-assign"].tolist() != rows["best-model-finetune"].tolist()


def test_random_is_independent_of_the_pool() -> None:
    found = made("random", WORLD)
    other = made("random", small_world(cards=1))
    none = made("random", replace(WORLD, cards=()))
    assert found["theta"].equal(other["theta"])
    assert found["theta"].equal(none["theta"])
    assert not found["theta"].equal(made("random", replace(WORLD, seed=1))["theta"])


def driver_scores(method: str, pool: Path | None, data: str, *more: str) -> dict[str, np.ndarray]:
    """Test accuracies of the last weights, by name, after all rounds in this process."""
    config = toy.config(method, pool, data, *more)
    inputs = driver.read_inputs(config)
    trainer = Trainer(
        config.model_dump(mode="json"), inputs.world, inputs.sets, LocalBackend(inputs.teachers.__getitem__), None
    )
    for r in range(config.method.rounds):
        trainer.round(r)
    return {score.method: score.accuracies for score in trainer.test("last")}


def test_the_oracle_learns_from_real_images(toy_data: str) -> None:
    """Five ways of separable classes it has never seen: well above the fresh learner on the same episodes."""
    more = ("method.rounds=5", "method.updates_per_round=10", "method.replay.inner_lr=0.05", "eval.lr=0.05")
    oracle = driver_scores("maml-oracle", None, toy_data, *more, "method.replay.lr=0.01")["maml-oracle"]
    random = driver_scores("random", None, toy_data, "eval.lr=0.05")["random"]
    assert len(oracle) == len(random) == 20
    spread = np.std(oracle - random, ddof=1) / np.sqrt(20)
    assert (oracle - random).mean() > 2 * spread
    assert oracle.mean() > 60.0
