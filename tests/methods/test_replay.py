"""Cross-task replay: the shards' gradient, one meta-update, and the loop until a plateau."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_dfml.core import episodes, optim, seeds
from ray_dfml.core.images import normalise, to_bytes, to_pixels
from ray_dfml.core.inner_loop import Task, meta_gradient
from ray_dfml.core.sources.warp import augment
from ray_dfml.methods import replay
from ray_dfml.methods.base import ReplayConfig, State, initial_learner
from ray_dfml.types import Arrays, Job
from tests.support import PROPERTY, FakeShard, alike, random_bank, small_world

WORLD = small_world()
BANK = random_bank(4, 6, WORLD.image.shape)


def config(**changes: Any) -> ReplayConfig:
    return ReplayConfig.model_validate({"shot": 1, "query": 2, "tasks": 3, "inner_steps": 2} | changes)


def start() -> State:
    return replay.with_optimiser(initial_learner(WORLD))


class Script:
    """A `send` that answers from a list: one accuracy per update, and given gradients per task."""

    def __init__(self, accuracies: Sequence[float] = (0.5,), grads: Sequence[float] = (1.0,)) -> None:
        self.accuracies, self.grads, self.calls = list(accuracies), list(grads), []

    def __call__(self, op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        accuracy = self.accuracies[min(len(self.calls), len(self.accuracies) - 1)]
        self.calls.append((op, jobs, shared))
        size, stats = len(shared["theta"]), WORLD.net.stats_layout.numel
        return [
            {
                "grad": np.full(size, self.grads[i % len(self.grads)], np.float32),
                "loss": 2.0 + i,
                "accuracy": accuracy,
                "stats": np.full(stats, float(i), np.float32),
            }
            for i in range(len(jobs))
        ]


def plateau(accuracies: Sequence[float], **changes: Any) -> tuple[int, float, State]:
    """Updates made, best accuracy in percent and final state under scripted accuracies (the last one repeats)."""
    cfg = config(tasks=1, **changes)
    state, metrics = replay.until_plateau(cfg, WORLD, start(), BANK, 7, Script(accuracies))
    return metrics["replay/updates"], metrics["replay/accuracy_best"], state


@pytest.mark.parametrize("head", ["maml", "anil", "protonet"])
@pytest.mark.parametrize("batched", [False, True])
def test_the_op_returns_the_meta_gradient_of_each_job(device: torch.device, batched, head):
    cfg, script = config(), Script()
    replay.update(cfg, replace(WORLD, head=head), start(), BANK, (0, "replay", 0), script)
    ((op, jobs, shared),) = script.calls
    assert op == "maml.grad"
    found = replay.grad(FakeShard(WORLD, batched=batched, device=device), jobs, shared)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    for job, result in zip(jobs, found, strict=True):
        support, query = (normalise(to_pixels(job.values[k]), mean, std)[None] for k in ("support", "query"))
        task = Task(support, episodes.interleaved(2, 1)[None], query, episodes.interleaved(2, 2)[None])
        expected = meta_gradient(
            WORLD.net, torch.tensor(shared["theta"]), task, lr=cfg.inner_lr, steps=cfg.inner_steps, batched=False,
            head=head,
        )  # fmt: skip
        error = torch.tensor(result["grad"]) - expected.grad[0]
        assert error.norm() < 1e-4 * expected.grad[0].norm()
        torch.testing.assert_close(torch.tensor(result["stats"]), expected.stats[0], rtol=1e-4, atol=1e-5)
        assert result["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        assert result["accuracy"] == pytest.approx(expected.accuracy.item())


def test_float_images_are_taken_as_normalised(device: torch.device):
    """The same task as bytes and as what the learner makes of them; values beyond those of any pixel pass unclamped."""
    cfg, shard = config(tasks=1), FakeShard(WORLD, device=device)
    (task,) = replay.draw(cfg, WORLD, BANK, (0,))
    values = replay.shared_values(cfg, WORLD, start())
    mean, std = torch.tensor(values["mean"]), torch.tensor(values["std"])
    ready = {name: normalise(to_pixels(images), mean, std).numpy() for name, images in task.items()}
    far = {name: 3 * images for name, images in ready.items()}
    as_bytes, as_floats, scaled = (
        replay.grad(shard, [Job(index=0, seed=0, values=one)], values)[0] for one in (task, ready, far)
    )
    assert alike(as_bytes["grad"], as_floats["grad"], device)
    assert alike(as_bytes["stats"], as_floats["stats"], device)
    parts = WORLD.net.stats_layout.unflatten(torch.tensor(scaled["stats"]))
    assert parts["blocks.0.norm.running_var"].sum() > 8 * as_bytes["stats"][32:64].sum()


def test_looped_results_do_not_depend_on_how_jobs_are_sharded(device: torch.device):
    script = Script()
    replay.update(config(), WORLD, start(), BANK, (0, "replay", 0), script)
    ((_, jobs, shared),) = script.calls
    shard = FakeShard(WORLD, device=device)
    together = replay.grad(shard, jobs, shared)
    apart = [replay.grad(shard, [job], shared)[0] for job in jobs]
    assert all(alike(a["grad"], b["grad"], device) for a, b in zip(together, apart, strict=True))


def test_tasks_of_an_update_are_named_by_the_seed_and_the_tag():
    def drawn(tag: tuple[int | str, ...]) -> list[np.ndarray]:
        script = Script()
        replay.update(config(), WORLD, start(), BANK, tag, script)
        return [job.values["query"] for job in script.calls[0][1]]

    one, same, other = drawn((3, "replay", 0)), drawn((3, "replay", 0)), drawn((3, "replay", 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not np.array_equal(one[0], one[1])


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 6.0), ("mean", 2.0)])
def test_gradients_are_summed_or_averaged_before_one_adam_step(reduction, expected):
    state, cfg = start(), config(reduction=reduction, lr=0.01)
    new, _ = replay.update(cfg, WORLD, state, BANK, (0,), Script(grads=[1.0, 2.0, 3.0]))
    grad = torch.full_like(state["theta"], expected)
    theta, adam = optim.adam_step(state["theta"], grad, optim.Adam.zeros(grad), lr=0.01)
    torch.testing.assert_close(new["theta"], theta)
    torch.testing.assert_close(new["adam"]["m"], adam.m)
    assert new["adam"]["step"] == new["updates"] == 1


def test_gradients_are_added_in_task_order():
    """In single precision (1e8 + 1) - 1e8 is 0, and (1e8 - 1e8) + 1 is 1."""
    for grads, total in (([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)):
        new, _ = replay.update(config(reduction="sum"), WORLD, start(), BANK, (0,), Script(grads=grads))
        torch.testing.assert_close(new["adam"]["m"], torch.full_like(new["theta"], 0.1 * total))


def test_statistics_follow_the_queries_slowly_and_metrics_are_means():
    state = start()
    new, metrics = replay.update(config(), WORLD, state, BANK, (0,), Script([0.25]))
    torch.testing.assert_close(new["stats"], 0.9 * state["stats"] + 0.1)  # mean of 0, 1, 2 is 1
    assert metrics == {"loss": pytest.approx(3.0), "accuracy": pytest.approx(25.0)}


def test_an_update_is_a_draw_and_a_step(device: torch.device):
    cfg, send = config(), FakeShard(WORLD, device=device).send
    whole, metrics = replay.update(cfg, WORLD, start(), BANK, (3, "replay", 0), send)
    tasks = replay.draw(cfg, WORLD, BANK, (3, "replay", 0))
    assert [len(task["support"]) for task in tasks] == [2, 2, 2]
    parts, again = replay.step(cfg, WORLD, start(), tasks, (3, "replay", 0), send)
    assert alike(again, metrics, device)
    assert alike(parts["theta"], whole["theta"], device)
    assert alike(parts["stats"], whole["stats"], device)


def test_augmented_tasks_are_changes_of_the_same_images():
    """Support and query are each changed; without the setting nothing is, and the draws are the same again."""
    plain, other, again = (replay.draw(config(augment=on), WORLD, BANK, (3,)) for on in (False, True, True))
    for one, changed, repeated in zip(plain, other, again, strict=True):
        for name in ("support", "query"):
            assert changed[name].shape == one[name].shape
            assert changed[name].dtype == np.uint8
            assert not np.array_equal(changed[name], one[name])
            np.testing.assert_array_equal(changed[name], repeated[name])
    rng = seeds.rng(WORLD.seed, 3, 0, "augment")
    expected = [to_bytes(augment(rng, to_pixels(plain[0][name]))) for name in ("support", "query")]
    assert all(np.array_equal(other[0][n], x) for n, x in zip(("support", "query"), expected, strict=True))


def extra(value: float, **more: Any) -> Arrays:
    """A gradient from elsewhere."""
    grad = np.full(WORLD.net.layout.numel, value, np.float32)
    return {"grad": grad, "loss": 8.0, "accuracy": 1.0} | more


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 12.0), ("mean", 3.0)])
def test_gradients_from_elsewhere_join_those_of_the_tasks(reduction, expected):
    state, cfg = start(), config(tasks=2, reduction=reduction)
    tasks = replay.draw(cfg, WORLD, BANK, (0,))
    stats = np.full(WORLD.net.stats_layout.numel, 5.0, np.float32)
    more = [extra(4.0), extra(5.0, stats=stats)]
    new, metrics = replay.step(cfg, WORLD, state, tasks, (0,), Script([0.5], grads=[1.0, 2.0]), more)
    torch.testing.assert_close(new["adam"]["m"], torch.full_like(state["theta"], 0.1 * expected))
    torch.testing.assert_close(new["stats"], 0.9 * state["stats"] + 0.1 * 2.0)  # mean of 0, 1 and 5 is 2
    assert metrics == {"loss": pytest.approx((2 + 3 + 8 + 8) / 4), "accuracy": pytest.approx(75.0)}


def test_a_step_on_gradients_from_elsewhere_alone_sends_nothing():
    state, script = start(), Script()
    new, _ = replay.step(config(), WORLD, state, [], (0,), script, [extra(2.0)])
    assert script.calls == []
    assert torch.equal(new["stats"], state["stats"])
    torch.testing.assert_close(new["adam"]["m"], torch.full_like(state["theta"], 0.2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        replay.update(config(), WORLD, start(), BANK, (0,), Script(grads=[1.0, bad, 1.0]))


def test_update_leaves_state_and_bank_untouched(device: torch.device):
    state = start()
    theta, moments = state["theta"].clone(), state["adam"]["m"].clone()
    images = {key: value.copy() for key, value in BANK.items()}
    replay.update(config(), WORLD, state, BANK, (0,), FakeShard(WORLD, device=device).send)
    assert torch.equal(state["theta"], theta)
    assert torch.equal(state["adam"]["m"], moments)
    assert state["updates"] == 0
    assert all(np.array_equal(BANK[key], value) for key, value in images.items())


def test_patience_counts_updates_without_a_new_best():
    assert plateau([0.1, 0.2, 0.2, 0.2, 0.2], patience=3)[:2] == (5, pytest.approx(20.0))
    assert plateau([0.1, 0.2, 0.15, 0.3, 0.1], patience=2)[:2] == (6, pytest.approx(30.0))
    assert plateau([0.0], patience=10)[0] == 11


def test_updates_stop_at_the_cap():
    count, _, state = plateau([i / 100 for i in range(100)], patience=3, max_updates=8)
    assert count == state["updates"] == state["adam"]["step"] == 8


@PROPERTY
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 12))
def test_the_loop_stops_at_the_first_plateau_or_the_cap(levels, patience, cap):
    accuracies = [level / 4 for level in levels]
    count, best, _ = plateau(accuracies, patience=patience, max_updates=cap)
    seen = (accuracies + [accuracies[-1]] * 20)[:count]
    stale = [i - max(range(i + 1), key=lambda j: (seen[j], -j)) for i in range(count)]  # updates since the best so far
    assert count <= cap
    assert all(waited < patience for waited in stale[:-1])
    assert stale[-1] == patience or count == cap
    assert best == pytest.approx(100 * max(seen))


def test_each_update_of_a_round_draws_new_tasks():
    script = Script([0.0])
    replay.until_plateau(config(patience=2), WORLD, start(), BANK, 7, script)
    queries = [np.stack([job.values["query"] for job in jobs]) for _, jobs, _ in script.calls]
    assert len(queries) == 3
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(queries))


def test_losses_of_the_first_and_last_update_are_reported(device: torch.device):
    _, metrics = replay.until_plateau(
        config(inner_lr=0.05, lr=0.003, patience=30, max_updates=30),
        WORLD,
        start(),
        coloured_bank(),
        0,
        FakeShard(WORLD, device=device).send,
    )
    assert metrics["replay/updates"] == 30
    assert metrics["replay/loss_last"] < 0.7 * metrics["replay/loss_first"]


def coloured_bank() -> dict[str, np.ndarray]:
    """Classes of noise, each with its own brightness per channel: tasks a learner can learn to learn."""
    rng = np.random.default_rng(0)
    bank = {}
    for i in range(4):
        base = 60 * np.array([i & 1, i >> 1, 1])[None, :, None, None]
        bank[f"toy/{i}"] = (base + rng.integers(0, 80, (8, *WORLD.image.shape))).astype(np.uint8)
    return bank
