"""A round of FREE: its plan, and what it does to generator, bank and learner."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ray_dfml.core import seeds
from ray_dfml.methods import replay
from ray_dfml.methods.base import Metrics, State, World, image_values, initial_learner
from ray_dfml.methods.free import bell
from ray_dfml.methods.free import method as free
from ray_dfml.types import Arrays, Job
from tests.support import (
    FakeShard,
    alike,
    image_numbers,
    mixed_world,
    play,
    rounding,
    same,
    small_config,
    small_world,
    unique_images,
)

WORLD = small_world()


def fake_task(teacher: str, *, grad: float = 0.0, images: np.ndarray | None = None) -> Arrays:
    """A recovered task of 4 images of 2 classes, with a constant meta-gradient."""
    size = free.generator(WORLD.image.shape, 8, 4).layout.numel
    numbers = dict.fromkeys(("loss_first", "loss_last", "ce", "accuracy", "spread"), 1.0)
    return numbers | {
        "teacher": teacher,
        "classes": next(card.classes for card in WORLD.cards if card.id == teacher),
        "images": unique_images(4, WORLD.image.shape) if images is None else images,
        "labels": np.array([0, 1, 0, 1]),
        "view": (4, 4, False),
        "logits": np.zeros((4, 2), np.float32),
        "grad": np.full(size, grad, np.float32),
    }


def learn(device: torch.device, cfg: free.Config, state: State, tasks: list[Arrays], r: int) -> State:
    return free.learn(cfg, WORLD, state, r, tasks, FakeShard(WORLD, device=device).send)[0]


def test_a_plan_is_a_function_of_seed_and_round():
    cfg = small_config(teachers_per_round=4)
    state = free.init(cfg, WORLD)
    one, same_round = (free.plan(cfg, WORLD, state, 3) for _ in range(2))
    assert one == same_round
    assert one != free.plan(cfg, WORLD, state, 4)
    assert one != free.plan(cfg, small_world(seed=1), state, 3)


def test_a_plan_has_one_job_per_teacher_drawn_with_its_own_seed():
    cfg = small_config(teachers_per_round=4)
    jobs = free.plan(cfg, WORLD, free.init(cfg, WORLD), 3)
    assert [job.index for job in jobs] == [0, 1, 2, 3]
    assert [job.seed for job in jobs] == [seeds.derive(0, 3, "recover", j) for j in range(4)]
    assert {job.teacher for job in jobs} <= {card.id for card in WORLD.cards}


def test_teachers_are_drawn_uniformly_and_with_replacement():
    cfg = small_config(teachers_per_round=4)
    plans = [[job.teacher for job in free.plan(cfg, WORLD, {}, r)] for r in range(150)]
    counts = [sum(plan.count(card.id) for plan in plans) for card in WORLD.cards]
    assert sum(counts) == 600
    assert all(150 < count < 250 for count in counts)  # mean 200, standard deviation 11.5
    assert any(len(set(plan)) < 4 for plan in plans)


def test_in_turns_no_teacher_comes_twice_before_all_came_once():
    """Rounds of two and of four teachers of a pool of three: whole cycles, in orders that differ."""
    for count in (2, 4):
        cfg = small_config(teachers_per_round=count, draws="turns")
        visits = [job.teacher for r in range(12) for job in free.plan(cfg, WORLD, {}, r)]
        cycles = [tuple(visits[i : i + 3]) for i in range(0, len(visits), 3)]
        assert {frozenset(cycle) for cycle in cycles} == {frozenset(card.id for card in WORLD.cards)}
        assert len(set(cycles)) > 2
        assert visits != [job.teacher for r in range(12) for job in free.plan(cfg, small_world(seed=1), {}, r)]
    jobs = free.plan(cfg, WORLD, {}, 3)
    assert jobs == free.plan(cfg, WORLD, {}, 3)
    assert [job.seed for job in jobs] == [seeds.derive(0, 3, "recover", j) for j in range(4)]


def test_turns_go_on_without_a_rejected_teacher():
    cfg, left = small_config(teachers_per_round=4, draws="turns"), replace(WORLD, cards=WORLD.cards[1:])
    visits = [job.teacher for r in range(5) for job in free.plan(cfg, left, {}, r)]
    assert [visits.count(card.id) for card in left.cards] == [10, 10]


def test_a_sequential_generator_goes_through_the_same_teachers_one_by_one(device: torch.device):
    meta, sequential = (small_config(teachers_per_round=3, generator_sharing=s) for s in ("meta", "sequential"))
    assert free.plan(sequential, WORLD, {}, 5) == []
    shard = FakeShard(WORLD, device=device)
    play("free", sequential, WORLD, first=5, shard=shard, device=device)
    sent = [jobs for op, jobs in shard.sent if op == "free.recover"]
    assert [[replace(job, index=0)] for job in free.plan(meta, WORLD, {}, 5)] == sent


def test_the_learner_judges_images_only_after_the_warm_up():
    cfg = small_config(warmup=2)
    state = free.init(cfg, WORLD)
    assert [free.shared(cfg, WORLD, state, r)["theta"] is None for r in range(4)] == [True, True, False, False]


def test_warm_up_trains_the_generator_only(device: torch.device):
    before, after, metrics = play("free", small_config(warmup=3), WORLD, rounds=3, first=0, device=device)
    assert not torch.equal(after["theta_g"], before["theta_g"])
    for name in ("theta", "stats", "adam", "adam_bell", "bank", "updates"):
        assert same(after[name], before[name]), name
    assert after["adam_g"]["step"] == 3
    assert not any(name.startswith(("bell", "replay", "bank")) for name in metrics)


def test_a_round_trains_generator_and_learner_and_fills_the_bank(device: torch.device):
    before, after, metrics = play("free", small_config(), WORLD, device=device)
    for name in ("theta", "theta_g", "stats"):
        assert not torch.equal(after[name], before[name]), name
    assert 1 <= after["updates"] == metrics["replay/updates"] <= 2
    assert after["adam_bell"]["step"] == 1
    assert metrics["bank/images"] == 2 * 2 * 4
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_state_before_a_round_is_left_untouched(device: torch.device):
    cfg = small_config()
    pristine = free.init(cfg, WORLD)
    before, _, _ = play("free", cfg, WORLD, rounds=2, device=device)
    assert same(before, pristine)


def test_rounds_are_reproducible_bit_for_bit_and_differ_by_seed(device: torch.device):
    cfg = small_config()
    one, again, other = (play("free", cfg, small_world(seed=seed), rounds=2, device=device)[1] for seed in (0, 0, 1))
    assert alike(one, again, device)
    assert not torch.equal(one["theta"], other["theta"])


@pytest.mark.parametrize(("adds", "tasks"), [("all", 2), ("last", 1)])
def test_all_tasks_of_a_round_or_the_last_one_enter_the_bank(device: torch.device, adds, tasks):
    _, after, _ = play("free", small_config(bank_adds=adds, teachers_per_round=2), WORLD, device=device)
    assert sum(len(images) for images in after["bank"].values()) == tasks * 2 * 4


@pytest.mark.parametrize(
    ("adds", "expected"),
    [
        ("all", {"toy/0": [0, 2], "toy/1": [1, 3, 100, 102], "toy/2": [101, 103]}),
        ("last", {"toy/1": [100, 102], "toy/2": [101, 103]}),
    ],
)
def test_images_enter_the_bank_under_the_class_name_of_their_label(device: torch.device, adds, expected):
    short = {"shot": 1, "query": 1, "tasks": 1, "inner_steps": 0, "max_updates": 1}
    cfg = small_config(bank_adds=adds, replay=short)
    first, second = (unique_images(4, WORLD.image.shape, first=n) for n in (0, 100))
    tasks = [fake_task("conv4-0", images=first), fake_task("conv4-1", images=second)]
    bank = learn(device, cfg, free.init(cfg, WORLD), tasks, 1)["bank"]
    assert {key: image_numbers(images) for key, images in bank.items()} == expected


def test_without_class_names_bank_classes_are_units_of_teachers(device: torch.device):
    cfg = small_config(
        bank_key="teacher", replay={"shot": 1, "query": 1, "tasks": 1, "inner_steps": 0, "max_updates": 1}
    )
    bank = learn(device, cfg, free.init(cfg, WORLD), [fake_task("conv4-0"), fake_task("conv4-1")], 1)["bank"]
    assert {key: image_numbers(images) for key, images in bank.items()} == {
        "toy/0#conv4-0": [0, 2], "toy/1#conv4-0": [1, 3], "toy/1#conv4-1": [0, 2], "toy/2#conv4-1": [1, 3],
    }  # fmt: skip


def test_the_bank_never_exceeds_its_capacity(device: torch.device):
    _, after, metrics = play("free", small_config(bank_capacity=5), WORLD, rounds=4, device=device)
    counts = [len(images) for images in after["bank"].values()]
    assert max(counts) == 5
    assert metrics["bank/images"] == sum(counts)


@pytest.mark.parametrize(("reduction", "grad"), [("mean", 2.0), ("sum", 4.0)])
def test_plain_meta_steps_follow_the_reduced_gradient(device: torch.device, reduction, grad):
    cfg = small_config(meta_optimizer="sgd", meta_reduction=reduction, lr_meta=0.5)
    state = free.init(cfg, WORLD)
    new = learn(device, cfg, state, [fake_task("conv4-0", grad=1.0), fake_task("conv4-1", grad=3.0)], 0)
    torch.testing.assert_close(new["theta_g"], state["theta_g"] - 0.5 * grad)
    assert same(new["adam_g"], state["adam_g"])


def test_the_persistent_meta_optimiser_equals_the_framework_and_the_fresh_one_steps_by_sign(device: torch.device):
    gradients = [1.0, -0.1, 0.3]
    ends = {}
    for kind in ("adam", "adam-fresh"):
        cfg = small_config(meta_optimizer=kind, lr_meta=0.01, warmup=10)
        state = start = free.init(cfg, WORLD)
        for r, g in enumerate(gradients):
            state = learn(device, cfg, state, [fake_task("conv4-0", grad=g)], r)
        ends[kind] = (state["theta_g"] - start["theta_g"]).mean().item()
    reference = torch.zeros(1, requires_grad=True)
    theirs = torch.optim.Adam([reference], lr=0.01, betas=(0.5, 0.999))
    for g in gradients:
        reference.grad = torch.tensor([g])
        theirs.step()
    assert ends["adam"] == pytest.approx(reference.item(), rel=1e-3)
    assert ends["adam-fresh"] == pytest.approx(-0.01 * sum(np.sign(gradients)), rel=1e-3)


def test_a_sequential_generator_replaces_the_meta_generator(device: torch.device):
    cfg = small_config(generator_sharing="sequential", warmup=5)
    state, shard = free.init(cfg, WORLD), FakeShard(WORLD, device=device)
    new, _ = free.learn(cfg, WORLD, state, 0, [], shard.send)
    assert [op for op, _ in shard.sent] == ["free.recover"] * cfg.teachers_per_round
    assert not torch.equal(new["theta_g"], state["theta_g"])
    assert same(new["adam_g"], state["adam_g"])


def test_without_distillation_only_replay_trains_the_learner(device: torch.device):
    before, after, metrics = play("free", small_config(learner_update="none"), WORLD, device=device)
    assert same(after["adam_bell"], before["adam_bell"])
    assert after["updates"] >= 1
    assert not any(name.startswith("bell") for name in metrics)


def test_the_learner_distils_what_the_teacher_saw(device: torch.device, monkeypatch):
    """The stored bytes under the stored view give the teacher the logits it is distilled with."""
    cfg, seen = small_config(), []
    original = bell.update

    def spy(
        cfg: free.Config, world: World, state: State, tasks: list[bell.DistillSet], r: int
    ) -> tuple[State, Metrics]:
        seen.extend(tasks)
        return original(cfg, world, state, tasks, r)

    monkeypatch.setattr(bell, "update", spy)
    play("free", cfg, WORLD, device=device)
    shard, jobs = FakeShard(WORLD, device=device), free.plan(cfg, WORLD, {}, 1)
    assert len(seen) == len(jobs) == 2
    for task, job in zip(seen, jobs, strict=True):
        teacher = shard.teacher(str(job.teacher))
        logits = teacher.net(teacher.theta, task.images.to(device), teacher.stats)
        torch.testing.assert_close(logits.cpu(), task.logits, **rounding(device))
        assert task.labels.tolist() == [0, 1] * 4


def test_a_state_holds_plain_values_only(device: torch.device):
    _, after, _ = play("free", small_config(), WORLD, device=device)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for inner in value.values():
                check(inner)
        else:
            assert isinstance(value, (torch.Tensor, np.ndarray, int, float, str))
            assert not getattr(value, "requires_grad", False)

    check(after)


def test_the_initial_state_follows_the_seed():
    cfg = small_config()
    one, again, other = (free.init(cfg, small_world(seed=seed)) for seed in (0, 0, 1))
    assert same(one, again)
    assert not torch.equal(one["theta"], other["theta"])
    assert not torch.equal(one["theta_g"], other["theta_g"])
    assert one["bank"] == {}
    silent = initial_learner(WORLD, zero_head_bias=True)["theta"]
    assert torch.equal(WORLD.net.layout.unflatten(silent)["head.bias"], torch.zeros(2))


def test_image_values_are_shippable():
    values = image_values(WORLD.image)
    assert values["shape"] == (3, 16, 16)
    assert values["mean"].tolist() == [0.5] * 3
    assert values["std"].dtype == np.float32


def test_defaults_are_the_recommended_profile():
    cfg = free.Config.model_validate({})
    found = (
        cfg.warmup,
        cfg.teachers_per_round,
        cfg.steps,
        cfg.images_per_class,
        cfg.latent,
        cfg.lr_meta,
        cfg.final_pass,
    )
    assert found == (19, 4, 5, 20, 256, 1e-3, True)
    assert (cfg.bank_capacity, cfg.bank_adds, cfg.bell_scale, cfg.adversarial_form) == (400, "all", 1.0, "kl")
    assert (cfg.replay.tasks, cfg.replay.patience, cfg.replay.inner_steps, cfg.replay.reduction) == (10, 10, 5, "mean")


def test_configurations_are_frozen_and_refuse_unknown_keys():
    with pytest.raises(ValidationError, match="extra_forbidden"):
        free.Config.model_validate({"step": 3})
    with pytest.raises(ValidationError, match="extra_forbidden"):
        free.Config.model_validate({"replay": {"shots": 3}})
    with pytest.raises(ValidationError, match="frozen"):
        free.Config.model_validate({}).steps = 3


def test_replay_waits_until_the_bank_has_enough_classes(device: torch.device):
    cfg = small_config(learner_update="none", replay={"shot": 2, "query": 2, "tasks": 1, "max_updates": 1})
    before, shard = free.init(cfg, WORLD), FakeShard(WORLD, device=device)
    after, metrics = free.learn(cfg, WORLD, before, 1, [fake_task("conv4-0")], shard.send)
    assert torch.equal(after["theta"], before["theta"])
    assert (metrics["bank/classes"], metrics["bank/missing_classes"], metrics["replay/updates"]) == (0, 4, 0)
    assert shard.sent == []
    with pytest.raises(ValueError, match="needs 2 classes of one group with 4 images or more; the bank has 0 in all"):
        replay.draw(cfg.replay, WORLD, after["bank"], (1,))


@pytest.mark.parametrize("sharing", ["meta", "sequential"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_teacher_of_bad_weights_is_rejected_alone(device: torch.device, sharing, batched):
    cfg, shard = (
        small_config(generator_sharing=sharing, teachers_per_round=6),
        FakeShard(WORLD, batched=batched, device=device),
    )
    shard.spoil("conv4-1")
    del shard.teachers["conv4-2"]
    state = free.init(cfg, WORLD)
    jobs = free.plan(small_config(teachers_per_round=6), WORLD, state, 1)
    drawn = [job.teacher for job in jobs]
    assert set(drawn) == {"conv4-0", "conv4-1", "conv4-2"}
    results = free.recover(shard, jobs, free.shared(cfg, WORLD, state, 1))
    why = {"conv4-1": "the inversion loss is not finite", "conv4-2": "conv4-2: unreadable"}
    for teacher, result in zip(drawn, results, strict=True):
        assert result == {"rejected": why[teacher]} if teacher in why else result["teacher"] == teacher
    tasks = [result for result in results if "rejected" not in result] if sharing == "meta" else []
    after, metrics = free.learn(cfg, WORLD, state, 1, tasks, shard.send)
    assert metrics["recover/tasks"] == drawn.count("conv4-0")
    assert torch.isfinite(after["theta_g"]).all()
    assert torch.isfinite(after["theta"]).all()


def test_a_round_of_rejected_teachers_changes_nothing(device: torch.device):
    cfg = small_config()
    state = free.init(cfg, WORLD)
    after, metrics = free.learn(cfg, WORLD, state, 1, [], FakeShard(WORLD, device=device).send)
    assert same(after, state)
    assert metrics == {"recover/tasks": 0}


@pytest.mark.parametrize("sharing", ["meta", "sequential"])
def test_a_round_on_a_mixed_pool(device: torch.device, sharing):
    """Whatever the teacher's size, the bank holds images of the learner's; of the grey one, grey."""
    world, cfg = mixed_world(), small_config(generator_sharing=sharing, teachers_per_round=4, bank_key="teacher")
    shard, state, tasks = FakeShard(world, device=device), free.init(cfg, world), []

    def send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        found = shard.send(op, jobs, shared)
        tasks.extend(found if op == "free.recover" else [])
        return found

    results = send("free.recover", free.plan(cfg, world, state, 1), free.shared(cfg, world, state, 1))
    found = free.learn(cfg, world, state, 1, results, send)
    after, metrics = found[0], {name: float(value or 0) for name, value in found[1].items()}
    known = {c.id: c.classes for c in world.cards}
    assert {task["teacher"] for task in tasks} == {"grey", "colour"}
    for task in tasks:
        assert len(set(task["classes"])) == 2
        assert set(task["classes"]) <= set(known[task["teacher"]])
        assert task["logits"].shape == (8, 2)
    for name, images in after["bank"].items():
        assert images.shape[1:] == (3, 20, 20)
        assert bool((images == images[:, :1]).all()) == name.endswith("#grey")
    assert {name.split("#")[1] for name in after["bank"]} == {"grey", "colour"}
    assert metrics["replay/updates"] >= 1
    assert all(np.isfinite(value) for value in metrics.values())
    assert not torch.equal(after["theta"], state["theta"])
