"""Methods without weights: a service is distilled into a surrogate, which is inverted in its place.

No paper has this; it joins IDEAL's distillation ([Zhang2023], ICLR 2023) to the inversions of FREE and PURER. The first
rounds of a run distil all services (`methods.students`). Then surrogates are inverted, at no query. Teachers whose
weights are known are inverted themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ray_dfml.core.net import Net, net
from ray_dfml.errors import RejectedError, UsageError
from ray_dfml.methods.base import Send, State, World
from ray_dfml.methods.students import loop
from ray_dfml.methods.students.config import DistilConfig, architecture
from ray_dfml.methods.students.distil import notes as distil_notes
from ray_dfml.methods.students.distil import work
from ray_dfml.methods.surrogates.config import SurrogateConfig
from ray_dfml.types import Arrays, Job, Shard, TeacherCard


def services(world: World) -> tuple[TeacherCard, ...]:
    """The cards of the teachers that give no weights."""
    return tuple(card for card in world.cards if card.access != "weights")


def usable(cfg: SurrogateConfig, world: World) -> World:
    """The world without services if nothing is to be spent on surrogates."""
    cards = world.cards if cfg.budget else tuple(card for card in world.cards if card.access == "weights")
    return replace(world, cards=cards)


def checked(method: str, cfg: SurrogateConfig, world: World) -> World:
    """The teachers that can be used. Raises UsageError if there are none, or no service for `surrogate`."""
    found, asked = usable(cfg, world), services(world)
    if cfg.budget and not asked:
        raise UsageError(
            f"{method}: method.surrogate.budget is set, but every teacher gives its weights; leave it at 0"
        )
    if asked and not found.cards:
        raise UsageError(
            f"{method}: no teacher gives its weights ({asked[0].id} gives {asked[0].access}); "
            "method.surrogate.budget=1500 would distil each into a surrogate, which is inverted in its place"
        )
    return found


def round_of(cfg: SurrogateConfig, r: int) -> tuple[int, bool]:
    """The number of a round among those that distil services or among those that follow, and which it is."""
    return (r, True) if r < cfg.rounds else (r - cfg.rounds, False)


def known(cfg: SurrogateConfig, world: World) -> World:
    """The teachers that can be used, each with the architecture that is inverted for it."""
    used = usable(cfg, world)
    return replace(used, cards=tuple(replace(card, arch=arch_of(cfg, card)) for card in used.cards))


def notes(method: str, cfg: SurrogateConfig, world: World) -> list[str]:
    """Lines about services: whether they are left out, or what the images assume that they are asked about."""
    found = services(world)
    if not found:
        return []
    if not cfg.budget:
        return [
            f"{method}: {len(found)} of {len(world.cards)} teachers give no weights and are left out: "
            f"{found[0].id} gives {found[0].access}; method.surrogate.budget=1500 would distil each into a surrogate"
        ]
    said = f"{method}: {len(found)} of {len(world.cards)} teachers are asked, and inverted as surrogates"
    return [said, *distil_notes(cfg.distillation)]


def plan(cfg: SurrogateConfig, world: World, state: State, r: int) -> list[Job]:
    """The jobs of round `r` of the distillation, one for each service."""
    return loop.plan(cfg.distillation, replace(world, cards=services(world)), state, r)


def shared(cfg: SurrogateConfig) -> Arrays:
    """Values that the jobs of the distillation read."""
    return {"distil": cfg.distillation.model_dump()}


def distil(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """A round of the distillation of services (`students.loop.recover`)."""
    return loop.recover(shard, jobs, DistilConfig.model_validate(shared["distil"]), work)


def begin(cfg: SurrogateConfig, world: World) -> State:
    """What the state holds of the distillation before the first round; nothing if there is none."""
    if not cfg.budget:
        return {}
    return loop.init(cfg.distillation, replace(world, cards=services(world)))


def learn(
    cfg: SurrogateConfig, world: World, state: State, r: int, results: list[Arrays]
) -> tuple[State, dict[str, Any]]:
    """Store what the shards distilled in round `r`. After the last of these rounds only the surrogates are kept, and
    the students of services that were away in one of them (`made_up`)."""
    settings, asked = cfg.distillation, replace(world, cards=services(world))
    state, metrics = loop.learn(settings, asked, state, r, results, _no_send)
    if r == settings.total_rounds - 1:
        state = _kept(cfg, world, state)
    return state, {f"surrogate/{name}": value for name, value in metrics.items()}


def made_up(op: str, cfg: SurrogateConfig, world: World, state: State, send: Send) -> State:
    """Distil the services that missed rounds of the distillation and are back: all that is missing, one round after
    another. `op` is the recovery of the method.

    A service that is away again stays behind. A surrogate has the bits of a run in which its service was never away.
    """
    behind = state.get("students", {})
    asked = replace(world, cards=tuple(card for card in services(world) if card.id in behind))
    while jobs := loop.plan(cfg.distillation, asked, state, 0) if asked.cards else []:
        results = send(op, jobs, shared(cfg))
        state, _ = loop.learn(cfg.distillation, asked, state, 0, results, _no_send)
        answered = {result["teacher"] for result in results}
        asked = replace(asked, cards=tuple(card for card in asked.cards if card.id in answered))
    return _kept(cfg, world, state) if behind else state


def _kept(cfg: SurrogateConfig, world: World, state: State) -> State:
    """The state with the surrogates of all students that are done, beside the students that are behind."""
    students, settings = state["students"], cfg.distillation
    done = {id for id, one in students.items() if one["rounds"] == settings.total_rounds}
    found = loop.students(settings, replace(world, cards=tuple(c for c in services(world) if c.id in done)), state)
    new = {
        id: {"arch": one.weights.arch, "theta": one.weights.theta, "stats": one.weights.stats}
        for id, one in found.items()
    }
    behind = {id: one for id, one in students.items() if id not in done}
    rest = {name: value for name, value in state.items() if name != "students"}
    known = dict(sorted((rest.get("surrogates", {}) | new).items()))
    return rest | {"surrogates": known} | ({"students": behind} if behind else {})


def _no_send(op: str, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    raise AssertionError("the distillation of a round sends nothing")


@dataclass(frozen=True)
class Surrogate:
    """The student of a service as an inversion sees a teacher (`types.Teacher`). `card` has its architecture."""

    card: TeacherCard
    theta: Tensor
    stats: Tensor

    @cached_property
    def net(self) -> Net:
        """The network, without weights."""
        return net(self.card.arch, self.card.image.shape, len(self.card.classes))


def inverted(method: str, world: World, state: Mapping[str, Any]) -> World:
    """The world in which each service has the architecture of its surrogate, since that is what is inverted.

    Services that were away when the others were distilled have none, and are left out until that is made up. Raises
    RejectedError if nobody is left, and nobody behind either.
    """
    if "surrogates" not in state:
        return world
    known = state["surrogates"]
    cards = [replace(card, arch=known[card.id]["arch"]) if card.id in known else card for card in world.cards]
    cards = tuple(card for card in cards if card.access == "weights" or card.id in known)
    if not cards and "students" not in state:
        raise RejectedError(f"{method}: no teacher has weights or a surrogate; start a new run")
    return replace(world, cards=cards)


def values(state: Mapping[str, Any], card: TeacherCard) -> Arrays:
    """What the job of a teacher carries: the surrogate of a service, and nothing for a teacher with weights."""
    if card.access == "weights":
        return {}
    known = state["surrogates"][card.id]
    return {"surrogate": {"arch": known["arch"], "theta": known["theta"].numpy(), "stats": known["stats"].numpy()}}


def teacher(shard: Shard, job: Job) -> Any:
    """The teacher of a job, or the surrogate that the job carries. Raises RejectedError if it cannot be read."""
    known = job.values.get("surrogate")
    if known is None:
        return shard.teacher(str(job.teacher))
    theta, stats = (torch.tensor(known[name], device=shard.device) for name in ("theta", "stats"))
    return Surrogate(replace(shard.service(str(job.teacher)).card, arch=known["arch"]), theta, stats)


def arch_of(cfg: SurrogateConfig, card: TeacherCard) -> str:
    """The architecture that is inverted for a teacher: its own, or that of its surrogate."""
    return card.arch if card.access == "weights" else architecture(cfg.distillation, card)


def sample(shard: Shard, card: TeacherCard) -> Any:
    """A teacher with weights, or a fresh surrogate in its place, whose inversion takes as long."""
    if card.access == "weights":
        return shard.teacher(card.id)
    fresh = Surrogate(card, torch.zeros(0), torch.zeros(0))
    theta, stats = fresh.net.init(torch.Generator().manual_seed(0)), fresh.net.initial_stats()
    return replace(fresh, theta=theta.to(shard.device), stats=stats.to(shard.device))
