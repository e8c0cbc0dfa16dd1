"""BiDf-MKD: two sets of a teacher, the distillation between them, and the gradient through it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_dfml.core import losses, seeds
from ray_dfml.core.generators import generator
from ray_dfml.core.images import normalise, to_bytes, to_pixels, view
from ray_dfml.core.inner_loop import Loss, adapt, adapted, plain_grad
from ray_dfml.methods.base import World, image_values
from ray_dfml.methods.bidf import distillation, sets
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.inversion import Inversion, Judge
from ray_dfml.types import Arrays, Job
from tests.support import FakeShard, alike, card, normal, small_bidf, small_world

WORLD = small_world()
MEAN, STD = torch.full((3,), 0.5), torch.full((3,), 0.25)


def synthesize(
    device: torch.device, cfg: bidf.Config, judge: Judge | None = None, *, seed: int = 3, stream: str = "support"
) -> Arrays:
    teachers = [FakeShard(WORLD, device=device).teacher("conv4-0")]
    (task,) = sets.synthesize(
        cfg, teachers, judge, [seed], WORLD.image.shape, 2, device=device, batched=False, stream=stream
    )
    return task


def seen(cfg: bidf.Config, task: Arrays, like: Tensor) -> Tensor:
    """The stored images under the stored view, normalised for a learner of the kind and on the device of `like`."""
    pixels = view(to_pixels(task["images"], like.device), task["view"], pad=cfg.crop_pad, fill=cfg.crop_fill)
    return normalise(pixels, MEAN.to(like), STD.to(like))


def recover(
    device: torch.device, cfg: bidf.Config, world: World = WORLD, *, batched: bool = False, **changes: Any
) -> list[Arrays]:
    """The results of a first round whose plan is one job per teacher."""
    state, shard = bidf.init(cfg, world), FakeShard(world, batched=batched, device=device)
    jobs = [Job(index=j, seed=j, teacher=c.id) for j, c in enumerate(world.cards)]
    return sets.recover(shard, jobs, bidf.shared(cfg, world, state, 0) | changes)


def values(cfg: bidf.Config, **changes: Any) -> tuple[Arrays, Arrays]:
    """A `bidf.grad` job and its shared values, in float64: noise, and logits of an imaginary teacher."""
    rng = np.random.default_rng(0)
    job: Arrays = {}
    for i, kind in enumerate(("support", "query")):
        images = rng.integers(0, 256, (6, *WORLD.image.shape), dtype=np.uint8)
        job[kind] = {"images": images, "view": (4, 5, i == 1), "logits": 2 * normal(6, 2, seed=i).numpy()}
    theta = WORLD.net.init(torch.Generator().manual_seed(0)).double() + 0.1 * normal(WORLD.net.layout.numel)
    numbers = {"theta": theta.numpy(), "mean": MEAN.double().numpy(), "std": STD.double().numpy()}
    return job, image_values(WORLD.image) | numbers | {"cfg": cfg.model_dump(), "arch": "conv4", "way": 2} | changes


def grad(device: torch.device, job: Arrays, shared: Arrays) -> Arrays:
    return distillation.grad(
        FakeShard(small_world(cards=0), device=device), [Job(index=0, seed=0, values=job)], shared
    )[0]


def loss_on(cfg: bidf.Config, task: Arrays) -> Loss:
    """The distillation loss of learner weights on a set."""
    soft = torch.tensor(task["logits"])
    return lambda w: losses.distillation(soft.to(w.device), WORLD.net(w, seen(cfg, task, w)), form=cfg.distill)


@pytest.mark.parametrize("form", ["kl", "probdot"])
def test_the_gradient_equals_finite_differences_through_the_inner_steps(device, form):
    """The inner steps are large, so that the slope would differ without the second-order term."""
    cfg = small_bidf(inner_lr=0.5, inner_steps=3, distill=form)
    job, shared = values(cfg)
    found, direction = grad(device, job, shared), normal(len(shared["theta"]), seed=5)
    eps = 1e-8  # small: the net has kinks
    up, down = (
        grad(device, job, shared | {"theta": shared["theta"] + e * direction.numpy()})["loss"] for e in (eps, -eps)
    )
    measured = (up - down) / (2 * eps)
    assert float(torch.tensor(found["grad"]) @ direction) == pytest.approx(measured, rel=1e-4)
    theta = torch.tensor(shared["theta"])
    phi = adapt(loss_on(cfg, job["support"]), theta, lr=0.5, steps=3, grad_of=plain_grad)
    first_order = float(plain_grad(loss_on(cfg, job["query"]))(phi) @ direction)
    assert abs(first_order - measured) > 0.01 * abs(measured)


@pytest.mark.parametrize("changes", [{"inner_steps": 0}, {"inner_lr": 1e-12}])
def test_without_inner_distillation_the_gradient_is_that_of_the_query_s_distillation(device, changes):
    cfg = small_bidf(**changes)
    job, shared = values(cfg)
    found, loss = grad(device, job, shared), loss_on(cfg, job["query"])
    theta = torch.tensor(shared["theta"]).requires_grad_()
    torch.testing.assert_close(torch.tensor(found["grad"]), torch.autograd.grad(loss(theta), theta)[0])
    rounding = 1e-9 if device.type == "cpu" else 1e-6  # another device's logits, in float32
    assert found["loss"] == pytest.approx(float(loss(theta).detach()), rel=rounding)
    logits = WORLD.net(theta, seen(cfg, job["query"], theta))
    soft = torch.tensor(job["query"]["logits"])
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == soft.argmax(1)).double().mean()))


def test_the_inner_distillation_moves_the_outer_one(device):
    """Support and query are not exchanged, and the inner loss is the outer's: steps lower it on the support."""
    cfg = small_bidf(inner_lr=0.1, inner_steps=5)
    job, shared = values(cfg)
    itself, plain = job | {"query": job["support"]}, shared | {"cfg": cfg.model_dump() | {"inner_steps": 0}}
    assert grad(device, itself, shared)["loss"] < 0.8 * grad(device, itself, plain)["loss"]
    swapped = {"support": job["query"], "query": job["support"]}
    assert abs(grad(device, swapped, shared)["loss"] - grad(device, job, shared)["loss"]) > 1e-3


def test_the_images_of_the_lowest_loss_are_kept(device, monkeypatch):
    cfg, tried = small_bidf(iterations=12, lr_generator=0.3, crop_pad=0, flip="off"), []
    original = Inversion.losses

    def spy(self: Inversion, *parts: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = original(self, *parts)
        tried.append(tuple(part.detach() for part in found))
        return found

    monkeypatch.setattr(Inversion, "losses", spy)
    bests = set()
    for seed in range(8):
        tried.clear()
        task = synthesize(device, cfg, seed=seed)
        assert len(tried) == 12
        found = [float(loss) for loss, _, _ in tried]
        best = int(np.argmin(found))
        bests.add(best)
        assert task["loss_first"] == found[0]
        assert task["loss_last"] == task["ce"] == found[best]
        assert np.array_equal(task["images"], to_bytes(tried[best][1][0]))
    assert bests - {0, 11}


@pytest.mark.parametrize(("spoilt", "kept"), [((0,), True), ((1, 2), True), ((0, 1, 2, 3), False)])
@pytest.mark.parametrize("batched", [False, True])
def test_a_pass_without_a_finite_loss_is_never_the_best_and_moves_nothing(device, monkeypatch, batched, spoilt, kept):
    """Only a teacher without any finite loss is rejected, and its neighbour in the batch is not affected."""
    cfg, original, calls, made = small_bidf(iterations=4, boundary=False), Inversion.losses, [], list[Tensor]()

    def spoil(self: Inversion, *parts: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = original(self, *parts)
        rows = torch.tensor([t.card.id == "conv4-0" for t in self.teachers], device=found[0].device)
        calls.append(rows)
        passed = sum(bool((one == rows).all()) for one in calls if one.shape == rows.shape) - 1
        bad = rows & (passed % cfg.iterations in spoilt)
        made.extend(found[1][rows].detach())
        return found[0] * torch.where(bad, math.nan, 1.0), *found[1:]

    sound = recover(device, cfg, batched=batched)
    monkeypatch.setattr(Inversion, "losses", spoil)
    first, *others = recover(device, cfg, batched=batched)
    assert all(alike(one, other, device) for one, other in zip(others, sound[1:], strict=True))
    assert [torch.equal(made[i + 1], made[i]) for i in range(3)] == [i in spoilt for i in range(3)], "no momentum"
    if not kept:
        assert first == {"rejected": "the inversion loss is not finite"}
        return
    for kind in ("support", "query"):
        assert -math.inf < first[kind]["loss_last"] <= first[kind]["loss_first"] < math.inf


def test_a_set_follows_the_framework_s_adam_from_a_fresh_generator(device):
    cfg = small_bidf(iterations=3, crop_pad=0, flip="off", conditional=False, lr_generator=0.01)
    teacher, rng = FakeShard(WORLD, device=device).teacher("conv4-0"), seeds.rng(3, "support")
    net_g, labels = generator(WORLD.image.shape, 8, 4), torch.arange(2, device=device).repeat(4)
    theta_g = net_g.reset(rng).to(device).requires_grad_()
    z = torch.randn(8, 8, generator=rng).to(device).requires_grad_()
    adam, values = torch.optim.Adam([theta_g, z], lr=0.01, betas=(0.5, 0.999)), []
    for _ in range(3):
        adam.zero_grad()
        images = net_g(theta_g, z)
        logits = teacher.net(teacher.theta, normalise(images, MEAN.to(device), STD.to(device)), teacher.stats)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        adam.step()
        values.append(float(loss.detach()))
    task = synthesize(device, cfg)
    assert [task["loss_first"], task["loss_last"]] == pytest.approx([values[0], min(values)], rel=1e-4)
    assert min(values) == values[-1] < values[0] - 1e-3
    assert np.abs(task["images"].astype(int) - to_bytes(images).astype(int)).max() <= 1


def test_inversion_finds_images_of_the_wished_classes(device):
    task = synthesize(device, small_bidf(iterations=40, lr_generator=0.02, crop_pad=1))
    assert task["loss_last"] < 0.6 * task["loss_first"]
    assert task["accuracy"] == 100


@pytest.mark.parametrize("conditional", [True, False])
def test_a_generator_is_told_the_label_or_not(device, conditional, monkeypatch):
    made = []
    monkeypatch.setattr(sets, "generator", lambda *shape: made.append(shape) or generator(*shape))
    synthesize(device, small_bidf(conditional=conditional, iterations=1))
    assert made == [(WORLD.image.shape, 8, 4, 2 if conditional else 0)]


def test_seeds_alone_decide_a_set(device):
    cfg = small_bidf()
    assert alike(synthesize(device, cfg), synthesize(device, cfg), device)
    assert not np.array_equal(synthesize(device, cfg)["images"], synthesize(device, cfg, seed=4)["images"])
    assert not np.array_equal(synthesize(device, cfg)["images"], synthesize(device, cfg, stream="query")["images"])


def test_the_query_set_is_recovered_against_the_distilled_weights(device):
    """Both sets by hand: support without a judge, phi by steps on it, query with phi as the judge."""
    cfg = small_bidf(inner_lr=0.5, inner_steps=3, adversarial=5.0)
    found, theta = recover(device, cfg)[0], bidf.init(cfg, WORLD)["theta"].to(device)
    support = synthesize(device, cfg, seed=0)
    assert alike(found["support"], support, device)
    soft = torch.tensor(support["logits"], device=device).softmax(1)
    phi = adapted(WORLD.net, theta, seen(cfg, support, theta), soft, head="maml", lr=0.5, steps=3, grad_of=plain_grad)
    torch.testing.assert_close(phi, adapt(loss_on(cfg, support), theta, lr=0.5, steps=3, grad_of=plain_grad))
    queries = {}
    for name, weights in (("phi", phi), ("theta", theta)):
        queries[name] = synthesize(
            device, cfg,
            lambda pixels, w=weights: WORLD.net(w, normalise(pixels[0], MEAN.to(w), STD.to(w)), first_order=True)[None],
            seed=0, stream="query",
        )  # fmt: skip
    queries["none"] = synthesize(device, cfg, seed=0, stream="query")
    assert alike(found["query"], queries["phi"], device)
    assert found["query"]["loss_last"] != queries["theta"]["loss_last"]
    assert found["query"]["loss_last"] < queries["none"]["loss_last"]
    still = recover(device, small_bidf(inner_steps=0, adversarial=5.0))[0]
    assert alike(still["support"], found["support"], device)
    assert alike(still["query"], queries["theta"], device)


def test_without_the_boundary_no_disagreement_is_in_the_query_s_loss(device):
    cfg = small_bidf(boundary=False, adversarial=5.0)
    found = recover(device, cfg)[0]
    assert alike(found["query"], synthesize(device, cfg, seed=0, stream="query"), device)
    with_ = recover(device, small_bidf(adversarial=5.0))[0]
    assert alike(found["support"], with_["support"], device)
    assert with_["query"]["loss_first"] < found["query"]["loss_first"]


@pytest.mark.parametrize(("boundary", "updates", "expected"), [(True, 6, False), (True, 7, True), (False, 7, False)])
def test_the_boundary_counts_after_so_many_updates(boundary, updates, expected):
    cfg = small_bidf(boundary=boundary, boundary_after=7)
    state = {**bidf.init(cfg, WORLD), "updates": updates}
    assert bidf.shared(cfg, WORLD, state, 0)["boundary"] is expected


def test_teachers_at_once_give_what_they_give_one_by_one(device):
    world = replace(WORLD, cards=(card(0), card(1), card(2, arch="conv4-64"), card(3, way=3)))
    one, all_ = (
        recover(device, small_bidf(iterations=2, adversarial=0.0), world, batched=batched) for batched in (False, True)
    )
    for a, b in zip(one, all_, strict=True):
        for kind in ("support", "query"):
            assert a[kind]["teacher"] == b[kind]["teacher"]
            assert a[kind]["classes"] == b[kind]["classes"]
            assert a[kind]["loss_last"] == pytest.approx(b[kind]["loss_last"], abs=1e-3)
            np.testing.assert_allclose(a[kind]["logits"], b[kind]["logits"], atol=2e-2)


@pytest.mark.parametrize("batched", [False, True])
def test_task_models_at_once_judge_as_they_do_one_by_one(device, batched):
    cfg, theta = small_bidf(inner_lr=0.5), bidf.init(small_bidf(), WORLD)["theta"].to(device)
    supports = [one["support"] for one in recover(device, cfg)]
    mean, std = MEAN.to(device), STD.to(device)
    judge = distillation.task_models(cfg, WORLD.net, theta, supports, mean, std, batched)
    pixels = torch.rand(3, 8, *WORLD.image.shape, generator=torch.Generator().manual_seed(0)).to(device)
    for logits, support, x in zip(judge(pixels), supports, pixels, strict=True):
        phi = adapt(loss_on(cfg, support), theta, lr=0.5, steps=2, grad_of=plain_grad)
        torch.testing.assert_close(logits, WORLD.net(phi, normalise(x, mean, std)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batched", [False, True])
def test_a_teacher_of_bad_weights_is_rejected_alone(device, batched):
    cfg, shard = small_bidf(), FakeShard(WORLD, batched=batched, device=device)
    shard.spoil("conv4-1")
    del shard.teachers["conv4-2"]
    jobs = [Job(index=j, seed=j, teacher=c.id) for j, c in enumerate(WORLD.cards)]
    results = sets.recover(shard, jobs, bidf.shared(cfg, WORLD, bidf.init(cfg, WORLD), 0))
    assert results[1:] == [{"rejected": "the inversion loss is not finite"}, {"rejected": "conv4-2: unreadable"}]
    np.testing.assert_allclose(results[0]["support"]["logits"], recover(device, cfg)[0]["support"]["logits"], atol=2e-2)
    after, metrics = bidf.learn(cfg, WORLD, bidf.init(cfg, WORLD), 0, results[:1], shard.send)
    assert metrics["recover/tasks"] == 1
    assert sorted(after["bank"]) == ["toy/0", "toy/1"]
    nothing = bidf.init(cfg, WORLD)
    assert bidf.learn(cfg, WORLD, nothing, 0, [], shard.send) == (nothing, {"recover/tasks": 0})
