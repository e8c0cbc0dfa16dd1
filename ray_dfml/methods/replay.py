"""Meta-updates on tasks drawn from a bank: the `maml.grad` op of the shards, and the loop of the learner around it.

[Finn2017] arXiv 1703.03400, Algorithm 1. [Wei2024] FREE, arXiv 2405.00984, Eq. 4 (cross task replay).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ray_dfml.core import episodes, optim, seeds
from ray_dfml.core.images import normalise, to_bytes, to_pixels
from ray_dfml.core.inner_loop import Task, meta_gradient
from ray_dfml.core.net import net
from ray_dfml.core.sources.warp import augment
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods.base import MetaConfig, Metrics, ReplayConfig, Send, State, World, image_values
from ray_dfml.types import Arrays, Job, Shard

STATS_MOMENTUM = 0.1


def grad(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `maml.grad` op: the meta-gradient [p] of each job, which is a task of support [s c h w] and query [u c h w].

    uint8 images are pixels; float32 images are already normalised for the learner. `shared["head"]` says what adapts.
    """
    network = net(shared["arch"], tuple(shared["shape"]), shared["way"])
    theta = torch.tensor(shared["theta"], device=shard.device)
    mean, std = (torch.tensor(shared[k], device=shard.device) for k in ("mean", "std"))
    parts: list[list[torch.Tensor]] = [[], [], [], []]
    for job in jobs:
        for i, name in enumerate(("support", "query")):
            images = job.values[name]
            if images.dtype == np.uint8:
                parts[2 * i].append(normalise(to_pixels(images, shard.device), mean, std))
            else:
                parts[2 * i].append(torch.tensor(images, device=shard.device))
            parts[2 * i + 1].append(episodes.interleaved(shared["way"], len(images) // shared["way"]).to(shard.device))
    tasks = Task(*(torch.stack(column) for column in parts))
    found = meta_gradient(
        network,
        theta,
        tasks,
        lr=shared["inner_lr"],
        steps=shared["inner_steps"],
        batched=shard.batched,
        head=shared["head"],
    )
    columns = [column.detach().cpu().numpy() for column in found]
    return [
        {"grad": g, "loss": float(loss), "accuracy": float(accuracy), "stats": stats}
        for g, loss, accuracy, stats in zip(*columns, strict=True)
    ]


def draw(cfg: MetaConfig, world: World, bank: Mapping[str, np.ndarray], tag: tuple[int | str, ...]) -> list[Arrays]:
    """Draw `cfg.tasks` tasks from the bank, each with uint8 `support` and `query`. The seeds derive from `tag`.

    With `cfg.augment` their images are changed (`warp.augment`). The same images are drawn without it.
    """
    tasks: list[Arrays] = []
    for t in range(cfg.tasks):
        parts = bank_of.draw(cfg, world.way, bank, seeds.rng(world.seed, *tag, t))
        if cfg.augment:
            rng = seeds.rng(world.seed, *tag, t, "augment")
            parts = [to_bytes(augment(rng, to_pixels(images))) for images in parts]
        tasks.append(dict(zip(("support", "query"), parts, strict=True)))
    return tasks


def shared_values(cfg: MetaConfig, world: World, state: State) -> Arrays:
    """Values that all `maml.grad` jobs of an update read: the learner's weights [p], and how the learner adapts."""
    return image_values(world.image) | {
        "arch": world.arch,
        "way": world.way,
        "theta": state["theta"].numpy(),
        "inner_lr": cfg.inner_lr,
        "inner_steps": cfg.inner_steps,
        "head": world.head,
    }


def step(
    cfg: MetaConfig,
    world: World,
    state: State,
    tasks: Sequence[Arrays],
    tag: tuple[int | str, ...],
    send: Send,
    extra: Sequence[Arrays] = (),
) -> tuple[State, Metrics]:
    """Make one meta-update: the shards differentiate the tasks, and one Adam step follows the mean (or sum).

    A task holds `support` and `query`, as a `maml.grad` job does. `extra` holds gradients from elsewhere, in the form
    of results of `maml.grad`, with or without `stats`. There must be at least one task or extra. The metrics are the
    mean loss in nats and the mean accuracy in percent. Gradients are added in order, tasks first, so the bits do not
    depend on the shards. Raises FloatingPointError for a gradient that is not finite.
    """
    jobs = [Job(index=t, seed=0, values=task) for t, task in enumerate(tasks)]
    results = [*(send("maml.grad", jobs, shared_values(cfg, world, state)) if jobs else []), *extra]
    total, stats = torch.zeros_like(state["theta"]), torch.zeros_like(state["stats"])
    captured = [result["stats"] for result in results if "stats" in result]
    for result in results:
        total += torch.tensor(result["grad"])
    for found in captured:
        stats += torch.tensor(found)
    if cfg.reduction == "mean":
        total /= len(results)
    if not torch.isfinite(total).all():
        raise FloatingPointError(f"the meta-gradient of update {tag} is not finite; lower its inner_lr or lr")
    theta, adam = optim.adam_step(state["theta"], total, optim.Adam(**state["adam"]), lr=cfg.lr)
    if captured:
        stats = (1 - STATS_MOMENTUM) * state["stats"] + STATS_MOMENTUM * stats / len(captured)
    else:
        stats = state["stats"]
    state = {**state, "theta": theta, "adam": adam._asdict(), "stats": stats, "updates": state["updates"] + 1}
    return state, {
        "loss": sum(r["loss"] for r in results) / len(results),
        "accuracy": 100.0 * sum(r["accuracy"] for r in results) / len(results),
    }


def update(
    cfg: MetaConfig,
    world: World,
    state: State,
    bank: Mapping[str, np.ndarray],
    tag: tuple[int | str, ...],
    send: Send,
) -> tuple[State, Metrics]:
    """Make one meta-update on tasks drawn from a bank."""
    return step(cfg, world, state, draw(cfg, world, bank, tag), tag, send)


def until_plateau(
    cfg: ReplayConfig, world: World, state: State, bank: Mapping[str, np.ndarray], r: int, send: Send
) -> tuple[State, Metrics]:
    """Make meta-updates until `cfg.patience` in a row bring no new best training accuracy, or for `cfg.max_updates`."""
    best, waited, count = -1.0, 0, 0
    first: Metrics = {}
    last: Metrics = {}
    while waited < cfg.patience and count < cfg.max_updates:
        state, last = update(cfg, world, state, bank, (r, "replay", count), send)
        first = first or last
        count += 1
        accuracy = last["accuracy"] or 0.0
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
    return state, {
        "replay/updates": count,
        "replay/loss_first": first["loss"],
        "replay/loss_last": last["loss"],
        "replay/accuracy_best": best,
    }


def with_optimiser(state: State) -> State:
    """The state with a fresh meta-optimiser and an update counter."""
    return {**state, "adam": optim.Adam.zeros(state["theta"])._asdict(), "updates": 0}
