"""FREE: faster inversion via a meta-generator (FIVE), better generalisation via a meta-learner (BELL), and replay.

[Wei2024] FREE: Faster and Better Data-Free Meta-Learning, arXiv 2405.00984 (CVPR 2024), Eq. 1-4, Algorithms 1-3.
docs/methods.md lists how the released code and this implementation deviate from the paper.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ray_dfml.core import optim, seeds
from ray_dfml.core.generators import generator
from ray_dfml.core.images import normalise, to_pixels, view
from ray_dfml.core.net import net
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods import cost as cost_of
from ray_dfml.methods import panels, pictures, recovery, replay, sourced
from ray_dfml.methods.base import (
    Cost,
    Method,
    Metrics,
    Panel,
    Send,
    State,
    World,
    image_values,
    initial_learner,
    stacked,
    teacher_job,
)
from ray_dfml.methods.free import answers, bell
from ray_dfml.methods.free.config import PRESETS, PROFILES, Config
from ray_dfml.methods.free.five import five
from ray_dfml.methods.inversion import dropped_statistics
from ray_dfml.methods.sourced import GENERATOR
from ray_dfml.methods.surrogates import stage as surrogates
from ray_dfml.types import LEVELS, Arrays, Job, Shard, Teacher, TeacherCard

FIGURES = ("loss_first", "loss_last", "ce", "accuracy", "spread", "agreement", "confidence", "filled")
"""Figures of tasks whose means are logged. Not every task has all of them."""


def notes(cfg: Config, world: World) -> list[str]:
    """Lines about services, teachers to which the statistics term does not apply, and classes that no task can hold."""
    used = surrogates.known(cfg.surrogate, world)
    return [
        *surrogates.notes("free", cfg.surrogate, world),
        *sourced.notes(cfg, used.cards),
        *dropped_statistics(used.cards, cfg.bn_weight),
        *bank_of.notes(cfg.replay, world.way, bank_of.of_pool(used, cfg.bank_key)),
    ]


def init(cfg: Config, world: World) -> State:
    """Learner and generator drawn from the run's seed, fresh optimisers, and an empty bank.

    Without inversions the generator has no weights. If services are distilled first, the state also holds their
    students. Raises UsageError as `sourced.check` does, if no task can be drawn, and if no teacher can be used.
    """
    world = surrogates.checked("free", cfg.surrogate, world)
    bank_of.check_capacity("free", cfg.replay, cfg.bank_capacity)
    bank_of.check("free", "method.replay", cfg.replay, world.way, bank_of.of_pool(world, cfg.bank_key))
    sourced.check("free", cfg, world)
    theta_g = torch.empty(0)
    if GENERATOR in cfg.images:
        theta_g = generator(world.image.shape, cfg.latent, cfg.width).init(seeds.rng(world.seed, "theta_g"))
    learner = replay.with_optimiser(initial_learner(world))
    return (
        learner
        | surrogates.begin(cfg.surrogate, world)
        | {
            "theta_g": theta_g,
            "adam_g": optim.Adam.zeros(theta_g)._asdict(),
            "adam_bell": optim.Adam.zeros(learner["theta"])._asdict(),
            "bank": {},
        }
    )


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """The jobs of the distillation of all services in its rounds, then jobs for b teachers, drawn as `draws` says.

    There are none for a sequential generator, whose jobs `learn` sends one by one.
    """
    r, distils = surrogates.round_of(cfg.surrogate, r)
    if distils:
        return surrogates.plan(cfg.surrogate, world, state, r)
    return _drawn(cfg, world, state, r) if cfg.generator_sharing == "meta" else []


def _drawn(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    return [
        teacher_job(
            card, index=j, seed=seeds.derive(world.seed, r, "recover", j),
            values=surrogates.values(state, card) if inverts else {"asked": "sources"},
        )
        for j, (card, inverts) in enumerate(_visits(cfg, surrogates.inverted("free", world, state), r))
    ]  # fmt: skip


def _visits(cfg: Config, world: World, r: int) -> list[tuple[TeacherCard, bool]]:
    """The teachers that round `r` visits, each with whether it is inverted; else it labels images of sources.

    If both are wanted, they alternate from visit to visit. With `draws` turns they alternate between the visits of each
    teacher, and every other teacher of the pool begins with images of sources. The warm-up inverts.
    """
    world, count = surrogates.usable(cfg.surrogate, world), cfg.teachers_per_round
    if not world.cards:
        return []
    places = range(r * count, (r + 1) * count)
    if cfg.draws == "turns":
        found = [(i, i + cycle) for i, cycle in (_in_turn(world, place) for place in places)]
    else:
        rng = seeds.rng(world.seed, r, "plan")
        found = list(zip(torch.randint(len(world.cards), (count,), generator=rng).tolist(), places, strict=True))
    return [(world.cards[i], r < cfg.first or cfg.inverts(place)) for i, place in found]


def _in_turn(world: World, place: int) -> tuple[int, int]:
    """The teacher at a place of a sequence in which all teachers follow one another in one random order after another,
    and how many orders came before.

    If a teacher is rejected on the way, the sequence goes on as that of the others.
    """
    cycle, within = divmod(place, len(world.cards))
    return int(torch.randperm(len(world.cards), generator=seeds.rng(world.seed, cycle, "turns"))[within]), cycle


def shared(cfg: Config, world: World, state: State, r: int) -> Arrays:
    """The weights of generator and learner, and the settings of the inversion; or those of the distillation."""
    r, distils = surrogates.round_of(cfg.surrogate, r)
    return surrogates.shared(cfg.surrogate) if distils else _inversion(cfg, world, state, r)


def _inversion(cfg: Config, world: World, state: State, r: int) -> Arrays:
    return image_values(world.image) | {
        "cfg": cfg.model_dump(),
        "theta_g": state["theta_g"].numpy(),
        "theta": state["theta"].numpy() if r >= cfg.first else None,
        "arch": world.arch,
        "way": world.way,
    }


def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `free.recover` op: FIVE on the teacher of each job, from the shared generator.

    A result is the recovered task. With a sequential generator it also holds the adapted `theta_g`. The images that a
    surrogate gave are labelled by its service. If the job says `asked`, the teacher labels images of sources instead
    (`sourced.labelled`). In the rounds that distil services it is `surrogates.distil`.
    """
    if "distil" in shared:
        return surrogates.distil(shard, jobs, shared)
    cfg = Config.model_validate(shared["cfg"])
    ask = _learner(shared, shard.device)
    start = torch.tensor(shared["theta_g"], device=shard.device)

    def invert(jobs: Sequence[Job], teachers: Sequence[Teacher], batched: bool) -> list[Arrays | None]:
        net_g = generator(tuple(shared["shape"]), cfg.latent, cfg.width)
        judge = None if ask is None else partial(stacked, partial(ask, first_order=not batched), batched=batched)
        begun, names = start.expand(len(jobs), -1), [job.seed for job in jobs]
        tasks, adapted = five(cfg, net_g, teachers, begun, judge, names, way=shared["way"], batched=batched)
        if cfg.generator_sharing == "sequential":
            tasks = [task | {"theta_g": one.cpu().numpy()} for task, one in zip(tasks, adapted, strict=True)]
        return [
            answered(job, task) if math.isfinite(task["loss_last"]) else None
            for job, task in zip(jobs, tasks, strict=True)
        ]

    def answered(job: Job, task: Arrays) -> Arrays:
        return answers.asked_once(cfg, shard.service(str(job.teacher)), task) if job.values else task

    def labelled(job: Job) -> Arrays:
        service, shape = shard.service(str(job.teacher)), tuple(shared["shape"])
        return sourced.labelled(cfg, service, shape, shared["way"], job.seed, device=shard.device)

    return recovery.recover(shard, jobs, invert, partial(surrogates.teacher, shard), labelled)


def _learner(shared: Arrays, device: torch.device) -> Callable[..., Tensor] | None:
    """The learner as a function of pixels [n c h w] and `first_order`; None while the generator warms up."""
    if shared["theta"] is None:
        return None
    network = net(shared["arch"], tuple(shared["shape"]), shared["way"])
    theta, mean, std = (torch.tensor(shared[k], device=device) for k in ("theta", "mean", "std"))
    return lambda pixels, first_order: network(theta, normalise(pixels, mean, std), first_order=first_order)


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Update theta_G, the bank and the learner ([Wei2024] Algorithm 3, lines 6-10).

    The learner takes the step of BELL, then replays until a plateau. The rounds that distil services only do that;
    what a service missed of them is made up in the first round in which it is back.
    """
    r, distils = surrogates.round_of(cfg.surrogate, r)
    if distils:
        return surrogates.learn(cfg.surrogate, world, state, r, results)
    state = surrogates.made_up("free.recover", cfg.surrogate, world, state, send)
    world = surrogates.usable(cfg.surrogate, world)
    sequential = cfg.generator_sharing == "sequential"
    state, tasks = _chain(cfg, world, state, r, send) if sequential else (state, results)
    if not tasks:
        return state, {"recover/tasks": 0}
    metrics: Metrics = {"recover/tasks": len(tasks), "recover/images": sum(len(task["images"]) for task in tasks)}
    for name in FIGURES:
        known = [task[name] for task in tasks if name in task]
        metrics |= {f"recover/{name}": sum(known) / len(known)} if known else {}
    if not sequential:
        state = _update_generator(cfg, state, tasks)
    if r < cfg.first:
        return state, metrics

    bank = state["bank"]
    for task in tasks if cfg.bank_adds == "all" else tasks[-1:]:
        bank = bank_of.store(bank, task, cfg.bank_key, cfg.bank_capacity)
    state = {**state, "bank": bank}

    if cfg.learner_update != "none":
        answered = [answers.told(cfg, task) for task in tasks]
        sets = [_distill_set(cfg, world, task) for task in answered if len(task["images"]) > 1]
        if sets:
            state, found = bell.update(cfg, world, state, sets, r)
            metrics |= found
    metrics |= bank_of.figures(cfg.replay, world, bank, cfg.bank_key)
    bank_of.check_left(cfg.replay, world, bank, cfg.bank_key)
    if not metrics["bank/data_sets"]:
        return state, metrics | {"replay/updates": 0}
    state, found = replay.until_plateau(cfg.replay, world, state, bank, r, send)
    return state, metrics | found


def _chain(cfg: Config, world: World, state: State, r: int, send: Send) -> tuple[State, list[Arrays]]:
    """Recover tasks with one generator, trained on teacher after teacher; each starts where the one before ended."""
    tasks: list[Arrays] = []
    for job in _drawn(cfg, world, state, r):
        found = send("free.recover", [replace(job, index=0)], _inversion(cfg, world, state, r))
        for task in found:  # none where the teacher is bad
            state = {**state, "theta_g": torch.tensor(task["theta_g"])} if "theta_g" in task else state
        tasks += found
    return state, tasks


def _update_generator(cfg: Config, state: State, tasks: Sequence[Arrays]) -> State:
    """The state after the outer step on the meta-gradients of the tasks that were inverted, if there are any."""
    grads = [task["grad"] for task in tasks if "grad" in task]
    if not grads:
        return state
    grad = torch.zeros_like(state["theta_g"])
    for one in grads:
        grad += torch.tensor(one)
    if not torch.isfinite(grad).all():
        raise FloatingPointError("the generator's meta-gradient is not finite; lower method.lr_meta or lr_generator")
    if cfg.meta_reduction == "mean":
        grad /= len(grads)
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


def queries(cfg: Config, world: World) -> dict[str, int]:
    """Id of each teacher that is asked -> about how many images: services for their surrogates and for what these gave,
    and teachers with weights for the tasks of images of sources."""
    if not (cfg.surrogate.budget or cfg.sources):
        return {}
    used = surrogates.usable(cfg.surrogate, world)
    visits = Counter((card.id, inverts) for r in range(cfg.rounds) for card, inverts in _visits(cfg, world, r))
    spent, each = cfg.surrogate.distillation, cfg.images_per_class * world.way
    found: dict[str, int] = {}
    for card in used.cards:
        if card.access != "weights":
            found[card.id] = spent.asked(spent.total_rounds) + each * visits[card.id, True]
        elif cfg.sources:
            found[card.id] = sourced.set_queries(cfg, world.way) * visits[card.id, False]
    return found


def cost(cfg: Config, world: World, shard: Shard) -> Cost:
    """Time one pass of the inversion of a mean teacher, or of a fresh surrogate, and a task of images of sources.

    An inversion has k + 1 passes. The distillation of services is not timed.
    """
    used = surrogates.known(cfg.surrogate, world)
    kinds = [inverts for r in range(cfg.rounds) for _, inverts in _visits(cfg, world, r)]
    inverted = sum(kinds)

    def one_pass(card: TeacherCard) -> float:
        net_g = generator(world.image.shape, cfg.latent, cfg.width)
        theta_g = net_g.init(torch.Generator().manual_seed(0)).to(shard.device)[None]
        one, teacher = cfg.model_copy(update={"steps": 0}), surrogates.sample(shard, card)
        return cost_of.seconds(lambda: five(one, net_g, [teacher], theta_g, None, [0], way=world.way, batched=False))

    recovering = inverted * (cfg.steps + 1) * cost_of.of_mean_teacher(used, one_pass) if inverted else 0.0
    if asked := len(kinds) - inverted:
        recovering += asked * cost_of.of_mean_teacher(used, lambda card: sourced.seconds(cfg, world, shard, card, 1))
    learning = max(cfg.rounds - cfg.first, 0)
    least, most = cost_of.until_plateau(cfg.replay)
    return Cost(
        images=len(kinds) * cfg.images_per_class * world.way,
        recovery=recovering,
        least=learning * least,
        most=learning * most,
        meta=cfg.replay,
    )


METHOD = Method(
    Config=Config,
    init=init,
    learn=learn,
    plan=plan,
    shared=shared,
    recover=recover,
    notes=notes,
    profiles=PROFILES,
    presets=PRESETS,
    cost=cost,
    panels=(
        panels.RECOVERED,
        panels.LABELLED,
        panels.INVERSION,
        Panel("Distillation loss", "nats per image", "Mean of the tasks' losses, each just before its own step.",
              {"bell/loss": "distillation"}),
        *panels.REPLAY,
        Panel("Gradient alignment: cosine", "mean pairwise cosine",
              "Between the tasks' gradients: along the inner path, and at the starting weights. Above 0 the tasks "
              "agree.", {"align/path_cosine": "along the path", "align/base_cosine": "at the start"}),
        Panel("Gradient alignment: product", "mean pairwise product",
              "The same, not divided by the gradients' lengths.",
              {"align/path_product": "along the path", "align/base_product": "at the start"}),
    ),
    pictures=pictures.seen,
    access=LEVELS,
    queries=queries,
    shown={"recover/accuracy": "recover", "replay/accuracy_best": "replay"},
)  # fmt: skip
