"""`evaluate` for students: their top-1 accuracy on real images, and that of untrained students on the same ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_dfml import top1
from ray_dfml.core import seeds
from ray_dfml.data import datasets
from ray_dfml.methods import UNTRAINED, cost
from ray_dfml.methods.students.training import Pupil
from ray_dfml.runtime import cost_lines
from ray_dfml.runtime.inputs import fitted, resizing
from ray_dfml.runtime.local import LocalBackend, no_teachers
from ray_dfml.runtime.progress import Progress
from ray_dfml.scores import as_row
from ray_dfml.student import Student
from ray_dfml.types import Backend, ImageSpec, Labelled, LearnerWeights, Score, TeacherCard

TIMED = 100
"""How many images are timed before a test."""


def student_test(
    students: Sequence[Student], backend: Backend, progress: Progress, *, spec: str, split: str, shards: int
) -> list[dict[str, Any]]:
    """Rows as in `scores.json`, in the order of the students, and then those of untrained students.

    Raises UsageError if no student knows a class of the data, or if their channels do not fit a student.
    """
    whole = datasets.load(spec)
    part = whole.subset(split)
    names = tuple(f"{whole.name}/{name}" for name in part.class_names)
    for note in [f"--data {spec}: {note}" for note in part.notes]:
        progress.note(note)
    for note in top1.check_known([card_of(one) for one in students], [_labelled(whole, part, names, part.images)]):
        progress.note(note)
    held: dict[tuple[int, int, int], Labelled] = {}
    for shape in {one.image.shape: None for one in students}:
        if shape != part.shape:
            progress.note(resizing(spec, part.shape, shape))
        images = fitted(part.images, shape, f"--data {spec}")
        held[shape] = _labelled(whole, part, names, backend.keep(images))
    found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    counts = [len(top1.rows_known(held[one.image.shape], one.classes)[0]) for one in students]
    total = 2 * sum(counts)
    if not progress.quiet:
        progress.note(cost_lines.of_evaluation(
            lambda: 2 * sum(n * _seconds(one) for n, one in zip(counts, students, strict=True)), shards
        ))  # fmt: skip
    try:
        with progress.stage("evaluation", total):
            for one in students:
                for fresh in found:
                    weights = untrained(one) if fresh else one.weights
                    right = _right(backend, progress, weights, one.classes, held[one.image.shape], shards)
                    if right is None:
                        continue
                    name = UNTRAINED if fresh else one.card.method
                    score = Score(
                        method=name if len(students) == 1 else f"{name}:{one.card.teacher}", data=whole.identity,
                        split=split, way=None, shot=None, bn="running", selection="last", accuracies=100.0 * right,
                    )  # fmt: skip
                    found[fresh].append(as_row(score, "fixed" if fresh else one.card.profile))
    finally:
        progress.stop()
    return found[False] + found[True]


def _seconds(student: Student) -> float:
    """Seconds of one image of a student."""
    rows = np.arange(TIMED)
    jobs = top1.jobs(rows, np.zeros(len(rows), np.int64))
    shared = top1.shared(student.weights, np.zeros((len(rows), *student.image.shape), np.uint8))
    return cost.seconds(lambda: LocalBackend(no_teachers).map("top1", jobs, shared)) / len(rows)


def card_of(student: Student) -> TeacherCard:
    """What is known of a student's teacher: its classes and its input."""
    return TeacherCard(
        id=student.card.teacher, arch=student.card.arch, image=student.image, classes=student.classes, access="label"
    )


def untrained(student: Student) -> LearnerWeights:
    """The weights that the student began with in its run."""
    of = student.weights
    pupil = Pupil.fresh(of.net, seeds.rng(student.card.seed, "student", student.card.teacher))
    return LearnerWeights(
        arch=of.arch, image=ImageSpec.of(of.image.values()), outputs=of.outputs, theta=pupil.theta, stats=pupil.stats,
        head=of.head, steps=of.steps, lr=of.lr,
    )  # fmt: skip


def _labelled(whole: datasets.ImageSet, part: datasets.ImageSet, names: tuple[str, ...], images: Any) -> Labelled:
    return Labelled(whole.identity, "", images, part.labels, names)


def _right(
    backend: Backend, progress: Progress, weights: LearnerWeights, classes: Sequence[str], of: Labelled, shards: int
) -> np.ndarray | None:
    """Whether the weights are right about each image whose class they know: bool [n]. None if they know no class."""
    rows, wanted = top1.rows_known(of, classes)
    jobs, shared, found = top1.jobs(rows, wanted), top1.shared(weights, of.images), []
    for start in range(0, len(jobs), shards):
        now = jobs[start : start + shards]
        found += [result["right"] for result in backend.map("top1", now, shared)]
        progress.advance(sum(len(job.values["rows"]) for job in now))
    return np.concatenate(found) if found else None
