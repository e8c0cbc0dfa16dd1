"""Every op, backbone and generator on a device that this machine lacks: a tensor left on the CPU fails here."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_dfml import evaluate, top1
from ray_dfml.core.backbones import BACKBONES
from ray_dfml.core.generators import generator
from ray_dfml.core.net import net
from ray_dfml.data.pretrain import PretrainConfig
from ray_dfml.methods import METHODS, dro, icfil, replay
from ray_dfml.methods.base import World, image_values
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.bidf import sets
from ray_dfml.methods.free import bell
from ray_dfml.methods.free import method as free
from ray_dfml.methods.shared_answers import fit
from ray_dfml.methods.students.config import NAMES
from ray_dfml.ops import OPS
from ray_dfml.runtime.shard import Loaded, Shard
from ray_dfml.types import Arrays, Job, LearnerWeights
from tests.fake_device import faked, find_device
from tests.support import (
    FakeShard,
    card,
    image_spec,
    mixed_world,
    only_asked,
    random_bank,
    small_bidf,
    small_config,
    small_distiller,
    small_ideal,
    small_purer,
    small_shared_answers,
    small_world,
)

DEVICE = find_device()
BOTH = pytest.mark.parametrize("batched", [False, True], ids=["looped", "batched"])
Work = Iterator[tuple[list[Job], Arrays]]
"""Jobs of an op, and what they share."""


def shard_of(world: World, *, batched: bool) -> Shard:
    """A shard on the device that is not there, with random teachers. What they answer comes from the CPU."""
    fake = FakeShard(world)
    teachers = fake.teachers.items()
    loaded: dict[str, Loaded] = {id: (one.card, one.theta.numpy(), one.stats.numpy()) for id, one in teachers}
    made = Shard(loaded.__getitem__, device=DEVICE)
    made.service = fake.service  # pyright: ignore[reportAttributeAccessIssue]
    assert made.batched
    made.batched = batched
    return made


def run(shard: Shard, op: str, jobs: list[Job], shared: Arrays) -> list[Arrays]:
    with faked():
        results = shard.run(op, jobs, shared)
    assert len(results) == len(jobs)
    assert not any("rejected" in result or result.get("rejected_teachers") for result in results)
    return results


def large_world() -> World:
    """Teachers of three architectures that know more classes than the learner tells apart."""
    cards = [card(i, way=3, arch=arch) for i, arch in enumerate(("conv4", "conv4", "resnet10", "mlp"))]
    return replace(small_world(), cards=tuple(replace(one, id=f"{one.id} of 3") for one in cards))


DISTILLERS = ("dfme", "dafl", "zskt", "deepinversion", "cmi", "dast", "zsdb3")

SETTINGS: dict[str, list[tuple[World, Any]]] = {
    **{name: [(small_world(), small_distiller(name))] for name in DISTILLERS},
    "free": [
        (small_world(), small_config()),
        (mixed_world(), small_config(bn_weight=0.1, tv_weight=0.1, adversarial_form="probdot", warmup=0)),
        (large_world(), small_config(teachers_per_round=4, flip="on", crop_fill="zero", bn_weight=0.1, steps=1)),
        (small_world(), small_config(generator_sharing="sequential", warmup=0)),
        (large_world(), small_config(images=("generator", "dip"), warmup=0)),
    ],
    "purer": [
        (small_world(), small_purer()), (mixed_world(), small_purer(bn_weight=0.0)), (large_world(), small_purer()),
    ],
    "bidf-mkd": [
        (small_world(), small_bidf()),
        (mixed_world(), small_bidf(conditional=False, bn_weight=0.1, distill="probdot")),
        (large_world(), small_bidf(iterations=2)),
        (only_asked(mixed_world(), "probs", "weights"), small_bidf(zero_order={"directions": 2}, tv_weight=0.1)),
        (only_asked(small_world(), "label"), small_bidf(images=("dip",))),
    ],
    "shared-answers": [
        (small_world(), small_shared_answers()),
        (only_asked(mixed_world(), "label", "weights"), small_shared_answers(answers="hard")),
    ],
    "ideal": [
        (small_world(cards=1), small_ideal(images=NAMES, budget=16)),
        (small_world(cards=1), small_ideal(reset=False, warp=0.0, crop_pad=2, budget=16)),
        (small_world(cards=1), small_ideal(requery=True, training="pass", code="fixed", optimiser="sgd", warp=0.0)),
        (mixed_world(), small_ideal(answers="soft", budget=16)),
        (small_world(cards=1), small_ideal(generator="dcgan", budget=16)),
        (small_world(cards=1), small_ideal(generator="transformer", budget=16)),
    ],
}  # fmt: skip
"""Of the methods that recover something. The others are sent no recovery, and their op takes no jobs."""


def recovery(name: str) -> Work:
    """A first round, and one after the warm-up."""
    for world, cfg in SETTINGS[name]:
        method = METHODS[name]
        state = method.init(cfg, world)
        for r in {0, getattr(cfg, "warmup", 0)}:
            yield method.plan(cfg, world, state, r), method.shared(cfg, world, state, r)


def pushed() -> Work:
    """Images of PURER that the curriculum pushes."""
    for jobs, shared in recovery("purer"):
        yield [replace(job, values=job.values | {"push": job.values["x"]}) for job in jobs], shared


def meta_tasks(*dtypes: type) -> Work:
    cfg, world = small_config().replay, small_world()
    state = {"theta": world.net.init(torch.Generator().manual_seed(0))}
    tasks = replay.draw(cfg, world, random_bank(4, 5, world.image.shape), ("devices",))
    for head in ("maml", "anil", "protonet"):
        for dtype in dtypes:
            jobs = [
                Job(index=t, seed=0, values={name: images.astype(dtype) for name, images in task.items()})
                for t, task in enumerate(tasks)
            ]
            yield jobs, replay.shared_values(cfg, replace(world, head=head), state)


def distillations() -> Work:
    for world, cfg in SETTINGS["bidf-mkd"][:2]:
        state = METHODS["bidf-mkd"].init(cfg, world)
        jobs, shared = bidf.plan(cfg, world, state, 0), bidf.shared(cfg, world, state, 0)
        found = sets.recover(FakeShard(world), jobs, shared)
        yield [Job(index=j, seed=0, values=result) for j, result in enumerate(found)], shared


def episodes() -> Work:
    world, shot = small_world(), 2
    labels = np.arange(4).repeat(5)
    images = np.zeros((len(labels), *world.image.shape), np.uint8)
    theta, stats = world.net.init(torch.Generator().manual_seed(0)), world.net.initial_stats()
    for bn, head, steps, reading in [
        ("transductive", "maml", 0, "finetune"), ("support", "maml", 0, "finetune"), ("running", "maml", 0, "finetune"),
        ("transductive", "anil", 0, "finetune"), ("support", "protonet", 0, "finetune"),
        ("transductive", "maml", 2, "finetune"), ("running", "anil", 2, "finetune"),
        ("running", "maml", 0, "direct"), ("running", "maml", 0, "assign"),
    ]:  # fmt: skip
        cfg = evaluate.EvalConfig(
            bn=bn, steps=2, query=3, icfil=icfil.IcfilConfig(steps=steps, inversion_steps=2, images=2, head="fresh")
        )  # fmt: skip
        learner = LearnerWeights(
            arch="conv4", image=world.image, outputs=2, theta=theta, stats=stats, head=head, steps=cfg.steps, lr=cfg.lr
        )
        shared = evaluate.shared(cfg, learner, reading=reading, images=images, labels=labels)
        yield evaluate.jobs(cfg, way=2, shot=shot, stop=1), shared


def second_rounds() -> Work:
    """Of IDEAL, with images that are known already."""
    for world, cfg in SETTINGS["ideal"]:
        shard, state, method = FakeShard(world), METHODS["ideal"].init(cfg, world), METHODS["ideal"]
        results = shard.send("ideal.recover", method.plan(cfg, world, state, 0), method.shared(cfg, world, state, 0))
        state, _ = method.learn(cfg, world, state, 0, results, shard.send)
        last = cfg.total_rounds - 1
        yield method.plan(cfg, world, state, last), method.shared(cfg, world, state, last)


def joint_fits() -> Work:
    """Of answers of teachers that differ in their number of classes."""
    for world, cfg in SETTINGS["shared-answers"]:
        shard, method = FakeShard(world), METHODS["shared-answers"]
        state = method.init(cfg, world)
        for r in range(cfg.total_rounds):
            jobs = method.plan(cfg, world, state, r)
            results = shard.send("shared-answers.recover", jobs, method.shared(cfg, world, state, r)) if jobs else []
            state, _ = method.learn(cfg, world, state, r, results, shard.send)
        for _, jobs in shard.sent[-cfg.fits :]:
            yield jobs, fit.shared_values(cfg, world)


def answers() -> Work:
    world = small_world()
    student = METHODS["ideal"].students(small_ideal(), world, METHODS["ideal"].init(small_ideal(), world))
    shared = top1.shared(student[world.cards[0].id].weights, np.zeros((3, *world.image.shape), np.uint8))
    yield top1.jobs(np.arange(3), np.zeros(3, int)), shared


def weights() -> Work:
    yield [Job(index=i, seed=0, teacher=c.id) for i, c in enumerate(small_world().cards)], {}


def pretraining() -> Work:
    image, labels = image_spec(3), np.arange(2).repeat(6)
    values = image_values(image) | {
        "images": np.zeros((12, *image.shape), np.uint8), "labels": labels, "held_out": np.arange(12) % 6 == 0, "way": 2
    }  # fmt: skip
    archs = ("conv4", "resnet10", "mlp")
    jobs = [Job(index=i, seed=i, values=values | {"arch": arch}) for i, arch in enumerate(archs)]
    yield jobs, {"cfg": PretrainConfig(epochs=1, batch=6).model_dump()}


CASES: dict[str, Callable[[], Work]] = {
    "pretrain": pretraining,
    "evaluate": episodes,
    "weights": weights,
    "maml.grad": lambda: meta_tasks(np.uint8, np.float32),
    "purer.grad": lambda: meta_tasks(np.float32),
    "bidf.grad": distillations,
    "free.recover": lambda: recovery("free"),
    "purer.recover": lambda: (work for part in (recovery("purer"), pushed()) for work in part),
    "bidf-mkd.recover": lambda: recovery("bidf-mkd"),
    "ideal.recover": lambda: (work for part in (recovery("ideal"), second_rounds()) for work in part),
    "shared-answers.recover": lambda: recovery("shared-answers"),
    "shared-answers.fit": joint_fits,
    "top1": answers,
    **{f"{name}.recover": lambda name=name: recovery(name) for name in DISTILLERS},
}


def cases(op: str) -> list[tuple[list[Job], Arrays]]:
    """All work of an op; none for the recovery of a method that plans none."""
    if op in CASES:
        return list(CASES[op]())
    method = METHODS[op.removesuffix(".recover")]
    assert method.plan(method.Config(), small_world(), {}, 0) == []
    return [([], {})]


@BOTH
@pytest.mark.parametrize("op", OPS)
def test_every_op_keeps_its_tensors_on_the_device(op: str, batched: bool) -> None:
    worlds = (small_world(), mixed_world(), large_world())
    everyone = replace(small_world(), cards=tuple(one for world in worlds for one in world.cards))
    shard = shard_of(everyone, batched=batched)
    for jobs, shared in cases(op):
        run(shard, op, jobs, shared)


def test_teachers_live_on_the_device() -> None:
    with faked():
        teacher = shard_of(small_world(), batched=True).teacher("conv4-0")
        assert teacher.theta.device.type == teacher.stats.device.type == DEVICE.type


CALLS = pytest.mark.parametrize(
    ("batched", "first_order"), [(False, False), (False, True), (True, False)], ids=["looped", "first order", "batched"]
)


def gradients(call: Callable[..., Tensor], parts: tuple[Tensor, ...], *, batched: bool) -> tuple[Tensor, ...]:
    """Of a sum, with respect to its first two arguments: for every row of stacked arguments, or for the first row."""
    if batched:
        return torch.func.vmap(torch.func.grad(call, argnums=(0, 1)))(*parts)
    first, second, *rest = (part[0] for part in parts)
    leaves = first.requires_grad_(), second.requires_grad_()
    return torch.autograd.grad(call(*leaves, *rest), leaves)


@CALLS
@pytest.mark.parametrize("arch", BACKBONES)
def test_every_backbone_runs_forward_and_backward(arch: str, first_order: bool, batched: bool) -> None:
    network = net(arch, (3, 16, 16), 3)

    def call(w: Tensor, images: Tensor, given: Tensor) -> Tensor:
        total = network(w, images, first_order=first_order).sum()
        total = total + network(w, images, given, first_order=first_order).sum()
        total = total + network.features(w, images, first_order=first_order).sum()
        for fixed in (None, given):
            logits, found = network.with_stats(w, images, fixed, first_order=first_order)
            total = total + logits.sum() + found.sum()
        return total

    with faked():
        theta = torch.zeros(2, network.layout.numel, device=DEVICE)
        x = torch.zeros(2, 4, 3, 16, 16, device=DEVICE)
        stats = torch.zeros(2, network.stats_layout.numel, device=DEVICE)
        found = gradients(call, (theta, x, stats), batched=batched)
        assert all(part.device.type == DEVICE.type for part in found)


@CALLS
@pytest.mark.parametrize("classes", [0, 3])
def test_every_generator_runs_forward_and_backward(classes: int, first_order: bool, batched: bool) -> None:
    net_g = generator((3, 16, 16), 8, 4, classes)
    with faked():
        theta = torch.zeros(2, net_g.layout.numel, device=DEVICE)
        z = torch.zeros(2, 4, 8 + classes, device=DEVICE)
        found = gradients(lambda w, codes: net_g(w, codes, first_order=first_order).sum(), (theta, z), batched=batched)
        assert all(part.device.type == DEVICE.type for part in found)


def on_the_cpu(value: Any) -> bool:
    """Whether every tensor of a tree is on the CPU."""
    if isinstance(value, dict):
        return all(map(on_the_cpu, value.values()))
    return not isinstance(value, Tensor) or value.device.type == "cpu"


@pytest.mark.parametrize("outer", ["adam", "interpolate", "shared-adam"])
@pytest.mark.parametrize("changes", [{}, {"learner_update": "erm"}, {"bell_inner": "sgd", "distill": "hard"}])
def test_the_learner_distils_on_its_device_and_keeps_its_state_on_the_cpu(changes: dict[str, Any], outer: str) -> None:
    world, seen = replace(small_world(), device=DEVICE.type), []
    cfg = small_config(alignment_every=1, bell_outer=outer, **changes)
    state, original = free.init(cfg, world), bell.distill_loss

    def spy(net: Any, task: bell.DistillSet, form: str) -> Any:
        seen.extend(part.device.type for part in task)
        return original(net, task, form)

    with pytest.MonkeyPatch.context() as patch, faked():
        patch.setattr(bell, "distill_loss", spy)
        tasks = [
            bell.DistillSet(torch.zeros(4, *world.image.shape), torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
            for _ in range(2)
        ]
        new, _ = bell.update(cfg, world, state, tasks, 1)
    assert set(seen) == {DEVICE.type}
    assert on_the_cpu(new)


def test_the_learner_fits_the_hyper_network_on_its_device_and_keeps_its_state_on_the_cpu() -> None:
    world, seen, original = replace(small_world(), device=DEVICE.type), [], dro.gradient
    cfg = dro.Config(embedding=4, hidden=8, chunk=2048, steps_per_round=2)
    state = dro.init(cfg, world)
    state |= {"centre": torch.zeros_like(state["theta"]), "spread": torch.ones_like(state["theta"])}
    found = FakeShard(world).send(
        "weights", [Job(index=i, seed=0, teacher=c.id) for i, c in enumerate(world.cards)], {}
    )

    def spy(cfg: dro.Config, parts: Any, psi: Tensor, rows: list[int], target: Tensor) -> Any:
        seen.extend([psi.device.type, target.device.type])
        return original(cfg, parts, psi, rows, target)

    with pytest.MonkeyPatch.context() as patch, faked():
        patch.setattr(dro, "gradient", spy)
        new, _ = dro.learn(cfg, world, state, 0, [], lambda *_: found)
    assert set(seen) == {DEVICE.type}
    assert on_the_cpu(new)


def leaves_a_mask(shard: Shard, jobs: list[Job], shared: Arrays) -> list[Arrays]:
    x = torch.zeros(3, device=shard.device)
    return [{"sum": float((x + torch.zeros(3)).sum())}]


def forgets_the_way_back(shard: Shard, jobs: list[Job], shared: Arrays) -> list[Arrays]:
    return [{"x": torch.zeros(3, device=shard.device).numpy()}]


def forgets_it_in_the_backward_pass(shard: Shard, jobs: list[Job], shared: Arrays) -> list[Arrays]:
    x = torch.zeros(3, device=shard.device, requires_grad=True)
    return [{"x": torch.autograd.grad(x * x, x, torch.zeros(3))[0].cpu().numpy()}]


@pytest.mark.parametrize("op", [leaves_a_mask, forgets_the_way_back, forgets_it_in_the_backward_pass])
def test_a_tensor_left_on_the_cpu_is_found(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "faulty", op)
    with pytest.raises((RuntimeError, TypeError), match=r"device|CPU"):
        run(shard_of(small_world(), batched=False), "faulty", [Job(index=0, seed=0)], {})
