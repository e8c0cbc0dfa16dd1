"""FREE: faster inversion via a meta-generator (FIVE), better generalisation via a meta-learner (BELL), cross-task
replay.

[Wei2024] FREE: Faster and Better Data-Free Meta-Learning, arXiv 2405.00984 (CVPR 2024), Eq. 1-4, Algorithms 1-3.
Deviations of the released code and of this implementation are rows of docs/methods.md.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from ray_dfml.core import optim, seeds
from ray_dfml.core.generators import generator
from ray_dfml.core.images import normalise, to_pixels, view
from ray_dfml.core.net import net
from ray_dfml.errors import RejectedError
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods import replay
from ray_dfml.methods.base import (
    Metrics,
    Send,
    State,
    Teacher,
    Worker,
    World,
    image_values,
    initial_learner,
    stacked,
    teacher_job,
)
from ray_dfml.methods.free import bell
from ray_dfml.methods.free.config import Config
from ray_dfml.methods.free.five import five
from ray_dfml.methods.inversion import Judge, checked_generator, dropped_statistics, groups
from ray_dfml.types import Arrays, Job

READINGS = ("finetune",)


def notes(cfg: Config, world: World) -> list[str]:
    """Teachers for which the statistics term does not apply, and classes that no task can hold."""
    return dropped_statistics(world.cards, cfg.bn_weight) + bank_of.notes(
        cfg.replay, world.way, bank_of.of_pool(world, cfg.bank_key)
    )


def init(cfg: Config, world: World) -> State:
    """Learner and generator from the run's seed, fresh optimisers, an empty bank.

    Raises UsageError for an input size that the generator cannot make, for a teacher of too few classes, and where no
    task can be drawn.
    """
    bank_of.check_capacity("free", cfg.replay, cfg.bank_capacity)
    bank_of.check("free", "method.replay", cfg.replay, world.way, bank_of.of_pool(world, cfg.bank_key))
    theta_g = checked_generator("free", cfg, world).init(seeds.generator(world.seed, "theta_g"))
    learner = replay.with_optimiser(initial_learner(world))
    return learner | {
        "theta_g": theta_g,
        "adam_g": optim.Adam.zeros(theta_g)._asdict(),
        "adam_bell": optim.Adam.zeros(learner["theta"])._asdict(),
        "bank": {},
    }


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """b teachers drawn with replacement. A sequential generator makes the b teachers one job, since each starts where
    the one before ended."""
    rng = seeds.generator(world.seed, r, "plan")
    picks = torch.randint(len(world.cards), (cfg.teachers_per_round,), generator=rng).tolist()
    slots = [(world.cards[i], seeds.derive(world.seed, r, "recover", j)) for j, i in enumerate(picks)]
    if cfg.generator_sharing == "sequential":
        return [Job(index=0, seed=slots[0][1], values={"slots": [(card.id, seed) for card, seed in slots]})]
    return [
        teacher_job(card, index=j, seed=seed, values={"slots": [(card.id, seed)]})
        for j, (card, seed) in enumerate(slots)
    ]


def shared(cfg: Config, world: World, state: State, r: int) -> Arrays:
    """Generator and learner weights, and the settings of the inversion."""
    return image_values(world.image) | {
        "cfg": cfg.model_dump(),
        "theta_g": state["theta_g"].numpy(),
        "theta": state["theta"].numpy() if r >= cfg.warmup else None,
        "arch": world.arch,
        "way": world.way,
    }


def recover(worker: Worker, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `free.recover` op: FIVE on the slots (teacher, seed) of each job.

    Slots of a sequential generator go one after another, each from the generator the one before left. The others all
    start from the shared generator: one by one on a CPU, those of one architecture and input at once elsewhere.
    """
    cfg = Config.model_validate(shared["cfg"])
    net_g = generator(tuple(shared["shape"]), cfg.latent, cfg.width)
    ask = _learner(shared, worker.device)
    results: list[Arrays] = [{"tasks": [], "theta_g": None, "rejected_teachers": {}} for _ in jobs]
    slots: list[tuple[Arrays, Teacher, int]] = []
    for result, job in zip(results, jobs, strict=True):
        for id, seed in job.values["slots"]:
            try:
                slots.append((result, worker.teacher(id), seed))
            except RejectedError as error:
                result["rejected_teachers"][id] = str(error)

    start = torch.tensor(shared["theta_g"], device=worker.device)
    sequential = cfg.generator_sharing == "sequential"
    for group in groups(slots, lambda slot: slot[1], batched=worker.batched and not sequential):
        teachers, seeds_, many = [t for _, t, _ in group], [s for _, _, s in group], len(group) > 1
        judge = None if ask is None else partial(stacked, ask, batched=many)
        tasks, adapted = five(
            cfg, net_g, teachers, start.expand(len(group), -1), judge, seeds_, way=shared["way"], batched=many
        )
        for (result, teacher, _), task in zip(group, tasks, strict=True):
            if not math.isfinite(task["loss_last"]):
                result["rejected_teachers"][teacher.card.id] = "the inversion loss is not finite"
                continue
            result["tasks"].append(task)
            if sequential:
                start = adapted[0]
                result["theta_g"] = start.cpu().numpy()
    return results


def _learner(shared: Arrays, device: torch.device) -> Judge | None:
    """The learner as a function of pixels [n c h w]; None while it takes no part."""
    if shared["theta"] is None:
        return None
    network = net(shared["arch"], tuple(shared["shape"]), shared["way"])
    theta, mean, std = (torch.tensor(shared[k], device=device) for k in ("theta", "mean", "std"))
    return lambda pixels: network(theta, normalise(pixels, mean, std))


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """One round at the learner ([Wei2024] Algorithm 3, lines 6-10): theta_G, bank, BELL, replay until a plateau."""
    tasks = [task for result in results for task in result["tasks"]]
    if not tasks:
        return state, {"recover/tasks": 0}
    metrics: Metrics = {"recover/tasks": len(tasks)}
    metrics |= {
        f"recover/{name}": sum(task[name] for task in tasks) / len(tasks)
        for name in ("loss_first", "loss_last", "ce", "accuracy", "spread")
    }
    state = _update_generator(cfg, state, tasks, results)
    if r < cfg.warmup:
        return state, metrics

    bank = state["bank"]
    for task in tasks if cfg.bank_adds == "all" else tasks[-1:]:
        bank = bank_of.store(bank, task, cfg.bank_key, cfg.bank_capacity)
    state = {**state, "bank": bank}

    if cfg.learner_update != "none":
        state, found = bell.update(cfg, world, state, [_distill_set(cfg, world, task) for task in tasks], r)
        metrics |= found
    metrics |= bank_of.figures(cfg.replay, world, bank, cfg.bank_key)
    bank_of.check_left(cfg.replay, world, bank, cfg.bank_key)
    if not metrics["bank/data_sets"]:
        return state, metrics | {"replay/updates": 0}
    state, found = replay.until_plateau(cfg.replay, world, state, bank, r, send)
    return state, metrics | found


def _update_generator(cfg: Config, state: State, tasks: list[Arrays], results: list[Arrays]) -> State:
    if cfg.generator_sharing == "sequential":
        return {**state, "theta_g": torch.tensor(results[-1]["theta_g"])}
    grad = torch.zeros_like(state["theta_g"])
    for task in tasks:
        grad += torch.tensor(task["grad"])
    if not torch.isfinite(grad).all():
        raise FloatingPointError("the generator's meta-gradient is not finite; lower method.lr_meta or lr_generator")
    if cfg.meta_reduction == "mean":
        grad /= len(tasks)
    if cfg.meta_optimizer == "sgd":
        return {**state, "theta_g": state["theta_g"] - cfg.lr_meta * grad}
    fresh = cfg.meta_optimizer == "adam-fresh"
    adam = optim.Adam.zeros(grad) if fresh else optim.Adam(**state["adam_g"])
    theta_g, adam = optim.adam_step(state["theta_g"], grad, adam, lr=cfg.lr_meta, betas=(0.5, 0.999))
    return {**state, "theta_g": theta_g, "adam_g": adam._asdict()}


def _distill_set(cfg: Config, world: World, task: Arrays) -> bell.DistillSet:
    seen = view(to_pixels(task["images"]), task["view"], pad=cfg.crop_pad, fill=cfg.crop_fill)
    mean, std = torch.tensor(world.image.mean), torch.tensor(world.image.std)
    return bell.DistillSet(normalise(seen, mean, std), torch.tensor(task["logits"]), torch.tensor(task["labels"]))
