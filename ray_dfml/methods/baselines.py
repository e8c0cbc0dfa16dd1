"""The baselines that merge or pick teachers' weights, and `random`. Each has one round and recovers nothing.

[Wei2024] FREE, arXiv 2405.00984, section 5.1 (Random, Average, Best-Model).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ray_dfml.core.hub import is_hub
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods.base import (
    Method,
    MethodConfig,
    Metrics,
    Send,
    State,
    World,
    initial_learner,
    learner_weights,
    teacher_job,
)
from ray_dfml.types import Arrays, Job, LearnerWeights, Shard, TeacherCard, size_text


class BaselineConfig(MethodConfig):
    """No settings beyond the number of rounds, which is one."""


class Fetched(NamedTuple):
    """A teacher's id, flat weights [p] and batch-norm statistics [k]."""

    teacher: str
    theta: Tensor
    stats: Tensor


def weights(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `weights` op: a teacher's id, flat weights [p] and batch-norm statistics [k]."""
    teachers = [(job.teacher, shard.teacher(str(job.teacher))) for job in jobs]
    return [{"teacher": id, "theta": t.theta.cpu().numpy(), "stats": t.stats.cpu().numpy()} for id, t in teachers]


def fetch(cards: Sequence[TeacherCard], send: Send) -> list[Fetched]:
    """The weights of teachers in the order of the cards. Teachers that cannot be read are left out.

    Raises RejectedError if none can be read.
    """
    results = send("weights", [teacher_job(card, index=i, seed=0, values={}) for i, card in enumerate(cards)], {})
    if not results:
        raise RejectedError("no teacher of the pool could be read; run `ray-dfml pool check`")
    return [Fetched(r["teacher"], torch.tensor(r["theta"]), torch.tensor(r["stats"])) for r in results]


def mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean of vectors [p], summed in their order."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part / len(parts)
    return total


def check_same_network(method: str, world: World) -> None:
    """Raise UsageError unless every teacher has the learner's architecture, input and number of classes.

    The weights of different networks live in different spaces and have no mean.
    """
    if not world.cards:
        raise UsageError(f"{method}: merges the weights of teachers; name a pool with --pool")
    wanted = (world.arch, world.image.shape, world.way)
    kinds = [(card.arch, card.image.shape, len(card.classes)) for card in world.cards]
    odd = [(card.id, kind) for card, kind in zip(world.cards, kinds, strict=True) if kind != wanted]
    if not odd:
        return
    id, kind = odd[0]
    if len(set(kinds)) == 1 and kind[1] == world.image.shape:
        advice = f"use --set learner.arch={kind[0]} --set learner.way={kind[2]}"
    else:
        advice = "split the pool, or use a method that learns from outputs, such as free"
    raise UsageError(
        f"{method}: merges weights, so every teacher must be the learner's network, {_kind(*wanted)}; "
        f"{id} is {_kind(*kind)}; {advice}"
    )


def _kind(arch: str, shape: Sequence[int], classes: int) -> str:
    return f"{arch} of {size_text(shape)} images and {classes} classes"


def best_teacher(world: World) -> TeacherCard:
    """The teacher with the highest reported accuracy among those that fit the learner's episodes.

    A teacher fits if its images have the learner's channels and size, if it has at least as many classes as an
    episode, and if it is none of another library. Of equal accuracies the last id wins. Raises UsageError if no teacher
    fits, or none reports an accuracy.
    """
    reporting = _named(world)
    named = [card for card in reporting if not is_hub(card.arch)]
    if reporting and not named:
        raise UsageError(f"best-model: {reporting[-1].id} is {reporting[-1].arch}, which can be no learner")
    if not named:
        raise UsageError("best-model: no teacher of the pool reports an accuracy; give one with `pool add --accuracy`")
    able = [card for card in named if card.image.shape == world.image.shape and len(card.classes) >= world.way]
    if not able:
        raise UsageError(
            f"best-model: no teacher that reports an accuracy takes {size_text(world.image.shape)} images and has "
            f"{world.way} classes, as the episodes need; {named[-1].id} takes {size_text(named[-1].image.shape)} and "
            f"has {len(named[-1].classes)}; use another pool, or a smaller learner.way"
        )
    return able[-1]


def _named(world: World) -> list[TeacherCard]:
    named = [card for card in world.cards if card.accuracy is not None]
    return sorted(named, key=lambda card: (card.accuracy, card.id))


def _best_notes(world: World) -> list[str]:
    chosen, top = best_teacher(world), _named(world)[-1]
    found = []
    if is_hub(top.arch):
        found.append(
            f"best-model takes {chosen.id} ({chosen.accuracy} %): {top.id} ({top.accuracy} %) is {top.arch}, which can "
            "be no learner"
        )
    elif top != chosen:
        found.append(
            f"best-model takes {chosen.id} ({chosen.accuracy} %): {top.id} ({top.accuracy} %) takes "
            f"{size_text(top.image.shape)} images and has {len(top.classes)} classes, which does not fit the episodes"
        )
    return found


def _random(world: World, state: State, send: Send) -> State:
    return state


def _average(world: World, state: State, send: Send) -> State:
    found = fetch(world.cards, send)
    return {**state, "theta": mean([one.theta for one in found]), "stats": mean([one.stats for one in found])}


def _best_model(world: World, state: State, send: Send) -> State:
    best = best_teacher(world)
    (found,) = fetch([best], send)
    return {
        **state,
        "theta": found.theta,
        "stats": found.stats,
        "network": {"arch": best.arch, "outputs": len(best.classes), "image": best.image.values()},
        "teacher": best.id,
    }


def untrained(world: World, *, steps: int, lr: float) -> LearnerWeights:
    """The weights of `random`: a fresh learner drawn from the seed of the run, the same for every method."""
    return learner_weights(world, initial_learner(world, zero_head_bias=True), steps=steps, lr=lr)


def baseline(
    make: Callable[[World, State, Send], State],
    *,
    check: Callable[[World], object] = lambda world: None,
    notes: Callable[[World], list[str]] = lambda world: [],
    readings: tuple[str, ...] = ("finetune",),
    needs_pool: bool = True,
) -> Method[BaselineConfig]:
    """A method whose one round is `make`, applied to a fresh learner with a zero head bias.

    `check` raises UsageError for a world that `make` cannot take.
    """

    def init(cfg: BaselineConfig, world: World) -> State:
        check(world)
        return initial_learner(world, zero_head_bias=True)

    def learn(
        cfg: BaselineConfig, world: World, state: State, r: int, results: list[Arrays], send: Send
    ) -> tuple[State, Metrics]:
        return make(world, state, send), {}

    return Method(
        Config=BaselineConfig, init=init, learn=learn, notes=lambda cfg, world: notes(world), readings=readings,
        needs_pool=needs_pool, baseline=True,
    )  # fmt: skip


RANDOM = baseline(_random, needs_pool=False)
AVERAGE = baseline(_average, check=lambda world: check_same_network("average", world))
BEST_MODEL = baseline(_best_model, check=best_teacher, notes=_best_notes, readings=("direct", "finetune", "assign"))
