"""Baselines in the space of parameters, and the random initialisation: each has one round and recovers nothing.

[Wei2024] FREE, arXiv 2405.00984, section 5.1 (Random, Average, Best-Model).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods.base import MethodConfig, Metrics, Send, State, Worker, World, initial_learner
from ray_dfml.types import Arrays, Job, TeacherCard


class BaselineConfig(MethodConfig):
    """No settings beyond the number of rounds, which is one."""


def weights(worker: Worker, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `weights` op: a teacher's flat weights [p] and batch-norm statistics [k]."""
    teachers = [worker.teacher(str(job.teacher)) for job in jobs]
    return [{"theta": t.theta.cpu().numpy(), "stats": t.stats.cpu().numpy()} for t in teachers]


def _fetch(cards: Sequence[TeacherCard], send: Send) -> list[tuple[torch.Tensor, torch.Tensor]]:
    results = send("weights", [Job(index=i, seed=0, teacher=card.id) for i, card in enumerate(cards)], {})
    if not results:
        raise RejectedError("no teacher of the pool could be read; run `ray-dfml pool check`")
    return [(torch.tensor(r["theta"]), torch.tensor(r["stats"])) for r in results]


def _random(world: World, state: State, send: Send) -> State:
    return state


def _average(world: World, state: State, send: Send) -> State:
    wrong = [card for card in world.cards if (card.arch, len(card.classes)) != (world.arch, world.way)]
    if wrong:
        raise UsageError(
            f"average: needs teachers of one architecture and number of classes, {world.arch} with {world.way}; "
            f"{wrong[0].id} is {wrong[0].arch} with {len(wrong[0].classes)}; "
            f"use a method that learns from outputs, such as free"
        )
    theta, stats = torch.zeros_like(state["theta"]), torch.zeros_like(state["stats"])
    fetched = _fetch(world.cards, send)
    for one_theta, one_stats in fetched:
        theta += one_theta / len(fetched)
        stats += one_stats / len(fetched)
    return {**state, "theta": theta, "stats": stats}


def _best_model(world: World, state: State, send: Send) -> State:
    named = [card for card in world.cards if card.accuracy is not None]
    if not named:
        raise UsageError("best-model: no teacher of the pool reports an accuracy; give one with `pool add --accuracy`")
    best = max(named, key=lambda card: (card.accuracy or 0.0, card.id))
    if len(best.classes) < world.way:
        raise UsageError(f"best-model: {best.id} has {len(best.classes)} classes, episodes need {world.way}")
    ((theta, stats),) = _fetch([best], send)
    return {
        **state,
        "theta": theta,
        "stats": stats,
        "arch": best.arch,
        "outputs": len(best.classes),
        "teacher": best.id,
    }


@dataclass(frozen=True)
class Baseline:
    """A method whose one round is `make`, applied to a fresh learner with a zero head bias."""

    make: Callable[[World, State, Send], State]
    READINGS: tuple[str, ...]
    Config: type[MethodConfig] = BaselineConfig

    def init(self, cfg: MethodConfig, world: World) -> State:
        """A fresh learner."""
        return initial_learner(world, zero_head_bias=True)

    def plan(self, cfg: MethodConfig, world: World, state: State, r: int) -> list[Job]:
        """Nothing is recovered."""
        return []

    def shared(self, cfg: MethodConfig, world: World, state: State, r: int) -> Arrays:
        """Nothing is shared."""
        return {}

    def recover(self, worker: Worker, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
        """Nothing is recovered."""
        return []

    def learn(
        self, cfg: MethodConfig, world: World, state: State, r: int, results: list[Arrays], send: Send
    ) -> tuple[State, Metrics]:
        """The baseline's weights."""
        return self.make(world, state, send), {}


RANDOM = Baseline(_random, ("finetune",))
AVERAGE = Baseline(_average, ("finetune",))
BEST_MODEL = Baseline(_best_model, ("direct", "finetune", "assign"))
