"""`train --dry-run`: what a run would do, and how long, from one pass of each kind of work on this machine."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ray_dfml.config import RunConfig
from ray_dfml.core import memory
from ray_dfml.core.generators import generator
from ray_dfml.core.inner_loop import Task, meta_gradient
from ray_dfml.core.net import net
from ray_dfml.evaluate import finetune
from ray_dfml.methods import free, oracle
from ray_dfml.methods.base import MetaConfig, World
from ray_dfml.methods.five import five
from ray_dfml.runtime.driver import Inputs, Machine
from ray_dfml.runtime.shard import Shard

PROCESS_BYTES = 600e6
"""Proportional memory of a process with torch that has trained a Conv4."""

DAEMON_BYTES = 250e6
"""The same of Ray's own processes on one node."""


def estimate(config: RunConfig, inputs: Inputs, machine: Machine) -> dict[str, Any]:
    """Rounds, teachers, minutes of test and memory; of `free` and `maml-oracle` also images, meta-updates and minutes
    of training, a range where a plateau decides."""
    world, cfg = inputs.world, config.method
    shard = Shard(inputs.teachers.__getitem__)
    plan: dict[str, Any] = {
        "method": config.name,
        "profile": config.profile,
        "rounds": cfg.rounds,
        "teachers": len(world.cards),
        "rejected teachers": len(inputs.rejected),
        "learner parameters": world.net.layout.numel,
        "queries": 0,
    }
    training: tuple[float, float] | None = None
    if isinstance(cfg, free.Config):
        learning = max(cfg.rounds - cfg.warmup, 0)
        least, most = min(cfg.replay.patience + 1, cfg.replay.max_updates), cfg.replay.max_updates
        plan["recovered images"] = cfg.rounds * cfg.teachers_per_round * cfg.images_per_class * world.way
        plan["meta-updates"] = f"{learning * least} to {learning * most}"
        recover = cfg.rounds * cfg.teachers_per_round * (cfg.steps + 1) * _inversion_pass(cfg, world, shard)
        update = _meta_update(cfg.replay, world)
        training = (recover + learning * least * update, recover + learning * most * update)
    elif isinstance(cfg, oracle.Config):
        plan["meta-updates"] = cfg.rounds * cfg.updates_per_round
        seconds = cfg.rounds * cfg.updates_per_round * _meta_update(cfg.replay, world)
        training = (seconds, seconds)
    tested = len([one for one in inputs.sets if one.split == "test"])
    steps = len(config.eval.lrs) if world.head != "protonet" else 0
    episodes = config.eval.episodes + (steps if steps > 1 else 0) * config.eval.val_episodes  # to choose a step size
    test = 2 * tested * episodes * sum(_episode(config, world, shot) for shot in config.eval.shots if tested)
    share = machine.workers if machine.backend == "ray" else 1
    processes = machine.workers + 2 if machine.backend == "ray" else 1
    memory_bytes = processes * PROCESS_BYTES + (DAEMON_BYTES if machine.backend == "ray" else 0.0)
    if training is not None:
        plan["training minutes"] = " to ".join(f"{seconds / share / 60:.1f}" for seconds in training)
    return plan | {
        "test minutes": f"{test / share / 60:.1f}",
        "memory GiB, all processes": round(memory_bytes / 2**30, 1),
    }


def _seconds(work: Callable[[], object]) -> float:
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _inversion_pass(cfg: free.Config, world: World, shard: Shard) -> float:
    """Seconds of one pass over a teacher of mean cost: of the one whose cost is nearest, scaled."""
    costs = {card.id: net(card.arch, card.image.shape, len(card.classes)).macs for card in world.cards}
    mean = sum(costs.values()) / len(costs)
    id = min(costs, key=lambda id: abs(costs[id] - mean))
    net_g = generator(world.image.shape, cfg.latent, cfg.width)
    theta_g = net_g.init(torch.Generator().manual_seed(0)).to(shard.device)[None]
    one = cfg.model_copy(update={"steps": 0})
    teacher = shard.teacher(id)
    seconds = _seconds(lambda: five(one, net_g, [teacher], theta_g, None, [0], way=world.way, batched=False))
    return seconds * mean / costs[id]


def _images(world: World, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(per_class)
    return torch.rand(per_class * world.way, *world.image.shape, generator=rng), memory.interleaved(
        world.way, per_class
    )


def _meta_update(cfg: MetaConfig, world: World) -> float:
    theta = world.net.init(torch.Generator().manual_seed(0))
    parts = [part[None] for part in (*_images(world, cfg.shot), *_images(world, cfg.query))]
    return cfg.tasks * _seconds(
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
