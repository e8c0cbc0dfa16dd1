"""Rounds of BiDf-MKD: its plan, its first update, the bank, the replay, and mixed pools."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ray_dfml.core import optim, seeds
from ray_dfml.methods import replay
from ray_dfml.methods.base import State
from ray_dfml.methods.bidf import distillation
from ray_dfml.methods.bidf import method as bidf
from tests.methods.test_bidf import WORLD, recover
from tests.support import FakeShard, card, mixed_world, play, same, small_bidf, small_world


def test_a_plan_draws_teachers_with_replacement_and_seeds_jobs():
    cfg = small_bidf(teachers_per_round=4)
    plans = [bidf.plan(cfg, WORLD, {}, r) for r in range(100)]
    assert [job.seed for job in plans[3]] == [seeds.derive(0, 3, "recover", j) for j in range(4)]
    assert same([job.values for job in plans[3]], [{}] * 4)
    drawn = [[job.teacher for job in plan] for plan in plans]
    assert drawn == [[job.teacher for job in bidf.plan(cfg, WORLD, {}, r)] for r in range(100)]
    assert all(100 < sum(one.count(c.id) for one in drawn) < 166 for c in WORLD.cards)  # mean 133, deviation 9
    assert any(len(set(one)) < 3 for one in drawn)


def sends(device: torch.device, cfg: bidf.Config, *, rounds: int = 1) -> tuple[list[tuple[str, int]], State, State]:
    shard = FakeShard(WORLD, device=device)
    before, after, _ = play("bidf-mkd", cfg, WORLD, rounds=rounds, shard=shard, device=device)
    return [(op, len(jobs)) for op, jobs in shard.sent], before, after


@pytest.mark.parametrize(("teachers", "every", "expected"), [
    (2, 3, [("bidf.grad", 2), ("maml.grad", 1), ("maml.grad", 3), ("maml.grad", 3)]),
    (2, 1, [("bidf.grad", 2), ("maml.grad", 1)]),
    (3, 2, [("bidf.grad", 3), ("maml.grad", 3)]),
    (4, 1, [("bidf.grad", 4)]),
])  # fmt: skip
def test_the_first_update_holds_the_distillations_and_the_rest_is_replay(device, teachers, every, expected):
    sent, _, after = sends(device, small_bidf(teachers_per_round=teachers, generate_every=every))
    assert sent == [("bidf-mkd.recover", teachers), *expected]
    assert after["updates"] == after["adam"]["step"] == every


def test_a_round_may_last_until_a_plateau(device):
    bout = {"shot": 1, "query": 2, "tasks": 2, "inner_steps": 0, "patience": 2, "max_updates": 30}
    sent, _, after = sends(device, small_bidf(generate_every=0, replay=bout))
    assert 3 <= after["updates"] < 31
    short, _, capped = sends(device, small_bidf(generate_every=0, replay=bout | {"patience": 9, "max_updates": 4}))
    assert capped["updates"] == 5
    assert len(sent) - len(short) == after["updates"] - 5


def test_the_first_update_is_a_step_on_the_mean_gradient_of_both_kinds(device):
    cfg, shard = small_bidf(generate_every=1), FakeShard(WORLD, device=device)
    state = bidf.init(cfg, WORLD)
    results = shard.send("bidf-mkd.recover", bidf.plan(cfg, WORLD, state, 1), bidf.shared(cfg, WORLD, state, 1))
    after, metrics = bidf.learn(cfg, WORLD, state, 1, results, shard.send)
    own = distillation.grad(shard, shard.sent[1][1], bidf.shared(cfg, WORLD, state, 1))
    replayed = replay.grad(shard, shard.sent[2][1], replay.shared_values(cfg.replay, WORLD, state))
    mean = torch.stack([torch.tensor(one["grad"]) for one in (*replayed, *own)]).mean(0)
    assert min(float(torch.tensor(one["grad"]).norm()) for one in (*replayed, *own)) > 1e-4
    expected, _ = optim.adam_step(state["theta"], mean, optim.Adam.zeros(mean), lr=cfg.replay.lr)
    torch.testing.assert_close(after["theta"], expected)
    assert metrics["distill/loss"] == pytest.approx(sum(one["loss"] for one in own) / 2)
    assert metrics["distill/agreement"] == pytest.approx(50 * sum(one["accuracy"] for one in own))


def test_the_bank_holds_both_sets_under_their_class_names(device):
    cfg, shard = small_bidf(), FakeShard(WORLD, device=device)
    state = bidf.init(cfg, WORLD)
    results = recover(device, cfg)[:2]
    after, metrics = bidf.learn(cfg, WORLD, state, 0, results, shard.send)
    one, two = results
    parts = [one["support"], one["query"], two["support"], two["query"]]
    expected = np.concatenate([part["images"][part["labels"] == part["classes"].index("toy/1")] for part in parts])
    assert np.array_equal(after["bank"]["toy/1"], expected)
    assert {name: len(images) for name, images in after["bank"].items()} == {"toy/0": 8, "toy/1": 16, "toy/2": 8}
    assert (metrics["bank/images"], metrics["bank/missing_classes"]) == (32, 1)
    assert state["bank"] == {}
    units = bidf.learn(small_bidf(bank_key="teacher", bank_capacity=5), WORLD, state, 0, results, shard.send)[0]["bank"]
    assert sorted(units) == ["toy/0#conv4-0", "toy/1#conv4-0", "toy/1#conv4-1", "toy/2#conv4-1"]
    assert {len(images) for images in units.values()} == {5}


def test_without_enough_images_a_round_is_its_distillations(device):
    cfg = small_bidf(replay={"shot": 3, "query": 6, "tasks": 3, "inner_steps": 0})
    sent, before, after = sends(device, cfg)
    assert [op for op, _ in sent] == ["bidf-mkd.recover", "bidf.grad"]
    assert after["updates"] == 1
    assert not torch.equal(after["theta"], before["theta"])
    _, _, metrics = play("bidf-mkd", cfg, WORLD, device=device)
    assert (metrics["bank/classes"], metrics["bank/missing_classes"], metrics["replay/updates"]) == (0, 4, 1)
    with pytest.raises(ValueError, match="needs 2 classes of one group with 9 images or more; the bank has 0 in all"):
        replay.draw(cfg.replay, WORLD, after["bank"], (0,))


def test_a_round_on_a_mixed_pool(device):
    world, cfg = mixed_world(), small_bidf(replay={"shot": 1, "query": 2, "tasks": 2, "inner_steps": 1})
    for result, given in zip(recover(device, cfg, world), world.cards, strict=True):
        for task in result.values():
            assert task["images"].shape == (8, 3, 20, 20)
            grey = (task["images"] == task["images"][:, :1]).all()
            assert bool(grey) == (given.image.channels == 1)
            assert len(set(task["classes"])) == 2
            assert set(task["classes"]) <= set(given.classes)
    _, after, metrics = play("bidf-mkd", cfg, world, rounds=2, device=device)
    assert after["updates"] == 6
    assert all(np.isfinite(value) for value in metrics.values())


def test_support_and_query_ask_a_larger_teacher_for_the_same_classes(device):
    world = replace(WORLD, cards=tuple(card(i, way=6) for i in range(3)))
    for result in recover(device, small_bidf(iterations=1), world):
        assert result["support"]["classes"] == result["query"]["classes"]


def test_rounds_leave_their_state_untouched_and_are_reproducible(device):
    cfg = small_bidf()
    pristine, (before, after, _) = bidf.init(cfg, WORLD), play("bidf-mkd", cfg, WORLD, rounds=2, device=device)
    assert same(before, pristine)
    if device.type == "cpu":  # elsewhere sums have no fixed order, and an inversion makes much of rounding
        assert same(after, play("bidf-mkd", cfg, WORLD, rounds=2, device=device)[1])
    assert not torch.equal(
        after["theta"], play("bidf-mkd", cfg, small_world(seed=1), rounds=2, device=device)[1]["theta"]
    )
