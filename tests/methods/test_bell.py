"""BELL: its path against theory, and what each variant changes."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ray_dfml.core import losses, optim
from ray_dfml.core.inner_loop import plain_grad
from ray_dfml.methods.base import State, World
from ray_dfml.methods.free import bell
from ray_dfml.methods.free import method as free
from tests.support import PROPERTY, at, normal, rounding, small_config, small_world

WORLD = small_world()


def draw_tasks(world: World = WORLD, *, tasks: int = 3) -> list[bell.DistillSet]:
    labels = torch.arange(world.way).repeat(4)
    return [
        bell.DistillSet(
            normal(len(labels), *world.image.shape, seed=i).float(),
            normal(len(labels), world.way, seed=100 + i).float() * 2,
            labels,
        )
        for i in range(tasks)
    ]


def start(**changes: Any) -> tuple[free.Config, State, list[bell.DistillSet]]:
    cfg = small_config(**changes)
    return cfg, free.init(cfg, WORLD), draw_tasks()


def gradient(state: State, task: bell.DistillSet, form: str = "kl") -> Tensor:
    return plain_grad(bell.distill_loss(WORLD.net, task, form))(state["theta"])


def test_path_of_one_loss_with_sgd_is_one_distillation_step():
    _, state, (task, *_) = start()
    moved, _, grads = bell.inner_path(
        [bell.distill_loss(WORLD.net, task, "kl")], state["theta"], lr=0.1, optimizer="sgd"
    )
    leaf = state["theta"].clone().requires_grad_()
    losses.kl(task.logits, WORLD.net(leaf, task.images)).mean().backward()
    torch.testing.assert_close(grads[0], leaf.grad)
    torch.testing.assert_close(moved, state["theta"] - 0.1 * leaf.grad)


def test_update_with_one_task_sgd_and_full_interpolation_is_one_distillation_step(device):
    cfg, state, tasks = start(bell_inner="sgd", bell_lr=0.1, bell_outer="interpolate", bell_outer_lr=1.0)
    new, _ = bell.update(cfg, at(WORLD, device), state, tasks[:1], 1)
    torch.testing.assert_close(new["theta"], state["theta"] - 0.1 * gradient(state, tasks[0]), **rounding(device))


def test_mean_path_over_orders_descends_the_losses_and_ascends_gradient_products(device):
    """E[theta - theta~] = alpha sum g_i - alpha^2/2 sum_{i<j} grad(g_i . g_j) + O(alpha^3), for quadratic losses."""
    size, theta = 5, normal(5, device=device)
    roots = [normal(size, size, seed=10 + i, device=device) for i in range(3)]
    hessians = [root.T @ root for root in roots]
    centres = [normal(size, seed=20 + i, device=device) for i in range(3)]
    fns = [lambda w, a=a, c=c: 0.5 * (w - c) @ a @ (w - c) for a, c in zip(hessians, centres, strict=True)]
    g = [a @ (theta - c) for a, c in zip(hessians, centres, strict=True)]
    pairs = itertools.combinations(range(3), 2)
    products = torch.stack([hessians[i] @ g[j] + hessians[j] @ g[i] for i, j in pairs]).sum(0)

    def error_of_the_second_order_term(alpha: float) -> float:
        paths = [
            theta - bell.inner_path(order, theta, lr=alpha, optimizer="sgd")[0] for order in itertools.permutations(fns)
        ]
        measured = torch.stack(paths).mean(0) - alpha * torch.stack(g).sum(0)
        predicted = -(alpha**2) / 2 * products
        return float((measured - predicted).norm() / predicted.norm())

    errors = [error_of_the_second_order_term(alpha) for alpha in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < 0.2
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_path_gradients_are_taken_where_the_path_stands(device):
    fns = [lambda w: 0.5 * (w - 1).square().sum(), lambda w: 0.5 * (w + 2).square().sum()]
    moved, losses_met, grads = bell.inner_path(fns, torch.zeros(1, device=device), lr=0.5, optimizer="sgd")
    assert [g.item() for g in grads] == [-1.0, 2.5]
    assert [value.item() for value in losses_met] == [0.5, 3.125]
    assert moved.item() == pytest.approx(0.5 - 0.5 * 2.5)


def test_path_with_adam_equals_the_framework(device):
    fns = [lambda w, i=i: (w - i).pow(4).sum() for i in range(4)]
    theta = normal(6, device=device)
    reference = theta.clone().requires_grad_()
    theirs = torch.optim.Adam([reference], lr=0.01)
    for fn in fns:
        theirs.zero_grad()
        fn(reference).backward()
        theirs.step()
    moved, *_ = bell.inner_path(fns, theta, lr=0.01, optimizer="adam")
    torch.testing.assert_close(moved, reference.detach())


@PROPERTY
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_alignment_equals_numpy(device, count, size, seed):
    grads = normal(count, size, seed=seed, device=device)
    rows = grads.cpu().numpy()
    pairs = list(itertools.combinations(range(count), 2))
    products = [rows[i] @ rows[j] for i, j in pairs]
    cosines = [rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for i, j in pairs]
    assert bell.alignment(list(grads)) == pytest.approx((np.mean(products), np.mean(cosines)), rel=1e-9, abs=1e-12)


def test_alignment_of_fewer_than_two_gradients_is_zero_and_of_null_gradients_finite(device):
    assert bell.alignment([torch.ones(3, device=device)]) == (0.0, 0.0)
    assert bell.alignment([torch.zeros(3, device=device), torch.ones(3, device=device)]) == (0.0, 0.0)


def test_recommended_settings_move_the_learner(device):
    cfg, state, tasks = start()
    assert (cfg.bell_inner, cfg.bell_outer, cfg.bell_scale, cfg.distill) == ("adam", "adam", 1.0, "kl")
    new, metrics = bell.update(cfg, at(WORLD, device), state, tasks, 1)
    moved = float((new["theta"] - state["theta"]).norm())
    assert moved > 1e-4
    assert metrics["bell/step_norm"] == pytest.approx(moved)


def test_literal_paper_settings_hardly_move_the_learner(device):
    cfg, state, tasks = start(bell_inner="sgd", bell_outer="interpolate")
    new, _ = bell.update(cfg, at(WORLD, device), state, tasks, 1)
    length = sum(float(gradient(state, task).norm()) for task in tasks)
    assert 0 < (new["theta"] - state["theta"]).norm() < 2e-6 * length


def test_repeated_updates_lower_the_distillation_loss(device):
    cfg, state, tasks = start()
    found = []
    for r in range(1, 16):
        state, metrics = bell.update(cfg, at(WORLD, device), state, tasks, r)
        found.append(metrics["bell/loss"])
    assert found[-1] < 0.8 * found[0]


def kl_at(theta: Tensor, task: bell.DistillSet) -> float:
    return float(losses.kl(task.logits, WORLD.net(theta, task.images)).mean())


def test_reported_loss_is_the_mean_of_the_losses_that_the_path_met(device):
    """The first task's loss is at the initial weights, the second's is after the first step, and so on."""
    cfg, state, tasks = start(bell_inner="sgd", bell_lr=0.5)
    _, metrics = bell.update(cfg, at(WORLD, device), state, tasks, 1)
    theta, expected = state["theta"], []
    for task in tasks:
        expected.append(kl_at(theta, task))
        theta = theta - 0.5 * plain_grad(lambda w, task=task: losses.kl(task.logits, WORLD.net(w, task.images)).mean())(
            theta
        )
    assert metrics["bell/loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert metrics["bell/loss"] != pytest.approx(np.mean([kl_at(state["theta"], t) for t in tasks]), rel=1e-2)


def test_reported_loss_of_erm_is_that_before_the_step(device):
    cfg, state, tasks = start(learner_update="erm")
    _, metrics = bell.update(cfg, at(WORLD, device), state, tasks, 1)
    assert metrics["bell/loss"] == pytest.approx(np.mean([kl_at(state["theta"], t) for t in tasks]), rel=1e-5)


@pytest.mark.parametrize("form", ["kl", "probdot", "hard"])
def test_loss_forms_are_those_of_the_config(form):
    _, state, (task, *_) = start()
    student = WORLD.net(state["theta"], task.images)
    expected = {
        "kl": losses.distillation(task.logits, student, form="kl"),
        "probdot": losses.distillation(task.logits, student, form="probdot"),
        "hard": F.cross_entropy(student, task.labels),
    }
    torch.testing.assert_close(bell.distill_loss(WORLD.net, task, form)(state["theta"]), expected[form])


def test_erm_takes_the_summed_gradient_at_the_base_weights(device):
    cfg, state, tasks = start(learner_update="erm")
    new, metrics = bell.update(cfg, at(WORLD, device), state, tasks, 1)
    total = torch.stack([gradient(state, task) for task in tasks]).sum(0)
    expected, adam = optim.adam_step(state["theta"], total, optim.Adam.zeros(total), lr=cfg.bell_outer_lr)
    torch.testing.assert_close(new["theta"], expected, **rounding(device))
    torch.testing.assert_close(new["adam_bell"]["m"], adam.m, **rounding(device))
    assert "align/path_product" not in metrics
    assert "align/base_product" in metrics


def test_erm_ignores_the_order_of_tasks_and_bell_does_not(device):
    for update, changes in (("erm", {}), ("bell", {"bell_outer": "interpolate", "bell_outer_lr": 1.0})):
        cfg, state, tasks = start(learner_update=update, bell_inner="sgd", bell_lr=0.1, **changes)
        forward = bell.update(cfg, at(WORLD, device), state, tasks, 1)[0]["theta"]
        backward = bell.update(cfg, at(WORLD, device), state, tasks[::-1], 1)[0]["theta"]
        step = (forward - state["theta"]).norm()
        assert ((forward - backward).norm() / step < 1e-3) == (update == "erm")


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_interpolation_goes_part_of_the_way_and_leaves_the_optimisers_alone(device, epsilon):
    cfg, state, tasks = start(bell_outer="interpolate", bell_outer_lr=epsilon)
    new, _ = bell.update(cfg, at(WORLD, device), state, tasks, 1)
    fns = [bell.distill_loss(WORLD.net, task, "kl") for task in tasks]
    end, *_ = bell.inner_path(fns, state["theta"], lr=cfg.bell_lr, optimizer="adam")
    torch.testing.assert_close(new["theta"], torch.lerp(state["theta"], end, epsilon), **rounding(device))
    assert new["adam"] is state["adam"]
    assert new["adam_bell"] is state["adam_bell"]


@pytest.mark.parametrize(
    ("outer", "used", "spared"), [("adam", "adam_bell", "adam"), ("shared-adam", "adam", "adam_bell")]
)
def test_the_outer_optimiser_is_the_one_named(device, outer, used, spared):
    cfg, state, tasks = start(bell_outer=outer)
    new, _ = bell.update(cfg, at(WORLD, device), state, tasks, 1)
    assert new[used]["step"] == 1
    assert new[used]["m"].abs().sum() > 0
    assert new[spared] is state[spared]


def test_the_scale_multiplies_the_pseudo_gradient(device):
    moments = []
    for scale in (1.0, 67.0):
        cfg, state, tasks = start(bell_scale=scale)
        moments.append(bell.update(cfg, at(WORLD, device), state, tasks, 1)[0]["adam_bell"]["m"])
    torch.testing.assert_close(moments[1], 67 * moments[0], rtol=1e-5, atol=0)


def test_products_at_the_base_weights_are_measured_on_their_rounds_only(device):
    cfg, state, tasks = start(alignment_every=3)
    found = [bell.update(cfg, at(WORLD, device), state, tasks, r)[1] for r in (3, 4)]
    assert "align/base_cosine" in found[0]
    assert "align/base_cosine" not in found[1]
    expected = bell.alignment([gradient(state, task) for task in tasks])
    assert (found[0]["align/base_product"], found[0]["align/base_cosine"]) == pytest.approx(
        expected, rel=1e-5 if device.type == "cpu" else 1e-2
    )
    never, state, tasks = start(alignment_every=0)
    assert "align/base_cosine" not in bell.update(never, at(WORLD, device), state, tasks, 0)[1]


def test_update_leaves_the_old_state_untouched(device):
    cfg, state, tasks = start()
    copies = {name: state[name].clone() for name in ("theta", "theta_g", "stats")}
    moments = state["adam_bell"]["m"].clone()
    new, _ = bell.update(cfg, at(WORLD, device), state, tasks, 1)
    assert all(torch.equal(state[name], copy) for name, copy in copies.items())
    assert torch.equal(state["adam_bell"]["m"], moments)
    assert new["theta_g"] is state["theta_g"]
