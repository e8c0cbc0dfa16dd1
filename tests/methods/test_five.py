"""FIVE: recovery of a task from one teacher, against an independent copy and finite differences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import losses
from ray_dfml.core.episodes import interleaved
from ray_dfml.core.generators import Generator
from ray_dfml.core.images import normalise, to_bytes, to_pixels, view
from ray_dfml.methods.free import method as free
from ray_dfml.methods.free.five import five
from ray_dfml.types import Arrays, Job
from tests.support import (
    FakeShard,
    FakeTeacher,
    alike,
    card,
    double_by_default,
    normal,
    random_teacher,
    slope,
    small_config,
    small_world,
)

PLAIN: dict[str, Any] = {"crop_pad": 0, "flip": "off", "steps": 3, "lr_generator": 0.01, "lr_latent": 0.02}
"""Without random views, so that a loss can be evaluated again; large steps, so that they show."""


class Case:
    """A random teacher, a narrow generator, and a learner."""

    def __init__(self, device: torch.device, channels: int = 3) -> None:
        self.teacher = random_teacher(card(0, channels=channels), device)
        self.net_g = Generator((channels, 16, 16), 8, 4)
        self.theta_g = self.net_g.init(torch.Generator().manual_seed(1)).to(device)
        self.theta = self.teacher.net.init(torch.Generator().manual_seed(2)).to(device)

    def double(self) -> "Case":
        self.teacher, self.theta_g, self.theta = self.teacher.double(), self.theta_g.double(), self.theta.double()
        return self

    def run(self, *, learner: bool = False, seed: int = 3, **changes: Any) -> tuple[Arrays, Tensor]:
        image = self.teacher.card.image
        mean, std = (torch.tensor(v, dtype=self.theta.dtype, device=self.theta.device) for v in (image.mean, image.std))

        def judge(pixels: Tensor) -> Tensor:
            return self.teacher.net(self.theta, normalise(pixels[0], mean, std))[None]

        cfg, asked = small_config(**changes), judge if learner else None
        (task,), adapted = five(
            cfg, self.net_g, [self.teacher], self.theta_g[None], asked, [seed], way=2, batched=False
        )
        return task, adapted[0]


def codes(device: torch.device, n: int, latent: int, seed: int) -> Tensor:
    return torch.randn(n, latent, generator=torch.Generator().manual_seed(seed)).to(device)


def independent_copy(
    device: torch.device, case: Case, cfg: free.Config, *, learner: bool, seed: int
) -> tuple[Tensor, Tensor, Callable]:
    """Adapted generator weights and codes by `torch.optim.Adam`, and the final loss as a function of these weights."""
    teacher, labels = case.teacher, interleaved(2, cfg.images_per_class).to(device)
    theta_g, z = case.theta_g.clone().requires_grad_(), codes(device, len(labels), cfg.latent, seed).requires_grad_()

    def see(weights: Tensor, z: Tensor) -> Tensor:
        return (case.net_g(weights, z) - 0.5) / 0.25

    def loss(weights: Tensor, z: Tensor, student: Tensor) -> Tensor:
        t = teacher.net(teacher.theta, see(weights, z), teacher.stats)
        value = F.cross_entropy(t, labels)
        if learner:
            agree = (t.argmax(1) == student.argmax(1)).double()
            p, q = t.softmax(1), student.softmax(1)
            term = -(p * (p / q).log()).sum(1) if cfg.adversarial_form == "kl" else (p * q).sum(1)
            value = value + cfg.adversarial * (agree * term).mean()
        return value

    adam = torch.optim.Adam(
        [{"params": [theta_g], "lr": cfg.lr_generator}, {"params": [z], "lr": cfg.lr_latent}], betas=(0.5, 0.999)
    )
    for _ in range(cfg.steps):
        adam.zero_grad()
        student = teacher.net(case.theta, see(theta_g, z)).detach()
        loss(theta_g, z, student).backward()
        adam.step()
    theta_g, z = theta_g.detach(), z.detach()
    frozen = teacher.net(case.theta, see(theta_g, z))
    return theta_g, z, lambda weights: loss(weights, z, frozen)


@pytest.mark.parametrize(("learner", "form"), [(False, "kl"), (True, "kl"), (True, "probdot")])
def test_meta_gradient_equals_finite_differences_of_the_final_loss_at_the_adapted_weights(
    device: torch.device, learner, form
):
    case, changes = Case(device).double(), PLAIN | {"adversarial_form": form}
    with double_by_default():
        task, adapted = case.run(learner=learner, **changes)
        theta_g, z, final = independent_copy(device, case, small_config(**changes), learner=learner, seed=3)
        torch.testing.assert_close(adapted, theta_g, rtol=1e-9, atol=1e-11)
        assert np.array_equal(task["images"], to_bytes(case.net_g(theta_g, z)))
        direction = normal(theta_g.numel(), seed=4, device=device)
        measured = slope(final, theta_g, direction, eps=1e-8)  # small: the nets have kinks
    assert (theta_g - case.theta_g).abs().max() > 1e-3
    assert float(torch.tensor(task["grad"], device=device) @ direction) == pytest.approx(measured, rel=1e-5)


def test_last_loss_is_the_loss_of_the_returned_images(device: torch.device):
    case = Case(device).double()
    with double_by_default():
        task, _ = case.run(**PLAIN)
        theta_g, _, final = independent_copy(device, case, small_config(**PLAIN), learner=False, seed=3)
        assert task["loss_last"] == pytest.approx(float(final(theta_g)), rel=1e-9)
        assert task["ce"] == pytest.approx(task["loss_last"], rel=1e-9)


@pytest.mark.parametrize("final_pass", [True, False])
def test_without_steps_the_gradient_is_the_plain_one(device: torch.device, final_pass):
    case, cfg = Case(device).double(), small_config(**PLAIN)
    with double_by_default():
        task, adapted = case.run(**PLAIN | {"steps": 0, "final_pass": final_pass})
        z = codes(device, 2 * cfg.images_per_class, cfg.latent, 3)
    leaf, labels = case.theta_g.clone().requires_grad_(), interleaved(2, cfg.images_per_class).to(device)
    images = case.net_g(leaf, z)
    logits = case.teacher.net(case.teacher.theta, (images - 0.5) / 0.25, case.teacher.stats)
    F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(torch.tensor(task["grad"], device=device), leaf.grad, rtol=1e-8, atol=1e-12)
    assert np.array_equal(task["images"], to_bytes(images))
    assert torch.equal(adapted, case.theta_g)
    assert task["loss_first"] == task["loss_last"]


def test_without_the_final_pass_images_and_gradient_come_from_before_the_last_update(device: torch.device):
    case = Case(device)
    released, released_adapted = case.run(steps=3, final_pass=False)
    early, early_adapted = case.run(steps=2, final_pass=True)
    late, late_adapted = case.run(steps=3, final_pass=True)
    for name in ("images", "grad", "logits"):
        assert alike(released[name], early[name], device), name
    assert not np.array_equal(released["grad"], late["grad"])
    assert alike(released_adapted, late_adapted, device)
    assert not torch.equal(released_adapted, early_adapted)


def test_arguments_are_left_untouched(device: torch.device):
    case = Case(device)
    tensors = [case.theta_g, case.theta, case.teacher.theta, case.teacher.stats]
    copies = [t.clone() for t in tensors]
    _, adapted = case.run(learner=True, bn_weight=1.0, steps=3)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))
    assert not any(t.requires_grad for t in [*tensors, adapted])
    assert not torch.equal(adapted, case.theta_g)


def test_inversion_lowers_the_loss_on_average_over_seeds(device: torch.device):
    case = Case(device)
    found = [case.run(seed=seed, steps=25, lr_generator=0.01, lr_latent=0.05, crop_pad=1)[0] for seed in range(5)]
    first, last = (np.mean([task[name] for task in found]) for name in ("loss_first", "loss_last"))
    assert last < 0.8 * first
    assert np.mean([task["accuracy"] for task in found]) > 80


def test_results_depend_on_the_seed_alone(device: torch.device):
    one, same, other = (Case(device).run(learner=True, seed=seed) for seed in (3, 3, 4))
    assert one[0].keys() == same[0].keys()
    for name, value in one[0].items():
        assert alike(value, same[0][name], device), name
    assert alike(one[1], same[1], device)
    assert not np.array_equal(one[0]["images"], other[0]["images"])


@pytest.mark.parametrize(
    ("flip", "channels", "mirrors"),
    [("auto", 3, {False, True}), ("auto", 1, {False}), ("on", 1, {False, True}), ("off", 3, {False})],
)
def test_auto_mirrors_colour_images_only(device: torch.device, flip, channels, mirrors):
    case = Case(device, channels)
    views = [case.run(seed=seed, steps=0, flip=flip)[0]["view"] for seed in range(12)]
    assert {mirror for *_, mirror in views} == mirrors


@pytest.mark.parametrize("channels", [1, 3])
def test_a_task_has_the_layout_it_claims(device: torch.device, channels):
    case = Case(device, channels)
    task, _ = case.run(images_per_class=5)
    assert task["images"].shape == (10, channels, 16, 16)
    assert task["images"].dtype == np.uint8
    assert task["labels"].tolist() == [0, 1] * 5
    assert task["grad"].shape == (case.net_g.layout.numel,)
    assert np.isfinite(task["grad"]).all()


def test_logits_are_those_of_the_stored_bytes_under_the_stored_view(device: torch.device):
    case, cfg = Case(device), small_config()
    task, _ = case.run()
    seen = view(to_pixels(task["images"], device=device), task["view"], pad=cfg.crop_pad, fill=cfg.crop_fill)
    mean, std = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    expected = case.teacher.net(case.teacher.theta, normalise(seen, mean, std), case.teacher.stats)
    torch.testing.assert_close(torch.tensor(task["logits"], device=device), expected)


def test_spread_is_the_rms_pixel_distance_within_classes(device: torch.device):
    task, _ = Case(device).run()
    pixels = task["images"].reshape(8, -1) / 255.0
    rms = [
        np.mean([np.sqrt(np.mean((rows[i] - rows[j]) ** 2)) for i in range(4) for j in range(i)])
        for rows in (pixels[task["labels"] == c] for c in range(2))
    ]
    assert task["spread"] == pytest.approx(np.mean(rms), abs=2 / 255)


def test_the_adversarial_term_acts_only_with_a_learner_and_a_weight(device: torch.device):
    case = Case(device)
    without = case.run(adversarial=0.0)[0]["grad"]
    assert alike(case.run(adversarial=5.0)[0]["grad"], without, device)
    assert alike(case.run(learner=True, adversarial=0.0)[0]["grad"], without, device)
    assert not np.allclose(case.run(learner=True, adversarial=5.0)[0]["grad"], without)


def test_prior_terms_add_their_weighted_value_to_the_loss(device: torch.device):
    case, cfg = Case(device), small_config(**PLAIN)
    teacher: FakeTeacher = case.teacher
    images = case.net_g(case.theta_g, codes(device, 8, cfg.latent, 3))
    found = teacher.net.with_stats(teacher.theta, (images - 0.5) / 0.25, teacher.stats)[1]
    expected = {
        "bn_weight": float(losses.batch_norm_distance(found, teacher.stats)),
        "tv_weight": float(losses.total_variation(images)),
    }
    base = case.run(**PLAIN)[0]
    for name, value in expected.items():
        weighed: dict[str, Any] = PLAIN | {name: 2.0}
        task = case.run(**weighed)[0]
        assert task["loss_first"] - base["loss_first"] == pytest.approx(2.0 * value, rel=1e-3, abs=1e-5)
        assert not np.allclose(task["grad"], base["grad"])


@pytest.mark.parametrize("name", ["bn_weight", "tv_weight"])
def test_prior_terms_lower_what_they_weigh(device: torch.device, name):
    case = Case(device)
    strong: dict[str, Any] = PLAIN | {"steps": 15}
    values = []
    for weight in (0.0, 10.0):
        images = to_pixels(case.run(**strong | {name: weight})[0]["images"], device=device)
        if name == "tv_weight":
            values.append(float(losses.total_variation(images)))
        else:
            teacher = case.teacher
            found = teacher.net.with_stats(teacher.theta, (images - 0.5) / 0.25, teacher.stats)[1]
            values.append(float(losses.batch_norm_distance(found, teacher.stats)))
    assert values[1] < values[0]


def run_jobs(device: torch.device, world, state, cfg, jobs: list[Job], r: int = 1) -> list[Arrays]:
    return FakeShard(world, device=device).send("free.recover", jobs, free.shared(cfg, world, state, r))


def test_recovered_tasks_do_not_depend_on_how_jobs_are_sharded(device: torch.device):
    world, cfg = small_world(), small_config(teachers_per_round=3)
    state = free.init(cfg, world)
    jobs = free.plan(cfg, world, state, 1)
    together = run_jobs(device, world, state, cfg, jobs)
    apart = [run_jobs(device, world, state, cfg, [job])[0] for job in reversed(jobs)][::-1]
    for a, b in zip(together, apart, strict=True):
        assert a["teacher"] == b["teacher"]
        for name in ("images", "grad", "logits"):
            assert alike(a[name], b[name], device)


def test_a_sequential_generator_continues_where_the_teacher_before_left_it(device: torch.device):
    world, cfg = small_world(), small_config(generator_sharing="sequential")
    state = free.init(cfg, world)
    theta_g, shard = state["theta_g"].to(device), FakeShard(world, device=device)
    net_g = Generator(world.image.shape, cfg.latent, cfg.width)
    after, _ = free.learn(cfg, world, state, 0, [], shard.send)
    for job in free.plan(small_config(), world, state, 0):
        teachers = [shard.teacher(str(job.teacher))]
        (expected,), (theta_g,) = five(cfg, net_g, teachers, theta_g[None], None, [job.seed], way=2, batched=False)
        assert expected["teacher"] == job.teacher
    assert alike(after["theta_g"], theta_g, device)


def test_a_learner_may_judge_images_of_a_teacher_with_another_architecture(device: torch.device):
    world = small_world(cards=1, arch="resnet10")
    cfg = small_config(teachers_per_round=1, steps=0, images_per_class=2)
    state = free.init(cfg, world)
    assert world.arch == "conv4"
    (found,) = run_jobs(device, world, state, cfg, free.plan(cfg, world, state, 1))
    assert np.isfinite(found["grad"]).all()


@pytest.mark.parametrize("bn_weight", [0.0, 0.5])
def test_batched_slots_equal_slots_one_by_one(device: torch.device, bn_weight: float):
    world = small_world(cards=3)
    cfg = small_config(steps=2, bn_weight=bn_weight)
    shard, net_g = FakeShard(world, device=device), Generator(world.image.shape, cfg.latent, cfg.width)
    teachers = [shard.teacher(c.id).double() for c in world.cards]
    theta_g = net_g.init(torch.Generator().manual_seed(1)).to(device).double()
    learner = world.net.init(torch.Generator().manual_seed(2)).to(device).double()

    def judge(pixels: Tensor) -> Tensor:
        return torch.stack([world.net(learner, one) for one in pixels])

    with double_by_default():
        starts = theta_g.expand(3, -1)
        batched, weights = five(cfg, net_g, teachers, starts, judge, [5, 6, 7], way=2, batched=True)
        for j, seed in enumerate((5, 6, 7)):
            (task,), alone = five(cfg, net_g, [teachers[j]], theta_g[None], judge, [seed], way=2, batched=False)
            torch.testing.assert_close(weights[j], alone[0], rtol=0, atol=1e-8)
            np.testing.assert_allclose(batched[j]["grad"], task["grad"], rtol=0, atol=1e-8)
            assert np.abs(batched[j]["images"].astype(int) - task["images"].astype(int)).max() <= 1


def test_an_accelerator_batches_and_gives_the_same_tasks_within_rounding(device: torch.device):
    world = small_world(cards=3)
    cfg = small_config(teachers_per_round=3)
    state = free.init(cfg, world)
    jobs = free.plan(cfg, world, state, 1)
    alone, together = FakeShard(world, device=device), FakeShard(world, device=device)
    together.batched = True
    one = free.recover(alone, jobs, free.shared(cfg, world, state, 1))
    all_ = free.recover(together, jobs, free.shared(cfg, world, state, 1))
    for a, b in zip(one, all_, strict=True):
        assert a["teacher"] == b["teacher"]
        np.testing.assert_allclose(a["logits"], b["logits"], atol=1e-2)
