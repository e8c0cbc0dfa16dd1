"""A round of PURER: what moves when, from whose images tasks are drawn, and when the curriculum is due."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.core import seeds
from ray_dfml.core.images import normalise
from ray_dfml.core.inner_loop import Task, graph_grad, query_loss
from ray_dfml.core.sources.warp import augment
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods.base import State, World
from ray_dfml.methods.purer import method as purer
from tests.support import FakeShard, alike, card, mixed_world, play, same, small_purer, small_world

WORLD = small_world()
DUE: dict[str, Any] = {"curriculum_after": 2, "curriculum_patience": 1000}
"""The switch is first due at the end of the first round of two updates, and then not for long."""


def painted(world: World, state: State) -> State:
    """The state with images whose value tells teacher and row: 100 i + row, in the learner's space where they agree."""
    found = {}
    for i, c in enumerate(world.cards):
        own = state["images"][c.id]
        rows = torch.arange(len(own["x"]), dtype=torch.float32)
        found[c.id] = {**own, "x": (100.0 * i + rows)[:, None, None, None].expand_as(own["x"]).clone()}
    return {**state, "images": found}


def drawn(
    device: torch.device, cfg: purer.Config, world: World, rounds: int = 6
) -> list[dict[str, list[list[tuple[int, int]]]]]:
    """(teacher, row) of the support and query of each pseudo task, one list per label."""
    tasks, shard = [], FakeShard(world, device=device)
    state = painted(world, purer.init(cfg, world))
    for r in range(1, 1 + rounds):
        purer.learn(cfg, world, state, r, [], shard.send)
    for op, jobs in shard.sent:
        assert op == "maml.grad"
        for job in jobs:
            numbers = {k: np.round(v[:, 0, 0, 0]).astype(int) for k, v in job.values.items()}
            tasks.append(
                {
                    k: [[(n // 100, n % 100) for n in v[c :: world.way]] for c in range(world.way)]
                    for k, v in numbers.items()
                }
            )
    return tasks


def test_images_start_as_standard_normal_noise_of_each_teacher():
    world = mixed_world()
    state = purer.init(small_purer(images_per_class=40), world)
    assert [tuple(state["images"][c.id]["x"].shape) for c in world.cards] == [(80, 1, 16, 16), (120, 3, 20, 20)]
    for own in state["images"].values():
        assert own["x"].mean().item() == pytest.approx(0, abs=0.03)
        assert own["x"].std().item() == pytest.approx(1, abs=0.02)
        assert own["step"] == own["m"].abs().max() == own["v"].abs().max() == 0
    one, again, other = (purer.init(small_purer(), small_world(seed=seed)) for seed in (0, 0, 1))
    assert same(one, again)
    images = [s["images"][id]["x"] for s, id in ((one, "conv4-0"), (one, "conv4-1"), (other, "conv4-0"))]
    assert not any(torch.equal(images[0], x) for x in images[1:])


def test_a_job_holds_a_teacher_s_images_moments_and_seed(device):
    cfg, (_, state, _) = small_purer(), play("purer", small_purer(), WORLD, device=device)
    jobs = purer.plan(cfg, WORLD, state, 3)
    assert [job.teacher for job in jobs] == [c.id for c in WORLD.cards]
    assert [job.seed for job in jobs] == [seeds.derive(0, 3, "recover", j) for j in range(3)]
    for job in jobs:
        own = state["images"][str(job.teacher)]
        assert same({k: job.values[k] for k in ("x", "m", "v", "step")}, own)
        assert job.values["push"] is None
        assert job.cost > 1


def test_a_round_may_move_the_images_of_a_few_teachers_drawn_without_replacement(device):
    cfg, world = small_purer(teachers_per_round=2), small_world(cards=4)
    state = purer.init(cfg, world)
    plans = [[job.teacher for job in purer.plan(cfg, world, state, r)] for r in range(100)]
    assert all(len(set(plan)) == 2 for plan in plans)
    assert plans == [[job.teacher for job in purer.plan(cfg, world, state, r)] for r in range(100)]
    assert all(35 < sum(c.id in plan for plan in plans) < 65 for c in world.cards)  # mean 50, deviation 5
    _, after, _ = play("purer", cfg, world, device=device)
    moved = [c.id for c in world.cards if not same(after["images"][c.id], state["images"][c.id])]
    assert set(moved) == set(plans[1])
    few = small_purer(teachers_per_round=9)
    assert len(purer.plan(few, world, state, 0)) == 4


def test_images_move_in_recovery_and_the_learner_in_its_updates(device):
    cfg, shard = small_purer(image_steps=3, updates=4), FakeShard(WORLD, device=device)
    state = purer.init(cfg, WORLD)
    results = shard.send("purer.recover", purer.plan(cfg, WORLD, state, 1), purer.shared(cfg, WORLD, state, 1))
    after, metrics = purer.learn(cfg, WORLD, state, 1, results, shard.send)
    for c, result in zip(WORLD.cards, results, strict=True):
        assert same(after["images"][c.id], {k: result[k] for k in ("x", "m", "v", "step")})
        assert after["images"][c.id]["step"] == 3
        assert not torch.equal(after["images"][c.id]["x"], state["images"][c.id]["x"])
    assert after["updates"] == after["adam"]["step"] == metrics["replay/updates"] == 4
    assert not torch.equal(after["theta"], state["theta"])
    assert [op for op, _ in shard.sent] == ["purer.recover"] + ["maml.grad"] * 4
    assert all(np.isfinite(value or 0) for value in metrics.values())


def test_the_first_rounds_train_no_learner(device):
    before, after, metrics = play("purer", small_purer(image_warmup=2), WORLD, rounds=2, first=0, device=device)
    for name in ("theta", "stats", "adam", "updates", "switch"):
        assert same(after[name], before[name]), name
    assert {own["step"] for own in after["images"].values()} == {4}
    assert not any(name.startswith("replay") for name in metrics)
    _, trained, _ = play("purer", small_purer(image_warmup=2), WORLD, rounds=3, first=0, device=device)
    assert trained["updates"] == 2


def test_rounds_leave_their_state_untouched_and_are_reproducible(device):
    cfg = small_purer(**DUE)
    pristine, (before, after, _) = purer.init(cfg, WORLD), play("purer", cfg, WORLD, rounds=3, device=device)
    assert same(before, pristine)
    assert alike(after, play("purer", cfg, WORLD, rounds=3, device=device)[1], device)
    assert not torch.equal(after["theta"], play("purer", cfg, small_world(seed=1), rounds=3, device=device)[1]["theta"])


def test_tasks_are_distinct_rows_of_the_class_that_the_label_stands_for(device):
    """Every label of a task is one class name; a class that two teachers know has the images of both."""
    cfg = small_purer(meta={"shot": 1, "query": 2, "tasks": 4, "inner_steps": 0})
    tasks, met = drawn(device, cfg, WORLD), set()
    for task in tasks:
        names = []
        for support, query in zip(task["support"], task["query"], strict=True):
            rows = support + query
            assert len(set(rows)) == len(rows) == 3
            (name,) = {WORLD.cards[i].classes[row % 2] for i, row in rows}
            names.append(name)
            met.add((name, frozenset(i for i, _ in rows)))
        assert len(set(names)) == 2
    assert {teachers for name, teachers in met if name == "toy/1"} == {
        frozenset({0, 1}),
        frozenset({0}),
        frozenset({1}),
    }
    assert {teachers for name, teachers in met if name == "toy/0"} == {frozenset({0})}
    assert len({str(task) for task in tasks}) == len(tasks) == 6 * 2 * 4


def test_without_class_names_a_class_is_that_of_one_teacher(device):
    tasks = drawn(device, small_purer(image_key="teacher"), WORLD)
    origins = [{(i, row % 2) for i, row in s + q} for t in tasks for s, q in zip(t["support"], t["query"], strict=True)]
    assert all(len(origin) == 1 for origin in origins)
    assert len({one for origin in origins for one in origin}) == 6


def test_tasks_are_normalised_for_the_learner(device):
    world = mixed_world()
    cfg = small_purer()
    state, shard = purer.init(cfg, world), FakeShard(world, device=device)
    white = {}
    for c in world.cards:
        pixels = torch.full((4 * len(c.classes), *c.image.shape), 0.75)
        x = normalise(pixels, torch.tensor(c.image.mean), torch.tensor(c.image.std))
        white[c.id] = {**state["images"][c.id], "x": x}
    purer.learn(cfg, world, {**state, "images": white}, 1, [], shard.send)
    for job in shard.sent[0][1]:
        for images, count in ((job.values["support"], 2), (job.values["query"], 4)):
            assert images.dtype == np.float32
            np.testing.assert_allclose(images, np.full((count, 3, 20, 20), 1.0), atol=1e-5)  # (0.75 - 0.5) / 0.25


@pytest.mark.parametrize("curriculum", [10.0, 0.0])
def test_the_switch_is_due_after_the_warm_up_and_then_at_plateaus(curriculum):
    """A step is due after update 4, then after 3 updates without a new best. While it is due, nothing is counted."""
    cfg = small_purer(curriculum=curriculum, curriculum_after=4, curriculum_patience=3)
    script = [90, 90, 90, 10, 50, 50, 50, 50, 40, 40, 45, 40, 39, 45]
    #         1   2   3   4*  best w1  w2  w3* best w1 best w1  w2  w3*
    switch = {"best": -1.0, "waited": 0, "due": 0, "fired": 0}
    due = []
    for update, accuracy in enumerate(script, 1):
        switch = purer.switched(cfg, switch, update, float(accuracy))
        if switch["due"]:
            held = purer.switched(cfg, switch, update + 1, 99.0)
            assert held == switch
            due.append(update)
            switch = {**switch, "due": 0}
    assert due == ([4, 8, 14] if curriculum else [])


def test_an_accuracy_of_zero_is_a_first_best():
    cfg = small_purer(curriculum_after=1, curriculum_patience=1)
    switch = {"best": -1.0, "waited": 0, "due": 0, "fired": 0}
    assert purer.switched(cfg, switch, 2, 0.0) == {"best": 0.0, "waited": 0, "due": 0, "fired": 0}
    assert purer.switched(cfg, purer.switched(cfg, switch, 2, 0.0), 3, 0.0)["due"] == 1


def test_the_curriculum_sends_one_task_and_pushes_the_images_it_was_drawn_from(device):
    cfg, shard = small_purer(**DUE), FakeShard(WORLD, device=device)
    _, after, metrics = play("purer", cfg, WORLD, shard=shard, device=device)
    assert [op for op, _ in shard.sent] == ["purer.recover", "maml.grad", "maml.grad", "purer.grad"]
    assert np.isfinite(metrics["curriculum/outer_loss"])
    assert after["switch"] | {"best": 0} == {"best": 0, "waited": 0, "due": 0, "fired": 1}
    ((_, (job,)),) = shard.sent[-1:]
    pixels = [x for part in ("support", "query") for x in job.values[part]]
    hit = {}
    for c in WORLD.cards:
        x = after["images"][c.id]["x"].numpy()
        rows = [i for i in range(len(x)) if any(np.array_equal(x[i], p) for p in pixels)]
        if rows:
            hit[c.id] = rows
    assert sum(len(rows) for rows in hit.values()) == len(pixels) == 6
    assert after["push"].keys() == hit.keys()
    for id, rows in hit.items():
        touched = np.flatnonzero(np.abs(after["push"][id]).max((1, 2, 3)))
        assert touched.tolist() == rows
    plan = purer.plan(cfg, WORLD, after, 2)
    assert {job.teacher for job in plan if job.values["push"] is not None} == hit.keys()
    assert all(np.array_equal(job.values["push"], after["push"][job.teacher]) for job in plan if job.teacher in hit)
    later = play("purer", cfg, WORLD, rounds=2, device=device)[1]
    assert later["push"] == {}
    assert later["switch"]["fired"] == 1


def test_an_adversarial_step_raises_the_outer_loss_of_the_same_task(device):
    """Against the same step of the same images without the push; also where they pass a change of size."""
    for world in (WORLD, mixed_world()):
        cfg = small_purer(**DUE, shift=0, image_steps=1, lr_images=0.02)
        shard = FakeShard(world, device=device)
        _, after, metrics = play("purer", cfg, world, shard=shard, device=device)
        theta = after["theta"].double().requires_grad_()
        values: list[float] = []
        for push in (after["push"], {}):
            state = {**after, "push": push}
            results = shard.send("purer.recover", purer.plan(cfg, world, state, 2), purer.shared(cfg, world, state, 2))
            images = {r["teacher"]: {k: torch.tensor(r[k]) for k in ("x", "m", "v")} for r in results}
            store = purer._Store(cfg, world, {**after, "images": images})
            task = store.pixels(store.draw(world.seed, 1, "curriculum"))
            support, query = (torch.tensor(task[k]).double() for k in ("support", "query"))
            parts = Task(support, torch.arange(2), query, torch.arange(4) % 2)
            lr, steps = cfg.meta.inner_lr, cfg.meta.inner_steps
            values.append(float(query_loss(world.net, theta, parts, lr, steps, graph_grad)[0].detach()))
        assert values[0] > max(values[1], float(metrics["curriculum/outer_loss"] or 0)) + 0.02


def test_without_curriculum_no_pixel_gradient_is_asked_for(device):
    shard = FakeShard(WORLD, device=device)
    _, after, metrics = play("purer", small_purer(**DUE, curriculum=0.0), WORLD, rounds=3, shard=shard, device=device)
    assert {op for op, _ in shard.sent} == {"purer.recover", "maml.grad"}
    assert after["push"] == {}
    assert "curriculum/outer_loss" not in metrics
    due = FakeShard(WORLD, device=device)
    play("purer", small_purer(**DUE), WORLD, rounds=3, shard=due, device=device)
    assert [op for op, _ in due.sent].count("purer.grad") == 1


def test_a_round_on_a_mixed_pool(device):
    world = mixed_world()
    _, after, metrics = play("purer", small_purer(**DUE), world, rounds=2, device=device)
    assert [tuple(after["images"][c.id]["x"].shape) for c in world.cards] == [(8, 1, 16, 16), (12, 3, 20, 20)]
    assert after["updates"] == 4
    assert after["switch"]["fired"] == 1
    assert all(np.isfinite(value) for value in metrics.values())
    (classes,) = [store.classes for store in [purer._Store(small_purer(), world, after)]]
    assert {name: len(rows) for name, rows in classes.items()} == {"toy/a": 8, "toy/b": 4, "toy/c": 4, "toy/d": 4}


@pytest.mark.parametrize("arch", ["conv4", "mlp"])
def test_teachers_at_once_give_what_they_give_one_by_one(device, arch):
    cards = (card(0, arch=arch), card(1, arch=arch), card(2, arch="conv4-64"), card(3, arch=arch, way=3))
    world, cfg = replace(WORLD, cards=cards), small_purer(image_steps=1)
    state = purer.init(cfg, world)
    one, all_ = (
        FakeShard(world, batched=batched, device=device).send(
            "purer.recover", purer.plan(cfg, world, state, 0), purer.shared(cfg, world, state, 0)
        )
        for batched in (False, True)
    )
    assert [r["teacher"] for r in all_] == [c.id for c in cards]
    for a, b in zip(one, all_, strict=True):
        np.testing.assert_allclose(a["m"], b["m"], rtol=1e-3, atol=1e-6)
        assert a["loss_last"] == pytest.approx(b["loss_last"], rel=1e-4)


@pytest.mark.parametrize("batched", [False, True])
def test_a_teacher_of_bad_weights_is_rejected_alone(device, batched):
    shard, cfg = FakeShard(WORLD, batched=batched, device=device), small_purer()
    shard.spoil("conv4-1")
    del shard.teachers["conv4-2"]
    state = purer.init(cfg, WORLD)
    jobs, shared = purer.plan(cfg, WORLD, state, 0), purer.shared(cfg, WORLD, state, 0)
    results = purer.recover(shard, jobs, shared)
    assert results[1] == {"rejected": "the inversion loss is not finite"}
    assert results[2] == {"rejected": "conv4-2: unreadable"}
    sound = purer.recover(FakeShard(WORLD, device=device), jobs[:1], shared)[0]
    np.testing.assert_allclose(results[0]["m"], sound["m"], rtol=1e-3, atol=1e-6)  # Adam magnifies rounding in `x`
    after, metrics = purer.learn(cfg, WORLD, state, 0, [results[0]], shard.send)
    assert metrics["recover/tasks"] == 1
    assert same(after["images"]["conv4-1"], state["images"]["conv4-1"])


def test_what_a_rejected_teacher_left_behind_goes(device):
    cfg, shard = small_purer(curriculum_after=1), FakeShard(WORLD, device=device)
    _, state, _ = play("purer", cfg, WORLD, shard=shard, device=device)
    assert set(state["images"]) == {"conv4-0", "conv4-1", "conv4-2"}
    state = {**state, "push": dict.fromkeys(state["images"], np.zeros(1))}
    left = replace(WORLD, cards=WORLD.cards[:2])
    after, _ = purer.learn(cfg, left, state, 0, [], shard.send)
    assert list(after["images"]) == list(after["push"]) == ["conv4-0", "conv4-1"]


def test_a_push_waits_for_its_teacher(device):
    """With one teacher a round, the pushes of the others stay until theirs is planned."""
    cfg, shard = small_purer(teachers_per_round=1, image_warmup=99), FakeShard(WORLD, device=device)
    state = purer.init(cfg, WORLD)
    push = {c.id: np.full(tuple(state["images"][c.id]["x"].shape), 0.1, np.float32) for c in WORLD.cards}
    state = {**state, "push": push}
    for r in range(8):
        (job,) = purer.plan(cfg, WORLD, state, r)
        waiting = set(state["push"])
        assert (job.values["push"] is not None) == (job.teacher in waiting)
        results = shard.send("purer.recover", [job], purer.shared(cfg, WORLD, state, r))
        state, _ = purer.learn(cfg, WORLD, state, r, results, shard.send)
        assert set(state["push"]) == waiting - {job.teacher}
    assert state["push"] == {}


def test_a_curriculum_gradient_that_is_not_finite_stops_the_run(device):
    class Diverged(FakeShard):
        def send(self, op, jobs, shared):
            found = super().send(op, jobs, shared)
            if op == "purer.grad":
                found[0]["query"] = np.full_like(found[0]["query"], np.nan)
            return found

    with pytest.raises(FloatingPointError, match="the pixel gradient of the curriculum is not finite; lower"):
        play("purer", small_purer(**DUE), WORLD, rounds=3, shard=Diverged(WORLD, device=device), device=device)


def test_tasks_need_classes_of_teachers_that_are_left(device):
    cfg = small_purer()
    state = purer.init(cfg, replace(WORLD, way=3))
    left = replace(WORLD, way=3, cards=WORLD.cards[:1])
    message = "the usable teachers and the bank have 2 classes, too few of any one data set for a task of 3"
    with pytest.raises(RejectedError, match=message):
        purer.learn(cfg, left, state, 1, [], FakeShard(left, device=device).send)
    both = replace(left, cards=WORLD.cards[:2])
    rows = [row for t in drawn(device, cfg, both) for part in t["support"] for row in part]
    assert {i for i, _ in rows} == {0, 1}


def test_too_few_images_for_a_task_are_an_error_before_the_run():
    with pytest.raises(UsageError, match=r"purer: tasks take 2 \+ 3 images of a class, method.images_per_class is 4"):
        purer.init(small_purer(meta={"shot": 2, "query": 3}), WORLD)
    purer.init(small_purer(meta={"shot": 2, "query": 2}), WORLD)


def test_notes_say_for_whom_the_statistics_term_is_dropped(device):
    world = replace(WORLD, cards=(*WORLD.cards, card(5, arch="mlp")))
    expected = ["the batch-norm statistics term is dropped for mlp-5: no batch norm in the network"]
    assert purer.notes(small_purer(), world) == expected
    assert purer.notes(small_purer(bn_weight=0.0), world) == purer.notes(small_purer(), WORLD) == []
    play("purer", small_purer(), world, device=device)


def test_augmented_pseudo_tasks_are_changes_of_the_same_images(device: torch.device) -> None:
    """They are crops and colours of the drawn images as pixels, and the curriculum's push stays one of the images."""
    after = play("purer", small_purer(), WORLD, rounds=2, device=device)[1]
    plain, other = (
        purer._Store(small_purer(meta={"shot": 1, "query": 2, "augment": on}), WORLD, after) for on in (False, True)
    )
    drawn = plain.pixels(plain.draw(0, 1, "pseudo"))
    assert same(plain.task(0, 1, "pseudo"), drawn)
    changed = other.task(0, 1, "pseudo")
    assert same(other.task(0, 1, "pseudo"), changed)
    assert same(other.pixels(other.draw(0, 1, "pseudo")), drawn)
    rng = seeds.rng(0, 1, "pseudo", "augment")
    for name, x in drawn.items():
        pixels = (torch.tensor(x) * 0.25 + 0.5).clamp(0, 1)
        assert changed[name].dtype == np.float32
        np.testing.assert_allclose(changed[name], (augment(rng, pixels) - 0.5) / 0.25, atol=1e-5)
        assert not np.allclose(changed[name], x)
