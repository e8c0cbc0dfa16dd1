"""ECI: steps on learnable images against the formula and the framework's Adam; pixel gradients of the outer loss."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import optim
from ray_dfml.core.inner_loop import Task, graph_grad, query_loss
from ray_dfml.methods.base import image_values
from ray_dfml.methods.purer import eci
from ray_dfml.methods.purer import method as purer
from ray_dfml.types import Arrays, ImageSpec, Job, TeacherCard
from tests.support import FakeShard, FakeTeacher, card, mixed_world, normal, random_teacher, small_purer, small_world

GREY, COLOUR = mixed_world().cards
LEARNER = mixed_world().image
PLAIN: dict[str, Any] = {"shift": 0, "image_steps": 1}
WEIGHTS = {"tv_weight": 0.03, "bn_weight": 0.05, "l2_weight": 0.02}
"""Priors that weigh about as much as the cross-entropy, so that a missing one shows."""


def job(x: Tensor, *, push: Tensor | None = None, seed: int = 5, adam: optim.Adam | None = None) -> Job:
    adam = adam or optim.Adam.zeros(x)
    values = {"x": x.cpu().numpy(), "m": adam.m.cpu().numpy(), "v": adam.v.cpu().numpy(), "step": adam.step}
    return Job(index=0, seed=seed, teacher="t", values=values | {"push": None if push is None else push.cpu().numpy()})


def invert(cfg: purer.Config, teacher: FakeTeacher, one: Job) -> Arrays:
    return eci.invert(cfg, [teacher], [one], device=teacher.theta.device, batched=False)[0]


def double(device: torch.device, which: TeacherCard) -> FakeTeacher:
    return random_teacher(which, device=device).double()


def images(device: torch.device, which: TeacherCard, seed: int = 1) -> Tensor:
    """Four images per class, in the teacher's normalised space."""
    return normal(4 * len(which.classes), *which.image.shape, seed=seed, device=device)


def gradient_of(device: torch.device, result: Arrays) -> Tensor:
    """The gradient of a first step, which Adam's first moment holds a tenth of."""
    assert result["step"] == 1
    return torch.tensor(result["m"], device=device) * 10


def formula(cfg: purer.Config, teacher: FakeTeacher, x: Tensor) -> Tensor:
    """METHODS of [Hu2023] by hand: CE + TV + R_BN + norm, with statistics caught on the way in of each batch norm."""
    names = list(teacher.net.stats_layout.shapes)
    logits, flat = teacher.net.with_stats(teacher.theta, x, teacher.stats)
    found, kept = (teacher.net.stats_layout.unflatten(s) for s in (flat, teacher.stats))
    neighbours = [
        x[..., 1:] - x[..., :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    ]
    variation = sum(d.square().sum().sqrt() for d in neighbours)
    statistics = sum((found[n] - kept[n]).square().sum().sqrt() for n in names)
    loss = F.cross_entropy(logits, torch.arange(len(x), device=x.device) % len(teacher.card.classes))
    loss = loss + cfg.tv_weight * variation + cfg.l2_weight * x.square().sum().sqrt()
    return loss + cfg.bn_weight * statistics if names and cfg.bn_weight else loss


@pytest.mark.parametrize("which", [GREY, COLOUR, card(0, arch="mlp")], ids=lambda c: c.id)
def test_steps_follow_the_formula_as_the_framework_s_adam_does(device, which):
    """Loss, images, moments and step count of three steps in two jobs equal an independent copy's."""
    cfg, teacher, x = small_purer(**PLAIN | WEIGHTS | {"image_steps": 2}), double(device, which), images(device, which)
    theirs = x.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=cfg.lr_images)
    losses = []
    for _ in range(3):
        adam.zero_grad()
        losses.append(formula(cfg, teacher, theirs))
        losses[-1].backward()
        adam.step()
    first = invert(cfg, teacher, job(x))
    then = optim.Adam(torch.tensor(first["m"], device=device), torch.tensor(first["v"], device=device), first["step"])
    last = invert(
        cfg.model_copy(update={"image_steps": 1}), teacher, job(torch.tensor(first["x"], device=device), adam=then)
    )
    found = [first["loss_first"], first["loss_last"], last["loss_last"]]
    assert found == pytest.approx([float(loss.detach()) for loss in losses], rel=1e-6)
    torch.testing.assert_close(torch.tensor(last["x"], device=device), theirs.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        torch.tensor(last["v"], device=device), adam.state[theirs]["exp_avg_sq"], rtol=1e-6, atol=1e-12
    )
    assert last["step"] == 3


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_prior_has_a_weight_of_its_own(device, name):
    teacher, x = double(device, COLOUR), images(device, COLOUR)
    plain, weighed = (
        invert(small_purer(**PLAIN | WEIGHTS | {name: w}), teacher, job(x))["loss_last"] for w in (0.0, WEIGHTS[name])
    )
    assert weighed > plain + 0.02


def test_the_statistics_term_is_zero_when_fed_the_statistics_themselves(device):
    """Statistics of the batch, each layer normalised by them: the same ones are found again."""
    teacher, x = double(device, COLOUR), images(device, COLOUR)
    _, stats = teacher.net.with_stats(teacher.theta, x)
    fitting = replace(teacher, stats=stats)
    with_, without = (
        invert(small_purer(**PLAIN | WEIGHTS | {"bn_weight": w}), fitting, job(x))["loss_last"] for w in (9.0, 0.0)
    )
    assert with_ == pytest.approx(without, abs=1e-5)
    assert invert(small_purer(**PLAIN | {"bn_weight": 9.0}), teacher, job(x))["loss_last"] > without + 1


def test_figures_are_those_of_the_last_step_s_images(device):
    teacher, x, labels = double(device, GREY), images(device, GREY), torch.arange(2, device=device).repeat(4)
    cfg = small_purer(**PLAIN | {"image_steps": 4})
    before = torch.tensor(invert(cfg.model_copy(update={"image_steps": 3}), teacher, job(x))["x"], device=device)
    found = invert(cfg, teacher, job(x))
    logits = teacher.net(teacher.theta, before, teacher.stats)
    assert found["ce"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert found["accuracy"] == 100 * float((logits.argmax(1) == labels).double().mean())
    assert found["loss_last"] < found["loss_first"]


def test_the_random_shift_is_one_cyclic_offset_of_the_batch_per_step(device):
    """Some offset of at most two pixels explains the loss, and rolls the gradient back to where the pixels are."""
    cfg, teacher, x = small_purer(**PLAIN | WEIGHTS | {"shift": 2}), double(device, GREY), images(device, GREY)
    offsets = set()
    for seed in range(12):
        found = invert(cfg, teacher, job(x, seed=seed))
        table = {}
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                table[dy, dx] = float(formula(cfg, teacher, torch.roll(x, (dy, dx), (2, 3))))
        (offset,) = [at for at, loss in table.items() if abs(loss - found["loss_last"]) < 1e-9]
        offsets.add(offset)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(formula(cfg, teacher, torch.roll(leaf, offset, (2, 3))), leaf)
        torch.testing.assert_close(gradient_of(device, found), expected)
    assert len(offsets) > 6
    assert {dy for dy, _ in offsets} > {-2, 0, 2}


def test_shifts_follow_the_job_s_seed(device):
    cfg, teacher, x = small_purer(shift=2, image_steps=3), double(device, GREY), images(device, GREY)
    one, again, other = (invert(cfg, teacher, job(x, seed=seed))["x"] for seed in (5, 5, 6))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_images_are_never_clamped(device):
    """Far outside of what pixels can be, and moved by no more than Adam's step."""
    x = 50 + images(device, GREY)
    found = invert(small_purer(**PLAIN), double(device, GREY), job(x))["x"]
    assert 0.2 < np.abs(found - x.cpu().numpy()).max() <= 0.25 + 1e-6


def test_images_of_a_class_become_images_of_that_class(device):
    """Class names that are not sorted: rows are labelled by the position in the teacher's list."""
    which = card(6)
    assert which.classes == ("toy/6", "toy/0")
    cfg, teacher, x = (
        small_purer(image_steps=30, shift=1),
        random_teacher(which, device=device),
        images(device, which).float(),
    )
    found = invert(cfg, teacher, job(x))
    logits = teacher.net(teacher.theta, torch.tensor(found["x"], device=device), teacher.stats)
    assert logits.argmax(1).tolist() == [0, 1] * 4
    assert found["accuracy"] == 100


def test_the_push_joins_the_gradient_of_the_first_step_only(device):
    cfg, teacher, x = small_purer(**PLAIN | {"image_steps": 2}), double(device, GREY), images(device, GREY)
    push, one = 0.1 * images(device, GREY, seed=7), cfg.model_copy(update={"image_steps": 1})
    plain = gradient_of(device, invert(one, teacher, job(x)))
    torch.testing.assert_close(gradient_of(device, invert(one, teacher, job(x, push=push))), plain + push)
    pushed = invert(one, teacher, job(x, push=push))
    then = optim.Adam(torch.tensor(pushed["m"], device=device), torch.tensor(pushed["v"], device=device), 1)
    expected = invert(one, teacher, job(torch.tensor(pushed["x"], device=device), adam=then))
    found = invert(cfg, teacher, job(x, push=push))
    for name in ("x", "m", "v", "step"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ["conv4", "mlp"])
def test_teachers_that_go_together_do_not_touch(device, arch):
    cards = [card(i, arch=arch) for i in range(3)]
    teachers, cfg = [double(device, c) for c in cards], small_purer(**WEIGHTS)
    jobs = [
        job(images(device, c, seed=i), seed=i, push=images(device, c, seed=9) if i == 1 else None)
        for i, c in enumerate(cards)
    ]
    together = eci.invert(cfg, teachers, jobs, device=device, batched=True)
    for found, teacher, one in zip(together, teachers, jobs, strict=True):
        for name, value in invert(cfg, teacher, one).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


def test_the_learner_sees_a_teacher_s_images_in_its_own_size_and_space(device):
    x = images(device, GREY)
    found = eci.as_learner_sees(x, GREY.image, LEARNER)
    pixels = F.interpolate(x * 0.5 + 0.3, (20, 20), mode="bilinear").expand(-1, 3, -1, -1)
    torch.testing.assert_close(found, (pixels - 0.5) / 0.25)
    y = images(device, COLOUR)
    mean, std = (
        torch.tensor(v, dtype=torch.float64, device=device)[:, None, None]
        for v in (COLOUR.image.mean, COLOUR.image.std)
    )
    torch.testing.assert_close(eci.as_learner_sees(y, COLOUR.image, LEARNER), (y * std + mean - 0.5) / 0.25)
    assert eci.as_learner_sees(y, COLOUR.image, COLOUR.image) is y


@pytest.mark.parametrize("image", [GREY.image, COLOUR.image, LEARNER], ids=["grey", "colour", "same"])
def test_a_push_is_the_pixel_gradient_carried_back_to_the_teacher_s_images(image: ImageSpec):
    """Against finite differences of <what the learner sees, gradient>; nothing at the rows that were not drawn."""
    x, rows = normal(6, *image.shape), np.array([4, 1])
    gradient = normal(2, *LEARNER.shape, seed=2)
    push = torch.tensor(eci.push_of(x, rows, gradient, image, LEARNER, 10.0))
    assert push.dtype == x.dtype
    assert push[[0, 2, 3, 5]].abs().max() == 0
    direction = normal(*x.shape, seed=3)

    def seen(eps: float) -> Tensor:
        return eci.as_learner_sees(x + eps * direction, image, LEARNER)[rows]

    measured = float(((seen(1e-3) - seen(-1e-3)) * gradient).sum()) / 2e-3
    assert float((push * direction).sum()) == pytest.approx(-10 * measured, rel=1e-6)


def grad_values(device: torch.device, head: str, *, inner_lr: float = 0.5, steps: int = 2) -> Arrays:
    """What a `purer.grad` job reads: float64 weights of the small learner."""
    world = small_world()
    theta = world.net.init(torch.Generator().manual_seed(0)).to(device).double() + 0.1 * normal(
        world.net.layout.numel, device=device
    )
    values = {"theta": theta.cpu().numpy(), "inner_lr": inner_lr, "inner_steps": steps, "head": head}
    return image_values(world.image) | {"arch": "conv4", "way": 2} | values


def outer(shared: Arrays, support: Tensor, query: Tensor) -> float:
    """The outer loss by another road: that of the meta-gradient."""
    theta = torch.tensor(shared["theta"], device=query.device).requires_grad_()
    labels = torch.arange(len(support) + len(query), device=query.device) % 2
    task = Task(support, labels[: len(support)], query, labels[: len(query)])
    lr, steps, head = (shared[k] for k in ("inner_lr", "inner_steps", "head"))
    return float(query_loss(small_world().net, theta, task, lr, steps, graph_grad, head)[0].detach())


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("head", ["maml", "anil", "protonet"])
def test_pixel_gradients_equal_finite_differences_of_the_outer_loss(device, head, part):
    shared = grad_values(device, head)
    parts = {
        "support": normal(4, 3, 16, 16, seed=1, device=device),
        "query": normal(6, 3, 16, 16, seed=2, device=device),
    }
    values = {k: v.cpu().numpy() for k, v in parts.items()}
    (found,) = eci.grad(FakeShard(small_world(cards=0), device=device), [Job(index=0, seed=0, values=values)], shared)
    assert found["loss"] == pytest.approx(outer(shared, **parts), rel=1e-9)
    direction = normal(*parts[part].shape, seed=3, device=device)
    eps = 1e-7  # small: the net has kinks
    up, down = (outer(shared, **parts | {part: parts[part] + e * direction}) for e in (eps, -eps))
    measured = (up - down) / (2 * eps)
    assert abs(measured) > 1e-3
    assert float((torch.tensor(found[part], device=device) * direction).sum()) == pytest.approx(measured, rel=1e-4)


def test_gradients_of_several_tasks_come_in_their_order(device):
    shared, shard = grad_values(device, "maml"), FakeShard(small_world(cards=0), device=device)
    jobs = [
        Job(
            index=i,
            seed=0,
            values={k: normal(4, 3, 16, 16, seed=i, device=device).cpu().numpy() for k in ("support", "query")},
        )
        for i in range(2)
    ]
    together, apart = eci.grad(shard, jobs, shared), [eci.grad(shard, [job], shared)[0] for job in jobs]
    for a, b in zip(together, apart, strict=True):
        assert a["loss"] == b["loss"]
        assert np.array_equal(a["support"], b["support"])
    assert together[0]["loss"] != together[1]["loss"]


def test_without_inner_steps_the_support_gets_no_gradient(device):
    values = {k: normal(4, 3, 16, 16, seed=i, device=device).cpu().numpy() for i, k in enumerate(("support", "query"))}
    shard, one = FakeShard(small_world(cards=0), device=device), Job(index=0, seed=0, values=values)
    (found,) = eci.grad(shard, [one], grad_values(device, "maml", steps=0))
    assert np.abs(found["support"]).max() == 0
    assert np.abs(found["query"]).max() > 0
