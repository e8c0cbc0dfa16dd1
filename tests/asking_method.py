"""A method that asks: the learner is trained on noise that the teachers label, whatever their access.

Each round asks every teacher about `images` new images, and about the first ones again, which costs nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from ray_dfml.core import seeds
from ray_dfml.methods import METHODS, bank, replay
from ray_dfml.methods.base import (
    MetaConfig,
    Method,
    MethodConfig,
    Metrics,
    Send,
    State,
    World,
    initial_learner,
    teacher_job,
)
from ray_dfml.types import LEVELS, Arrays, Job, Shard


class Config(MethodConfig):
    """Settings of the questions."""

    rounds: int = Field(default=4, ge=1, description="Outer iterations.")
    images: int = Field(default=20, ge=1, description="New images per teacher and round.")
    replay: MetaConfig = MetaConfig(shot=1, query=1, tasks=2, inner_steps=1)


def init(cfg: Config, world: World) -> State:
    """A fresh learner and an empty bank."""
    return replay.with_optimiser(initial_learner(world)) | {"bank": {}}


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """Every teacher labels noise of its own."""
    return [
        teacher_job(card, index=j, seed=seeds.derive(world.seed, r, "asking", j), values={"first": seeds.derive(j)})
        for j, card in enumerate(world.cards)
    ]


def shared(cfg: Config, world: World, state: State, r: int) -> Arrays:
    """The settings."""
    return {"images": cfg.images}


def recover(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """Noise, and the class that the teacher takes each image for."""
    found = []
    for job in jobs:
        service = shard.service(str(job.teacher))
        shape = (shared["images"], *service.card.image.shape)
        new, old = (
            np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
            for seed in (job.seed, job.values["first"])
        )
        answers = service.query(np.concatenate([new, old[:1]]))[:-1]
        labels = answers if service.card.access == "label" else answers.argmax(1)
        classes = service.card.classes
        found.append({"teacher": job.teacher, "classes": classes, "images": new, "labels": labels, "answers": answers})
    return found


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays], send: Send) -> tuple[State, Metrics]:
    """Bank the images; one meta-update where there are classes enough for a task."""
    kept: Any = state["bank"]
    for task in results:
        kept = bank.store(kept, task, "class", 100)
    answers = {str(task["teacher"]): np.asarray(task["answers"]) for task in results}
    state = {**state, "bank": kept, "answers": answers}
    if bank.figures(cfg.replay, world, kept, "class")["bank/data_sets"]:
        state, _ = replay.update(cfg.replay, world, state, kept, (r, "asking"), send)
    return state, {"asking/images": sum(len(task["images"]) for task in results)}


def queries(cfg: Config, world: World) -> dict[str, int]:
    """The new images of all rounds, and one that is asked about in each."""
    return {card.id: cfg.rounds * cfg.images + 1 for card in world.cards}


METHOD = Method(
    Config=Config, init=init, plan=plan, shared=shared, recover=recover, learn=learn, access=LEVELS, queries=queries
)


def register() -> None:
    """The line of `METHODS`, and what is derived from it at import. Also in the processes of a cluster."""
    from ray_dfml.ops import OPS, of_method

    METHODS["asking"] = METHOD
    OPS.update(of_method("asking", METHOD))
