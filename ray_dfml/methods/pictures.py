"""What methods give to the gallery of a run: images of a class, and what the teacher said of them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ray_dfml.methods.base import MethodConfig, Seen, World
from ray_dfml.methods.students.training import labels_of
from ray_dfml.types import Access, Arrays, TeacherCard

SHOWN = 4
"""How many images of a class are shown: the first ones."""

OTHER = "another class"
"""What a teacher said that named none of the classes of a task."""


def seen(cfg: MethodConfig, world: World, results: Sequence[Arrays]) -> list[Seen]:
    """What the results of a recover op show, class after class; `Method.pictures` of most methods.

    A result is a recovered task (`inversion.Inversion.task`), a pair of tasks of which the `support` is shown, or what
    a teacher was asked about (`students.loop.recover`). A task whose `kind` is `asked` has images of sources. What a
    teacher said of a recovered image is its best class of the task, and how probable that is among these classes.
    """
    cards = {card.id: card for card in world.cards}
    found: list[Seen] = []
    for result in results:
        if "answers" in result:
            found += _of_answers(cards[result["teacher"]], result)
        else:
            task = result.get("support", result)
            found += _of_task(cards[task["teacher"]].access, task)
    return found


def _of_task(access: Access, task: Arrays) -> Iterator[Seen]:
    told = task.get("told", np.ones(len(task["labels"]), bool))
    for local, name in enumerate(task["classes"]):
        rows = np.flatnonzero(task["labels"] == local)[:SHOWN]
        if len(rows):
            said, confidence = _read(task["logits"][rows], task["classes"])
            unsure = ~told[rows] if access != "label" else np.ones(len(rows), bool)
            yield Seen(
                kind=task.get("kind", "recovered"), teacher=task["teacher"], name=name, images=task["images"][rows],
                said=tuple(OTHER if not known else one for known, one in zip(told[rows], said, strict=True)),
                confidence=tuple(np.where(unsure, np.nan, confidence).tolist()),
            )  # fmt: skip


def _read(logits: np.ndarray, classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The best class of each row of logits [n q], and its probability in percent [n]."""
    best = torch.tensor(logits).softmax(-1).max(-1)
    return [classes[int(unit)] for unit in best.indices.tolist()], 100.0 * best.values.numpy()


def _of_answers(card: TeacherCard, result: Arrays) -> Iterator[Seen]:
    """The new images that a teacher was asked about, by the class that it said."""
    images, answers = result["images"], result["answers"]
    answers = answers[len(answers) - len(images) :]
    labels = labels_of(answers)
    for label in np.unique(labels).tolist():
        rows, name = np.flatnonzero(labels == label)[:SHOWN], card.classes[label]
        sure = 100.0 * answers[rows].max(-1) if answers.ndim == 2 else np.full(len(rows), np.nan)
        yield Seen(
            kind="asked", teacher=card.id, name=name, images=images[rows], said=(name,) * len(rows),
            confidence=tuple(sure.tolist()),
        )  # fmt: skip
