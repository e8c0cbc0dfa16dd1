"""`train --dry-run`: what a run would do, and how long, from one pass of each kind of work on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ray_dfml.config import RunConfig
from ray_dfml.core import memory
from ray_dfml.core.generators import generator
from ray_dfml.core.inner_loop import Task, meta_gradient
from ray_dfml.core.net import net
from ray_dfml.evaluate import finetune
from ray_dfml.methods import oracle
from ray_dfml.methods.base import MetaConfig, MethodConfig, ReplayConfig, World, teacher_job
from ray_dfml.methods.bidf import method as bidf
from ray_dfml.methods.free import method as free
from ray_dfml.methods.free.five import five
from ray_dfml.methods.purer import method as purer
from ray_dfml.runtime.driver import Inputs, Machine
from ray_dfml.runtime.shard import Shard
from ray_dfml.types import TeacherCard

PROCESS_BYTES = 600e6
"""Proportional memory of a process with torch that has trained a Conv4."""

PROBES = (1, 4)
"""Iterations of the BiDf-MKD jobs that are timed; a whole one takes minutes."""

DAEMON_BYTES = 250e6
"""The same of Ray's own processes on one node."""


def estimate(config: RunConfig, inputs: Inputs, machine: Machine) -> dict[str, Any]:
    """Rounds, teachers, minutes of validation and test, and memory; of methods that replay also images, meta-updates
    and minutes of training, a range where a plateau decides."""
    world, cfg = inputs.world, config.method
    plan: dict[str, Any] = {
        "method": config.name,
        "profile": config.profile,
        "rounds": cfg.rounds,
        "teachers": len(world.cards),
        "rejected teachers": len(inputs.rejected),
        "learner parameters": world.net.layout.numel,
        "queries": 0,
    }
    found = _work(cfg, world, Shard(inputs.teachers.__getitem__))
    share = machine.workers if machine.backend == "ray" else 1
    if found is not None:
        if found.images:
            plan["recovered images"] = found.images
        span = (found.least, found.most)
        plan["meta-updates"] = " to ".join(str(n) for n in dict.fromkeys(span))
        update = found.meta.tasks * _task(found.meta, world)
        minutes = [(found.recovery + n * update) / share / 60 for n in span]
        plan["training minutes"] = " to ".join(dict.fromkeys(f"{m:.1f}" for m in minutes))
    validation, test = (seconds / share / 60 for seconds in _evaluation(config, inputs))
    processes = machine.workers + 2 if machine.backend == "ray" else 1
    memory_bytes = processes * PROCESS_BYTES + (DAEMON_BYTES if machine.backend == "ray" else 0.0)
    return plan | {
        "validation minutes": f"{validation:.1f}",
        "test minutes": f"{test:.1f}",
        "memory GiB, all processes": round(memory_bytes / 2**30, 1),
    }


@dataclass(frozen=True)
class _Work:
    """Images made, seconds of recovery, the fewest and most meta-updates, and their settings."""

    images: int
    recovery: float
    least: int
    most: int
    meta: MetaConfig


def _work(cfg: MethodConfig, world: World, shard: Shard) -> _Work | None:
    """What training is made of; None for the baselines, whose one step is soon done, and for `dro`."""
    if isinstance(cfg, free.Config):
        learning, jobs = max(cfg.rounds - cfg.warmup, 0), cfg.rounds * cfg.teachers_per_round
        least, most = _until_plateau(cfg.replay)
        one = (cfg.steps + 1) * _of_mean_teacher(world, lambda card: _five(cfg, world, shard, card))
        return _Work(jobs * cfg.images_per_class * world.way, jobs * one, learning * least, learning * most, cfg.replay)
    if isinstance(cfg, purer.Config):
        count = min(cfg.teachers_per_round or len(world.cards), len(world.cards))
        one = _of_mean_teacher(world, lambda card: _eci(cfg, world, shard, card))
        updates = max(cfg.rounds - cfg.image_warmup, 0) * cfg.updates
        made = cfg.images_per_class * sum(len(card.classes) for card in world.cards)
        return _Work(made, cfg.rounds * count * one, updates, updates, cfg.meta)
    if isinstance(cfg, bidf.Config):
        jobs = cfg.rounds * cfg.teachers_per_round
        one = _of_mean_teacher(world, lambda card: _bidf(cfg, world, shard, card))
        replayed = (cfg.generate_every - 1,) * 2 if cfg.generate_every else _until_plateau(cfg.replay)
        least, most = (cfg.rounds * (1 + n) for n in replayed)
        return _Work(2 * jobs * cfg.images_per_class * world.way, jobs * one, least, most, cfg.replay)
    if isinstance(cfg, oracle.Config):
        updates = cfg.rounds * cfg.updates_per_round
        return _Work(0, 0.0, updates, updates, cfg.replay)
    return None


def _until_plateau(cfg: ReplayConfig) -> tuple[int, int]:
    """The fewest and most updates of `replay.until_plateau`."""
    return min(cfg.patience + 1, cfg.max_updates), cfg.max_updates


def _evaluation(config: RunConfig, inputs: Inputs) -> tuple[float, float]:
    """Seconds of the validations of a training, and of the test at most: of the validated, the last and fresh weights,
    for each of which a step size is chosen on validation episodes."""
    cfg, world = config.eval, inputs.world
    sets = {split: len([one for one in inputs.sets if one.split == split]) for split in ("val", "test")}
    seconds = {shot: _episode(config, world, shot) for shot in cfg.shots} if any(sets.values()) else {}
    validations = sum(config.validates(r) for r in range(config.method.rounds))
    validated = validations * cfg.val_episodes * (sets["val"] + cfg.test_best * sets["test"])
    candidates = len(cfg.lrs) if world.head != "protonet" and len(cfg.lrs) > 1 else 0
    weights = 1 if config.name == "random" else 3 + cfg.test_best
    episodes = weights * (sets["test"] * cfg.episodes + sets["val"] * candidates * cfg.val_episodes)
    return validated * seconds.get(max(cfg.shots), 0.0), episodes * sum(seconds.values())


def _seconds(work: Callable[[], object]) -> float:
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _of_mean_teacher(world: World, seconds: Callable[[TeacherCard], float]) -> float:
    """Seconds of work on a teacher of mean cost: of the one whose cost is nearest, scaled."""
    costs = {card: net(card.arch, card.image.shape, len(card.classes)).macs for card in world.cards}
    mean = sum(costs.values()) / len(costs)
    nearest = min(costs, key=lambda card: abs(costs[card] - mean))
    return seconds(nearest) * mean / costs[nearest]


def _five(cfg: free.Config, world: World, shard: Shard, card: TeacherCard) -> float:
    """One pass of FREE's inversion."""
    net_g = generator(world.image.shape, cfg.latent, cfg.width)
    theta_g = net_g.init(torch.Generator().manual_seed(0)).to(shard.device)[None]
    one = cfg.model_copy(update={"steps": 0})
    teacher = shard.teacher(card.id)
    return _seconds(lambda: five(one, net_g, [teacher], theta_g, None, [0], way=world.way, batched=False))


def _eci(cfg: purer.Config, world: World, shard: Shard, card: TeacherCard) -> float:
    """PURER's image steps of one round."""
    alone = replace(world, cards=(card,))
    jobs = purer.plan(cfg, alone, {"images": {card.id: purer.fresh(cfg, world, card)}, "push": {}}, 0)
    return _seconds(lambda: shard.run("purer.recover", jobs, purer.shared(cfg, alone, {}, 0)))


def _bidf(cfg: bidf.Config, world: World, shard: Shard, card: TeacherCard) -> float:
    """BiDf-MKD's two inversions and the inner distillation between them, from jobs of few iterations."""
    first, second = (_bidf_job(cfg.model_copy(update={"iterations": n}), world, shard, card) for n in PROBES)
    each = max(second - first, 0.0) / (PROBES[1] - PROBES[0])
    return first + (cfg.iterations - PROBES[0]) * each


def _bidf_job(cfg: bidf.Config, world: World, shard: Shard, card: TeacherCard) -> float:
    job = teacher_job(card, index=0, seed=0, values={})
    late = bidf.init(cfg, world) | {"updates": cfg.boundary_after}
    shared = bidf.shared(cfg, world, late, 0)
    return _seconds(lambda: shard.run("bidf-mkd.recover", [job], shared))


def _images(world: World, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(per_class)
    return torch.rand(per_class * world.way, *world.image.shape, generator=rng), memory.interleaved(
        world.way, per_class
    )


def _task(cfg: MetaConfig, world: World) -> float:
    theta = world.net.init(torch.Generator().manual_seed(0))
    parts = [part[None] for part in (*_images(world, cfg.shot), *_images(world, cfg.query))]
    return _seconds(
        lambda: meta_gradient(
            world.net, theta, Task(*parts), lr=cfg.inner_lr, steps=cfg.inner_steps, batched=False, head=world.head
        )
    )


def _episode(config: RunConfig, world: World, shot: int) -> float:
    theta, stats = world.net.init(torch.Generator().manual_seed(0)), world.net.initial_stats()
    support, labels = _images(world, shot)
    query, _ = _images(world, config.eval.query)
    cfg, network = config.eval, world.net
    adaptation = {"steps": cfg.steps, "lr": cfg.lr, "bn": cfg.bn, "head": world.head, "icfil": cfg.icfil}
    return _seconds(lambda: finetune(network, theta, stats, support, labels, query, **adaptation))
