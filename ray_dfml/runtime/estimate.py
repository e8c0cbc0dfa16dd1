"""`train --dry-run`: what a run would do, from multiply-accumulate counts and a short probe of this machine."""

import time
from typing import Any

import torch
import torch.nn.functional as F

from ray_dfml.config import RunConfig
from ray_dfml.core.generators import generator
from ray_dfml.methods import free, oracle
from ray_dfml.runtime.driver import Inputs, Machine
from ray_dfml.runtime.shard import pin

SECOND_ORDER_PASSES = 6
"""Forward-equivalents of one support image and step under a second-order meta-gradient (METHODS section 8)."""

PROCESS_BYTES = 450e6
"""Resident memory of a worker process with torch that has done convolutions."""


def estimate(config: RunConfig, inputs: Inputs, machine: Machine) -> dict[str, Any]:
    """Rounds, teachers, images, meta-updates, seconds and memory. Updates are a range where a plateau decides."""
    world = inputs.world
    cfg = config.method
    rate = _macs_per_second()
    plan: dict[str, Any] = {
        "method": config.name,
        "profile": config.profile,
        "rounds": cfg.rounds,
        "teachers": len(world.cards),
    }
    low = high = 0.0
    parameters = world.net.layout.numel
    if isinstance(cfg, free.Config):
        learning = max(cfg.rounds - cfg.warmup, 0)
        least, most = min(cfg.replay.patience + 1, cfg.replay.max_updates), cfg.replay.max_updates
        net_g = generator(world.image.shape, cfg.latent, cfg.width)
        images = cfg.images_per_class * world.way
        image_macs = _generator_macs(world.image.shape, cfg.width) + max(
            (_macs(world, c.arch) for c in world.cards), default=0
        )
        recover = cfg.rounds * cfg.teachers_per_round * images * (cfg.steps + 1) * 3 * image_macs
        plan["recovered images"] = cfg.rounds * cfg.teachers_per_round * images
        plan["meta-updates"] = f"{learning * least} to {learning * most}"
        task = _task_macs(world.net.macs, world.way, cfg.replay) * cfg.replay.tasks
        low, high = recover + learning * least * task, recover + learning * most * task
        parameters += net_g.layout.numel
    elif isinstance(cfg, oracle.Config):
        updates = cfg.rounds * cfg.updates_per_round
        plan["meta-updates"] = updates
        low = high = updates * cfg.replay.tasks * _task_macs(world.net.macs, world.way, cfg.replay)
    tests = sum(s * world.way * config.eval.steps * 3 + config.eval.query * world.way for s in config.eval.shots)
    test = 2 * config.eval.episodes * tests * world.net.macs * len([s for s in inputs.sets if s.split == "test"])
    speed = rate * (machine.workers if machine.backend == "ray" else 1)
    processes = (machine.workers + 2) if machine.backend == "ray" else 1
    plan["parameters"] = parameters
    plan["queries"] = 0
    plan["training minutes"] = f"{low / speed / 60:.1f} to {high / speed / 60:.1f}"
    plan["test minutes"] = f"{test / speed / 60:.1f}"
    plan["memory GiB, all processes"] = round((processes * PROCESS_BYTES + (600e6 if processes > 1 else 0)) / 2**30, 1)
    plan["rejected teachers"] = len(inputs.rejected)
    return plan


def _macs(world: Any, arch: str) -> int:
    from ray_dfml.core.net import net

    return net(arch, world.image.shape, world.way).macs


def _task_macs(macs: int, way: int, replay: Any) -> float:
    support = replay.shot * way * replay.inner_steps * SECOND_ORDER_PASSES
    return macs * (support + 3 * replay.query * way)


def _generator_macs(shape: tuple[int, int, int], width: int) -> float:
    channels, height, breadth = shape
    area = height * breadth
    return area / 4 * (4 * width * width) * 4 + area * (2 * width * width) * 4 + area * width * channels * 9


def _macs_per_second() -> float:
    pin(1)
    x, w = torch.randn(100, 32, 14, 14), torch.randn(32, 32, 3, 3)
    F.conv2d(x, w, padding=1)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < 0.3:
        F.conv2d(x, w, padding=1)
        count += 1
    return count * 100 * 14 * 14 * w.numel() / (time.perf_counter() - began)
