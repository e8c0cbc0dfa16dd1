"""The loop of a method that distils each teacher into a student: one job for each teacher and round.

The state holds under `students`, for each teacher, the student (`training.Pupil`), the images that were asked about
with their answers, and what else the method keeps (`own`). A job brings all of it and its result holds what is new. So
a job that is done twice asks about the same images, which were paid for already.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from ray_dfml.core import seeds
from ray_dfml.core.net import Net, net
from ray_dfml.errors import RejectedError, UsageError, rejection
from ray_dfml.methods.base import Metrics, Panel, Send, State, Student, World
from ray_dfml.methods.students.config import Batch, StudentConfig, architecture
from ray_dfml.methods.students.training import Lesson, Pupil, labels_of, learnable
from ray_dfml.types import Arrays, Job, LearnerWeights, Service, Shard, TeacherCard

C = TypeVar("C", bound=StudentConfig)


ACCURACY = Panel(
    "Accuracy over queries", "%", "Top-1 on validation images, mean over the teachers, against the images that a "
    "teacher was asked about; nothing is selected by it.", {"validation": "validation"}, over="queries",
)  # fmt: skip
"""The first panel of every method that distils."""


def network(cfg: StudentConfig, card: TeacherCard) -> Net:
    """The network of a teacher's student."""
    return net(architecture(cfg, card), card.image.shape, len(card.classes))


@dataclass
class Study:
    """One job: a service, its student, and what is known so far. The work of a method changes it and returns figures.

    A student has the input and the classes of its teacher.
    """

    service: Service
    lesson: Lesson
    rng: torch.Generator
    device: torch.device
    r: int
    """Number of the round."""
    last: bool
    """Whether the round is the last one."""
    batch: Batch
    """How many images the round may ask about."""
    images: np.ndarray
    """uint8 [n c h w], the images that were asked about."""
    answers: np.ndarray
    """Their answers: labels int64 [n], or probabilities float32 [n q]."""
    own: Arrays
    """What the method keeps beside them."""
    asked: int = 0
    new: list[np.ndarray] = field(default_factory=list)
    again: bool = False
    """Whether all answers are of this round."""

    @property
    def card(self) -> TeacherCard:
        """The card of the teacher."""
        return self.service.card

    def ask(self, images: np.ndarray) -> np.ndarray:
        """What a student learns from the teacher's answers to uint8 images [n c h w] (`training.learnable`)."""
        self.asked += len(images)
        assert self.asked <= self.batch.asked, "a round asks more than it planned"
        return learnable(self.service.query(images), self.card.access, self.lesson.cfg.answers)

    def keep(self, images: np.ndarray, answers: np.ndarray) -> None:
        """Store images that were asked about, with their answers."""
        self.new.append(images)
        self.images = np.concatenate([self.images, images])
        self.answers = np.concatenate([self.answers, answers]) if len(self.answers) else answers

    def renew(self, answers: np.ndarray) -> None:
        """Replace the answers to all images, which were asked about again."""
        self.answers, self.again = answers, True

    def counts(self) -> torch.Tensor:
        """How many images the teacher gave to each class: float32 [q]."""
        found = np.bincount(labels_of(self.answers), minlength=len(self.card.classes)) if len(self.answers) else 0
        return torch.zeros(len(self.card.classes)) + torch.tensor(found)


Work = Callable[[Any, Study], Metrics]
"""What a method does in a round for one teacher: (settings, study) -> figures of the round."""


def init(cfg: StudentConfig, world: World) -> State:
    """A fresh student of each teacher. Raises UsageError for a teacher whose images the method cannot make."""
    for card in world.cards:
        try:
            cfg.check_shape(card.image.shape)
        except ValueError as error:
            raise UsageError(f"{card.id}: {error}; leave the teacher out, or use another method") from None
    return {"students": {card.id: fresh(cfg, world, card) for card in world.cards}}


def fresh(cfg: StudentConfig, world: World, card: TeacherCard) -> State:
    """A student before its first round, drawn from the run's seed."""
    pupil = Pupil.fresh(network(cfg, card), seeds.rng(world.seed, "student", card.id))
    images = np.zeros((0, *card.image.shape), np.uint8)
    answers = np.zeros(0, np.int64)
    return {"pupil": pupil.values(), "images": images, "answers": answers, "asked": 0, "rounds": 0, "own": {}}


def plan(cfg: StudentConfig, world: World, state: State, r: int) -> list[Job]:
    """One job for each teacher that has rounds to come, with its student, and the images and answers that are known.

    Each teacher has rounds of its own: one that was away in a round of the run does it in the next one. So a student
    does not depend on when its teacher was away, and the rounds of a run are more by those that a teacher missed.
    """
    batches, jobs = cfg.batches(), []
    for j, card in enumerate(world.cards):
        known, of = state["students"][card.id], network(cfg, card)
        own = known["rounds"]
        if own == len(batches):
            continue
        values = {name: known[name] for name in ("pupil", "images", "answers", "own")}
        values |= {"r": own, "last": own == len(batches) - 1, "batch": list(batches[own])}
        seed = seeds.derive(world.seed, own, "recover", card.id)
        memory = 4 * 6 * of.layout.numel + known["images"].nbytes
        jobs.append(Job(index=j, seed=seed, teacher=card.id, values=values, cost=float(of.macs), memory=memory))
    return jobs


def shared(cfg: StudentConfig, world: World, state: State, r: int) -> Arrays:
    """The settings."""
    return {"cfg": cfg.model_dump()}


def recover(shard: Shard, jobs: Sequence[Job], cfg: C, work: Callable[[C, Study], Metrics]) -> list[Arrays]:
    """The op: `work` on each job, one after another.

    A result holds the student, the new images, the answers of the last images (of all of them if all were asked again),
    `asked`, `own` and the figures. It is `{"rejected": reason}` if the teacher cannot be read, or if the student's
    weights are not finite.
    """
    return [_one(shard, job, cfg, work) for job in jobs]


def _one(shard: Shard, job: Job, cfg: C, work: Callable[[C, Study], Metrics]) -> Arrays:
    try:
        service = shard.service(str(job.teacher))
    except RejectedError as error:
        return rejection(error)
    values, card = job.values, service.card
    lesson = Lesson(cfg, network(cfg, card), card.image, Pupil.of(values["pupil"], shard.device))
    study = Study(
        service=service, lesson=lesson, rng=torch.Generator().manual_seed(job.seed), device=shard.device,
        r=values["r"], last=values["last"], batch=Batch(*values["batch"]), images=np.asarray(values["images"]),
        answers=np.asarray(values["answers"]), own=dict(values["own"]),
    )  # fmt: skip
    figures = work(cfg, study)
    if not lesson.pupil.finite:
        return {"rejected": f"the student's weights are not finite; lower method.lr ({cfg.lr:g})"}
    return {
        "teacher": card.id,
        "pupil": lesson.pupil.values(),
        "images": np.concatenate([study.images[:0], *study.new]),
        "answers": study.answers[0 if study.again else len(np.asarray(values["answers"])) :],
        "asked": study.asked,
        "own": study.own,
        "figures": figures,
    }


def learn(
    cfg: StudentConfig, world: World, state: State, r: int, results: list[Arrays], send: Send
) -> tuple[State, Metrics]:
    """Store what the shards send back. The metrics are means over the teachers of the round."""
    students = dict(state["students"])
    for result in results:
        known = students[result["teacher"]]
        images = np.concatenate([known["images"], result["images"]])
        kept = known["answers"][: len(images) - len(result["answers"])]
        students[result["teacher"]] = {
            "pupil": result["pupil"],
            "images": images,
            "answers": np.concatenate([kept, result["answers"]]) if len(kept) else result["answers"],
            "asked": known["asked"] + result["asked"],
            "rounds": known["rounds"] + 1,
            "own": result["own"],
        }
    alive = [students[card.id] for card in world.cards]
    metrics: Metrics = {"queries": sum(one["asked"] for one in alive) / len(alive)} if alive else {}
    for name in results[0]["figures"] if results else ():
        found = [result["figures"][name] for result in results if result["figures"][name] is not None]
        metrics[name] = sum(found) / len(found) if found else None
    return {**state, "students": students}, metrics


def queries(cfg: StudentConfig, world: World) -> dict[str, int]:
    """Id of each teacher -> how many images a whole training asks it about."""
    return {card.id: cfg.asked(cfg.total_rounds) for card in world.cards}


def students(cfg: StudentConfig, world: World, state: Mapping[str, Any]) -> dict[str, Student]:
    """Id of each teacher -> its student, with the mean of its weights."""
    return {card.id: _student(cfg, card, state["students"][card.id]) for card in world.cards}


def _student(cfg: StudentConfig, card: TeacherCard, known: Mapping[str, Any]) -> Student:
    theta, stats = (torch.tensor(np.asarray(known["pupil"][name])) for name in ("mean_theta", "mean_stats"))
    weights = LearnerWeights(
        arch=architecture(cfg, card), image=card.image, outputs=len(card.classes), theta=theta, stats=stats,
        head="maml", steps=0, lr=cfg.lr,
    )  # fmt: skip
    return Student(weights, known["asked"])
