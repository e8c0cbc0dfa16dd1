"""A method in one module, as a user would write it: the learner is trained on noise that the teachers label."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from ray_dfml.core import seeds
from ray_dfml.core.images import to_bytes
from ray_dfml.methods import METHODS, bank, inversion, panels, recovery, replay
from ray_dfml.methods.base import (
    Cost,
    MetaConfig,
    Method,
    MethodConfig,
    Metrics,
    Panel,
    Preset,
    Send,
    State,
    World,
    initial_learner,
    teacher_job,
)  # fmt: skip
from ray_dfml.types import Arrays, Job, Shard, Teacher


class Config(MethodConfig):
    """Settings of the noise."""

    rounds: int = Field(default=3, ge=1, description="Outer iterations.")
    images: int = Field(default=20, ge=1, description="Noise images per teacher and round.")
    contrast: float = Field(default=0.5, gt=0, le=1, description="Range of a pixel.")
    replay: MetaConfig = MetaConfig(shot=1, query=1, tasks=2, inner_steps=1)


def init(cfg: Config, world: World) -> State:
    """A fresh learner and an empty bank."""
    return replay.with_optimiser(initial_learner(world)) | {"bank": {}}


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """Every teacher labels noise of its own."""
    return [
        teacher_job(card, index=j, seed=seeds.derive(world.seed, r, "noise", j), values={})
        for j, card in enumerate(world.cards)
    ]


def shared(cfg: Config, world: World, state: State, r: int) -> Arrays:
    """The settings, and the learner's images."""
    return {"cfg": cfg.model_dump(), "shape": world.image.shape}


def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """Noise, and the class that the teacher takes each image for."""
    cfg = Config.model_validate(shared["cfg"])

    def label(jobs: Sequence[Job], teachers: Sequence[Teacher], batched: bool) -> list[Arrays | None]:
        found: list[Arrays | None] = []
        for job, teacher in zip(jobs, teachers, strict=True):
            rng = torch.Generator().manual_seed(job.seed)
            pixels = cfg.contrast * torch.rand(cfg.images, *shared["shape"], generator=rng)
            seen = inversion.as_teacher_sees(pixels.to(shard.device), teacher.card.image)
            logits = teacher.net(teacher.theta, seen, teacher.stats)
            confidence = 100.0 * float(logits.softmax(-1).amax(-1).mean())
            task = {"teacher": job.teacher, "classes": teacher.card.classes, "confidence": confidence}
            found.append(task | {"images": to_bytes(pixels), "labels": logits.argmax(-1).cpu().numpy()})
        return found

    return recovery.recover(shard, jobs, label)


def count(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """An op of its own: how many images a job brings."""
    return [{"images": len(job.values["images"])} for job in jobs]


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Bank the images; one meta-update where there are classes enough for a task."""
    kept: Any = state["bank"]
    for task in results:
        kept = bank.store(kept, task, "class", 100)
    state = {**state, "bank": kept}
    counted = send("noise.count", [Job(index=i, seed=0, values=task) for i, task in enumerate(results)], {})
    confidence = sum(task["confidence"] for task in results) / len(results)
    metrics: Metrics = {"noise/images": sum(one["images"] for one in counted), "noise/confidence": confidence}
    metrics |= bank.figures(cfg.replay, world, kept, "class")
    if metrics["bank/data_sets"]:
        state, found = replay.update(cfg.replay, world, state, kept, (r, "noise"), send)
        metrics |= {f"replay/{name}": value for name, value in found.items()}
    return state, metrics


def cost(cfg: Config, world: World, shard: Shard) -> Cost:
    """The noise is free."""
    return Cost(images=cfg.rounds * cfg.images * len(world.cards), least=0, most=cfg.rounds, meta=cfg.replay)


METHOD = Method(
    Config=Config,
    init=init,
    plan=plan,
    shared=shared,
    recover=recover,
    learn=learn,
    notes=lambda cfg, world: ["noise has no classes of its own"],
    ops={"noise.count": count},
    profiles={"paper": {"method": {"contrast": 1.0}}},
    presets={"loud": Preset("full range", {"method": {"contrast": 0.9, "rounds": 2}})},
    cost=cost,
    panels=(
        Panel("Confidence on noise", "%", "Of the teachers.", {"noise/confidence": "confidence"}), *panels.LAST_UPDATE
    ),
    shown={"noise/confidence": "confidence"},
)  # fmt: skip


def register() -> None:
    """The line of `METHODS`. It must come before anything that lists the methods is imported."""
    METHODS["noise"] = METHOD
