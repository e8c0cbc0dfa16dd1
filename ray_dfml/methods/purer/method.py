"""PURER: learnable images of all teachers, made harder whenever the learner stops improving on them.

[Hu2023] Architecture, Dataset and Model-Scale Agnostic Data-free Meta-Learning, arXiv 2303.11183 (CVPR 2023). ECI is
here and in `eci`. ICFIL acts at meta-test: it is `methods.icfil`, and its settings are `eval.icfil`.

In a round the shards take `image_steps` steps on the images of every teacher. Then the learner makes `updates`
meta-updates on pseudo tasks of these images. Each teacher has its own images, and a class that several teachers know
has the images of all of them. docs/methods_purer_bidf.md lists the deviations from paper and released code.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ray_dfml.core import seeds
from ray_dfml.core.sources.warp import augment
from ray_dfml.errors import UsageError
from ray_dfml.methods import bank as bank_of
from ray_dfml.methods import cost as cost_of
from ray_dfml.methods import panels, pictures, recovery, replay
from ray_dfml.methods.base import Cost, Method, Metrics, Panel, Seen, Send, State, World, initial_learner, teacher_job
from ray_dfml.methods.inversion import dropped_statistics
from ray_dfml.methods.purer import eci
from ray_dfml.methods.purer.config import PRESETS, PROFILES, Config
from ray_dfml.methods.surrogates import stage as surrogates
from ray_dfml.types import LEVELS, Arrays, Job, Shard, Teacher, TeacherCard


def notes(cfg: Config, world: World) -> list[str]:
    """Lines about services, teachers to which the statistics term does not apply, and classes that no task can hold."""
    used = surrogates.known(cfg.surrogate, world)
    return [
        *surrogates.notes("purer", cfg.surrogate, world),
        *dropped_statistics(used.cards, cfg.bn_weight),
        *bank_of.notes(cfg.meta, world.way, bank_of.of_pool(used, cfg.image_key)),
    ]


def init(cfg: Config, world: World) -> State:
    """The learner, images N(0, 1) of each teacher, and the gradient switch.

    If services are distilled first, the state also holds their students. Raises UsageError if a class has too few
    images for a task, if no data set has enough classes, or if no teacher can be used.
    """
    if cfg.meta.shot + cfg.meta.query > cfg.images_per_class:
        raise UsageError(
            f"purer: tasks take {cfg.meta.shot} + {cfg.meta.query} images of a class, method.images_per_class is "
            f"{cfg.images_per_class}; raise it or lower method.meta.query"
        )
    world = surrogates.checked("purer", cfg.surrogate, world)
    bank_of.check("purer", "method.meta", cfg.meta, world.way, bank_of.of_pool(world, cfg.image_key))
    state = replay.with_optimiser(initial_learner(world))
    return (
        state
        | surrogates.begin(cfg.surrogate, world)
        | {
            "images": {card.id: fresh(cfg, world, card) for card in world.cards},
            "push": {},
            "switch": {"best": -1.0, "waited": 0, "due": 0, "fired": 0},
        }
    )


def fresh(cfg: Config, world: World, card: TeacherCard) -> State:
    """Images N(0, 1) of a teacher, drawn from the run's seed, with the moments of their optimiser."""
    shape = (cfg.images_per_class * len(card.classes), *card.image.shape)
    x = torch.randn(shape, generator=seeds.rng(world.seed, "images", card.id))
    return {"x": x, "m": torch.zeros_like(x), "v": torch.zeros_like(x), "step": 0}


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """One job per teacher, with its images, their moments, and the push of the curriculum.

    In the rounds that distil services there is one for each of them.
    """
    r, distils = surrogates.round_of(cfg.surrogate, r)
    if distils:
        return surrogates.plan(cfg.surrogate, world, state, r)
    cards = list(_used(cfg, world, state).cards)
    if 0 < cfg.teachers_per_round < len(cards):
        rng = seeds.rng(world.seed, r, "plan")
        cards = [cards[i] for i in torch.randperm(len(cards), generator=rng)[: cfg.teachers_per_round].tolist()]
    jobs = []
    for j, card in enumerate(cards):
        own = state["images"].get(card.id) or fresh(cfg, world, card)
        values = {k: own[k].numpy() for k in ("x", "m", "v")} | {"step": own["step"]}
        push = state["push"].get(card.id)
        values["push"] = None if push is None else np.asarray(push)
        values |= surrogates.values(state, card)
        jobs.append(teacher_job(card, index=j, seed=seeds.derive(world.seed, r, "recover", j), values=values))
    return jobs


def _used(cfg: Config, world: World, state: State) -> World:
    """The teachers that are inverted, services with the architecture of their surrogate."""
    return surrogates.inverted("purer", surrogates.usable(cfg.surrogate, world), state)


def shared(cfg: Config, world: World, state: State, r: int) -> Arrays:
    """The settings of the inversion; or those of the distillation of services."""
    distils = surrogates.round_of(cfg.surrogate, r)[1]
    return surrogates.shared(cfg.surrogate) if distils else {"cfg": cfg.model_dump()}


def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `purer.recover` op: `eci.invert` on the images that each job brings.

    In the rounds that distil services it is `surrogates.distil`.
    """
    if "distil" in shared:
        return surrogates.distil(shard, jobs, shared)
    cfg = Config.model_validate(shared["cfg"])

    def invert(jobs: Sequence[Job], teachers: Sequence[Teacher], batched: bool) -> list[Arrays | None]:
        found = eci.invert(cfg, teachers, jobs, device=shard.device, batched=batched)
        finite = [math.isfinite(one["loss_last"]) and bool(np.isfinite(one["x"]).all()) for one in found]
        return [
            one | {"teacher": job.teacher} if fine else None for job, one, fine in zip(jobs, found, finite, strict=True)
        ]

    return recovery.recover(shard, jobs, invert, partial(surrogates.teacher, shard))


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Store the images, make meta-updates on pseudo tasks of them, and ask for the curriculum's push if it is due.

    The rounds that distil services only do that.
    """
    r, distils = surrogates.round_of(cfg.surrogate, r)
    if distils:
        return surrogates.learn(cfg.surrogate, world, state, r, results)
    given, world = world, _used(cfg, world, state)
    state = surrogates.made_up("purer.recover", cfg.surrogate, given, state, send)
    metrics: Metrics = {"recover/tasks": len(results), "recover/images": sum(len(result["x"]) for result in results)}
    if results:
        metrics |= {
            f"recover/{name}": sum(result[name] for result in results) / len(results)
            for name in ("loss_first", "loss_last", "ce", "accuracy")
        }
    new = {
        result["teacher"]: {k: torch.tensor(result[k]) for k in ("x", "m", "v")} | {"step": result["step"]}
        for result in results
    }
    images = state["images"] | new
    world = replace(world, cards=tuple(card for card in world.cards if card.id in images))
    usable = [card.id for card in world.cards]
    state = {
        **state,
        "images": {id: images[id] for id in usable},
        "push": {id: state["push"][id] for id in usable if id in state["push"] and id not in new},
    }
    if r < cfg.image_warmup or not usable:
        return state, metrics
    store = _Store(cfg, world, state)
    bank_of.check_left(cfg.meta, world, {}, cfg.image_key)
    found: Metrics = {}
    for u in range(cfg.updates):
        tasks = [store.task(world.seed, r, "pseudo", u, t) for t in range(cfg.meta.tasks)]
        state, found = replay.step(cfg.meta, world, state, tasks, (r, "pseudo", u), send)
        state = {**state, "switch": switched(cfg, state["switch"], state["updates"], found["accuracy"] or 0.0)}
    metrics |= {f"replay/{name}": value for name, value in found.items()}
    metrics["replay/updates"] = cfg.updates
    if state["switch"]["due"]:
        state, metrics["curriculum/outer_loss"] = _curriculum(cfg, world, state, r, store, send)
    return state, metrics | {"curriculum/fired": state["switch"]["fired"]}


def switched(cfg: Config, switch: State, updates: int, accuracy: float) -> State:
    """The gradient switch after meta-update number `updates`, which had this mean training accuracy in percent.

    An adversarial step ([Hu2023]) is due for the first time after `curriculum_after` updates. Later it is due after
    `curriculum_patience` updates without a new best accuracy, and the best is forgotten. Nothing is counted while a
    step is due. With `curriculum` 0 no step is ever due.
    """
    if not cfg.curriculum or switch["due"] or updates < cfg.curriculum_after:
        return switch
    if updates == cfg.curriculum_after:
        return {**switch, "due": 1}
    if accuracy > switch["best"]:
        return {**switch, "best": accuracy, "waited": 0}
    if switch["waited"] + 1 < cfg.curriculum_patience:
        return {**switch, "waited": switch["waited"] + 1}
    return {**switch, "best": -1.0, "waited": 0, "due": 1}


def _curriculum(cfg: Config, world: World, state: State, r: int, store: "_Store", send: Send) -> tuple[State, float]:
    """Prepare the adversarial step that is due: the pixel gradient of the outer loss of one pseudo task.

    Each teacher in the task gets its part as a push, which joins the first image step of its next job. The images do
    not change before that step, so it is the step of the paper.
    """
    drawn = store.draw(world.seed, r, "curriculum")
    values = store.pixels(drawn)
    job = Job(index=0, seed=0, values=values)
    (result,) = send("purer.grad", [job], replay.shared_values(cfg.meta, world, state))
    if not all(np.isfinite(result[name]).all() for name in ("support", "query")):
        raise FloatingPointError("the pixel gradient of the curriculum is not finite; lower method.meta.inner_lr or lr")
    push = {}
    rows = np.concatenate([drawn["support"], drawn["query"]])
    gradient = torch.tensor(np.concatenate([result["support"], result["query"]]))
    for i, card in enumerate(store.cards):
        mine = rows[:, 0] == i
        if mine.any():
            push[card.id] = eci.push_of(
                state["images"][card.id]["x"], rows[mine, 1], gradient[torch.tensor(mine)], card.image, world.image,
                cfg.curriculum,
            )  # fmt: skip
    switch = {**state["switch"], "due": 0, "fired": state["switch"]["fired"] + 1}
    return {**state, "push": state["push"] | push, "switch": switch}, result["loss"]


class _Store:
    """The images of all teachers as the learner sees them, and the rows (teacher, image) of each class."""

    def __init__(self, cfg: Config, world: World, state: State) -> None:
        self.cards, self._world, self._meta = world.cards, world, cfg.meta
        self.images = [
            eci.as_learner_sees(state["images"][card.id]["x"], card.image, world.image).numpy() for card in world.cards
        ]
        self.classes: dict[str, Any] = {}
        for i, card in enumerate(world.cards):
            for local, name in enumerate(card.classes):
                key = bank_of.class_key(name, card.id, cfg.image_key)
                rows = np.arange(cfg.images_per_class) * len(card.classes) + local
                pairs = np.stack([np.full_like(rows, i), rows], 1)
                self.classes[key] = np.concatenate([self.classes[key], pairs]) if key in self.classes else pairs

    def draw(self, *tag: int | str) -> dict[str, np.ndarray]:
        """A pseudo task as rows (teacher, image): support [s 2] and query [u 2], interleaved."""
        meta, rng = self._meta, seeds.rng(*tag)
        support, query = bank_of.draw(meta, self._world.way, self.classes, rng)
        return {"support": support, "query": query}

    def pixels(self, task: dict[str, np.ndarray]) -> Arrays:
        """The images of a pseudo task, float32, normalised for the learner."""
        return {name: np.stack([self.images[i][row] for i, row in rows]) for name, rows in task.items()}

    def task(self, *tag: int | str) -> Arrays:
        """The images of a new pseudo task. With `augment` they are changed as pixels, which are clamped to [0, 1]."""
        images = self.pixels(self.draw(*tag))
        if not self._meta.augment:
            return images
        rng, spec = seeds.rng(*tag, "augment"), self._world.image
        mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
        return {
            name: ((augment(rng, (torch.tensor(x) * std + mean).clamp(0, 1)) - mean) / std).numpy()
            for name, x in images.items()
        }


def seen(cfg: Config, world: World, results: Sequence[Arrays]) -> list[Seen]:
    """The images of all teachers, with what these said in the last pass of the round.

    In the rounds that distil services they are the images that these were asked about.
    """
    if any("answers" in result for result in results):
        return pictures.seen(cfg, world, results)
    cards = {card.id: card for card in world.cards}
    return pictures.seen(cfg, world, [eci.as_task(cards[result["teacher"]], result) for result in results])


def queries(cfg: Config, world: World) -> dict[str, int]:
    """Id of each service -> how many images it is asked about for its surrogate."""
    settings = cfg.surrogate.distillation
    asked = surrogates.services(world) if cfg.surrogate.budget else ()
    return {card.id: settings.asked(settings.total_rounds) for card in asked}


def cost(cfg: Config, world: World, shard: Shard) -> Cost:
    """Time the image steps that a mean teacher takes in a round, or a fresh surrogate.

    The distillation of services is not timed.
    """
    world = surrogates.known(cfg.surrogate, world)

    def one_round(card: TeacherCard) -> float:
        own = fresh(cfg, world, card)
        values = {k: own[k].numpy() for k in ("x", "m", "v")} | {"step": 0, "push": None}
        job, teacher = teacher_job(card, index=0, seed=0, values=values), surrogates.sample(shard, card)
        return cost_of.seconds(lambda: eci.invert(cfg, [teacher], [job], device=shard.device, batched=False))

    count = min(cfg.teachers_per_round or len(world.cards), len(world.cards))
    updates = max(cfg.rounds - cfg.image_warmup, 0) * cfg.updates
    return Cost(
        images=cfg.images_per_class * sum(len(card.classes) for card in world.cards),
        recovery=cfg.rounds * count * cost_of.of_mean_teacher(world, one_round),
        least=updates,
        most=updates,
        meta=cfg.meta,
    )


METHOD = Method(
    Config=Config,
    init=init,
    learn=learn,
    plan=plan,
    shared=shared,
    recover=recover,
    notes=notes,
    ops={"purer.grad": eci.grad},
    profiles=PROFILES,
    presets=PRESETS,
    cost=cost,
    panels=(
        panels.RECOVERED,
        panels.INVERSION,
        *panels.LAST_UPDATE,
        Panel("Curriculum: outer loss", "nats per image", "Loss of the pseudo task that is to become harder.",
              {"curriculum/outer_loss": "outer loss"}),
        Panel("Curriculum: steps", "steps so far", "Adversarial steps: one whenever the learner stops improving.",
              {"curriculum/fired": "steps"}),
    ),
    pictures=seen,
    access=LEVELS,
    queries=queries,
    shown={"recover/accuracy": "recover", "replay/accuracy": "replay"},
)  # fmt: skip
