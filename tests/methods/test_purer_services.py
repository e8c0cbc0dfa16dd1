"""PURER where teachers give no weights: services are distilled first, and their surrogates are inverted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods import METHODS
from ray_dfml.methods.base import World
from ray_dfml.methods.purer import eci
from ray_dfml.methods.purer import method as purer
from tests.methods.test_surrogates import MIXED, NoWeights, world_of
from tests.support import play, same, small_purer, small_world

pytestmark = pytest.mark.usefixtures("short_surrogates")


def small(budget: int = 500, **changes: Any) -> purer.Config:
    """Two rounds of PURER after two of distillation."""
    return small_purer(rounds=2, image_warmup=0, surrogate={"budget": budget, "student": "mlp"}, **changes)


def run(cfg: purer.Config, world: World, rounds: int) -> tuple[NoWeights, dict[str, Any], dict[str, Any]]:
    """The shard, the last state and the last metrics after the first rounds of a run."""
    shard = NoWeights(world)
    _, state, metrics = play("purer", cfg, world, rounds=rounds, first=0, shard=shard)
    return shard, state, metrics


def test_surrogates_are_inverted_and_nothing_is_asked_beyond_the_budget() -> None:
    """`NoWeights` refuses the weights of a service."""
    world, cfg = world_of(*MIXED), small()
    assert cfg.total_rounds == 4
    shard, state, metrics = run(cfg, world, 4)
    assert set(state["surrogates"]) == {"conv4-1", "conv4-2"}
    assert "students" not in state
    assert metrics["recover/tasks"] == 3
    asked = {id: service.asked for id, service in shard.services.items()}
    assert asked == {"conv4-1": 500, "conv4-2": 500} == METHODS["purer"].queries(cfg, world)
    begun = purer.init(cfg, world)["images"]
    assert all(not torch.equal(state["images"][card.id]["x"], begun[card.id]["x"]) for card in world.cards)
    assert state["updates"] == 2 * cfg.updates


def test_a_surrogate_is_inverted_as_a_teacher_of_its_weights_would_be() -> None:
    world, cfg = world_of("label"), small()
    shard, state, _ = run(cfg, world, 2)
    jobs = purer.plan(cfg, world, state, 2)
    (found,) = purer.recover(shard, jobs, purer.shared(cfg, world, state, 2))
    known = state["surrogates"]["conv4-0"]
    own = replace(shard.teachers["conv4-0"], card=replace(world.cards[0], arch=known["arch"]), theta=known["theta"],
                  stats=known["stats"], net=purer.surrogates.Surrogate(
                      replace(world.cards[0], arch=known["arch"]), known["theta"], known["stats"]).net)  # fmt: skip
    (expected,) = eci.invert(cfg, [own], jobs, device=shard.device, batched=False)
    assert np.array_equal(found["x"], expected["x"])


def test_equal_runs_have_equal_bits_and_the_distillation_leaves_the_learner_alone() -> None:
    world, cfg = world_of(*MIXED), small()
    _, state, _ = run(cfg, world, 3)
    _, again, _ = run(cfg, world, 3)
    assert same(state, again)
    _, early, _ = run(cfg, world, 2)
    assert torch.equal(early["theta"], purer.init(cfg, world)["theta"])


def test_without_a_budget_services_are_left_out_and_the_run_says_so() -> None:
    world, cfg = world_of(*MIXED), small(0)
    state = purer.init(cfg, world)
    assert [job.teacher for job in purer.plan(cfg, world, state, 0)] == ["conv4-0"]
    assert "purer: 2 of 3 teachers give no weights and are left out: conv4-1 gives probs" in purer.notes(cfg, world)[0]
    assert METHODS["purer"].queries(cfg, world) == {}
    with pytest.raises(UsageError, match=r"purer: no teacher gives its weights .* method.surrogate.budget=1500"):
        purer.init(cfg, world_of("label"))
    with pytest.raises(UsageError, match=r"purer: method.surrogate.budget is set, but every teacher gives its weights"):
        purer.init(small(), small_world())


def test_a_service_that_was_away_when_the_others_were_distilled_is_not_inverted() -> None:
    world, cfg = world_of("label", "label"), small()
    _, state, _ = run(cfg, world, 2)
    left = state | {"surrogates": {"conv4-1": state["surrogates"]["conv4-1"]}}
    assert [job.teacher for job in purer.plan(cfg, world, left, 2)] == ["conv4-1"]
    with pytest.raises(RejectedError, match="purer: no teacher has weights or a surrogate"):
        purer.plan(cfg, world, state | {"surrogates": {}}, 2)
