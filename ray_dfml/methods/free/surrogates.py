"""FREE without weights: a service is distilled into a surrogate, which is inverted in its place, and labels the images.

No paper has this; it joins IDEAL's distillation ([Zhang2023], ICLR 2023) to FREE's inversion. The first rounds of a run
distil all services (`methods.students`). Then FIVE inverts the surrogates, at no query, and a service is asked once
about each recovered image. Teachers whose weights are known are inverted themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.images import fit, to_bytes, to_pixels
from ray_dfml.core.net import Net, net
from ray_dfml.errors import RejectedError
from ray_dfml.methods.base import State, World
from ray_dfml.methods.free.config import Config
from ray_dfml.methods.students import loop
from ray_dfml.methods.students.config import DistilConfig, architecture
from ray_dfml.methods.students.distil import notes as distil_notes
from ray_dfml.methods.students.distil import work
from ray_dfml.methods.students.training import labels_of, learnable
from ray_dfml.types import Arrays, Job, Service, Shard, TeacherCard

CERTAIN = 30.0
"""The logit that stands for an answer that is a label; those of the other classes are 0. In float32 it is certainty."""
SMALLEST = 1e-6
"""The smallest probability of an answer whose logarithm is taken."""


def services(world: World) -> tuple[TeacherCard, ...]:
    """The cards of the teachers that give no weights."""
    return tuple(card for card in world.cards if card.access != "weights")


def usable(cfg: Config, world: World) -> World:
    """The world without services if nothing is to be spent on surrogates."""
    cards = world.cards if cfg.surrogate.budget else tuple(card for card in world.cards if card.access == "weights")
    return replace(world, cards=cards)


def notes(cfg: Config, world: World) -> list[str]:
    """Lines about services: whether they are left out, or what the images assume that they are asked about."""
    found = services(world)
    if not found:
        return []
    if not cfg.surrogate.budget:
        return [
            f"free: {len(found)} of {len(world.cards)} teachers give no weights and are left out: {found[0].id} gives "
            f"{found[0].access}; method.surrogate.budget=1500 would distil each into a surrogate"
        ]
    said = f"free: {len(found)} of {len(world.cards)} teachers are asked, and inverted as surrogates"
    return [said, *distil_notes(cfg.surrogate.distillation)]


def plan(cfg: Config, world: World, state: State, r: int) -> list[Job]:
    """The jobs of round `r` of the distillation, one for each service. What one has missed is not made up."""
    settings = cfg.surrogate.distillation
    jobs = loop.plan(settings, replace(world, cards=services(world)), state, r)
    last = r == settings.total_rounds - 1
    return [replace(job, values={**job.values, "last": True}) for job in jobs] if last else jobs


def shared(cfg: Config) -> Arrays:
    """Values that the jobs of the distillation read."""
    return {"distil": cfg.surrogate.distillation.model_dump()}


def distil(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """A round of the distillation of services (`students.loop.recover`)."""
    return loop.recover(shard, jobs, DistilConfig.model_validate(shared["distil"]), work)


def begin(cfg: Config, world: World) -> State:
    """What the state holds of the distillation before the first round."""
    return loop.init(cfg.surrogate.distillation, replace(world, cards=services(world)))


def learn(cfg: Config, world: World, state: State, r: int, results: list[Arrays]) -> tuple[State, dict[str, Any]]:
    """Store what the shards distilled in round `r`. After the last of these rounds only the surrogates are kept."""
    settings, asked = cfg.surrogate.distillation, replace(world, cards=services(world))
    state, metrics = loop.learn(settings, asked, state, r, results, _no_send)
    if r == settings.total_rounds - 1:
        found = loop.students(settings, asked, state)
        kept = {
            id: {"arch": one.weights.arch, "theta": one.weights.theta, "stats": one.weights.stats}
            for id, one in found.items()
        }
        state = {name: value for name, value in state.items() if name != "students"} | {"surrogates": kept}
    return state, {f"surrogate/{name}": value for name, value in metrics.items()}


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


def inverted(world: World, state: Mapping[str, Any]) -> World:
    """The world in which each service has the architecture of its surrogate, since that is what is inverted.

    Services that were away when the others were distilled have none, and are left out. Raises RejectedError if nobody
    is left.
    """
    if "surrogates" not in state:
        return world
    known = state["surrogates"]
    cards = [replace(card, arch=known[card.id]["arch"]) if card.id in known else card for card in world.cards]
    cards = tuple(card for card in cards if card.access == "weights" or card.id in known)
    if not cards:
        raise RejectedError("free: no teacher has weights or a surrogate; start a new run")
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


def asked_once(cfg: Config, service: Service, task: Arrays) -> Arrays:
    """A task that was recovered from a surrogate, with the answers of its service, which is asked about each image.

    `cfg.surrogate.labels` says what happens where the answer is not the class that was wished for: the image keeps the
    wished label (`keep`), it is left out (`drop`), or it gets the label of the answer (`relabel`), unless the task does
    not have that class. The view is the one that was asked about. `agreement` is the share of images whose answer is
    the wished class, in percent. `told` says which answers give the classes of the task any probability.
    """
    card, own = service.card, cfg.surrogate
    units = np.array([card.classes.index(name) for name in task["classes"]])
    seen = to_bytes(fit(to_pixels(task["images"]), card.image.shape))
    answers = learnable(service.query(seen), card.access, own.answers)
    best = labels_of(answers)
    right = best == units[task["labels"]]
    labels = task["labels"]
    if own.labels == "relabel":
        place = np.full(len(card.classes), -1)
        place[units] = np.arange(len(units))
        labels = place[best]
    rows = np.flatnonzero(right if own.labels == "drop" else labels >= 0)
    return task | {
        "images": task["images"][rows],
        "labels": labels[rows],
        "logits": _logits(answers, len(card.classes))[rows][:, units],
        "told": _probabilities(answers, len(card.classes))[rows][:, units].max(1) > SMALLEST,
        "view": (cfg.crop_pad, cfg.crop_pad, False),
        "agreement": 100.0 * float(right.mean()),
    }


def told(cfg: Config, task: Arrays) -> Arrays:
    """What BELL learns of a task: its images, without those whose answer says nothing of the task's classes.

    Their target would be uniform. The form `hard` has the labels as targets, and so all images.
    """
    if "told" not in task or cfg.distill == "hard":
        return task
    return task | {name: task[name][task["told"]] for name in ("images", "labels", "logits")}


def _probabilities(answers: np.ndarray, classes: int) -> np.ndarray:
    return answers if answers.ndim == 2 else np.eye(classes, dtype=np.float32)[answers]


def _logits(answers: np.ndarray, classes: int) -> np.ndarray:
    """Logits [n q] of which the answers, labels [n] or probabilities [n q], are the softmax."""
    if answers.ndim == 1:
        return (CERTAIN * np.eye(classes, dtype=np.float32))[answers]
    return np.log(np.maximum(answers, SMALLEST)).astype(np.float32)


def arch_of(cfg: Config, card: TeacherCard) -> str:
    """The architecture that is inverted for a teacher: its own, or that of its surrogate."""
    return card.arch if card.access == "weights" else architecture(cfg.surrogate.distillation, card)


def sample(shard: Shard, card: TeacherCard) -> Any:
    """A teacher with weights, or a fresh surrogate in its place, whose inversion takes as long."""
    if card.access == "weights":
        return shard.teacher(card.id)
    fresh = Surrogate(card, torch.zeros(0), torch.zeros(0))
    theta, stats = fresh.net.init(torch.Generator().manual_seed(0)), fresh.net.initial_stats()
    return replace(fresh, theta=theta.to(shard.device), stats=stats.to(shard.device))
