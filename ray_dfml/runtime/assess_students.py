"""The driver's side of validation and test for methods that distil: students are exported, and scored by top-1."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ray_dfml import examples, student, top1
from ray_dfml.config import RunConfig
from ray_dfml.data import weights_file
from ray_dfml.methods import UNTRAINED
from ray_dfml.runtime.inputs import Inputs
from ray_dfml.runtime.progress import Progress
from ray_dfml.scorer import Step
from ray_dfml.types import Labelled, Score, TeacherCard

STUDENTS = 3
"""Of how many students examples are shown."""
LOOKED = 2000
"""About how many images a student is asked again, to see which classes it confuses; they are spread over the data."""

Call = Callable[..., Any]
"""(name of a method of `Trainer`, *arguments) -> its result, wherever the trainer is."""


class StudentAssessment:
    """Validates, exports and tests the students of a run. The last weights are kept: nothing is selected.

    A student is scored on each data set of which its teacher knows a class, and the untrained student beside it. After
    a learner has died, the new one is asked only for what is not known yet.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, call: Call, progress: Progress, *, shards: int) -> None:
        self._config, self._call, self._progress = config, call, progress
        self._cards = {card.id: card for card in inputs.world.cards}
        self._sets = inputs.sets
        self._at_once = shards * top1.IMAGES_PER_JOB
        self._tested: dict[tuple[str, bool, str], np.ndarray] = {}

    def validate(self, r: int) -> float | None:
        """The mean top-1 accuracy in percent of all students on the validation images; None if the run has no data."""
        asked = list(self._pairs("val"))
        if not asked:
            return None
        with self._progress.stage("validation", sum(self._size(card, of) for card, of in asked)):
            return float(np.mean([100.0 * self._right(card, of, fresh=False).mean() for card, of in asked]))

    def finish(self, folder: Path) -> tuple[list[Score], list[Step]]:
        """Export the students, then test them and untrained ones. Returns the scores; there are no step sizes.

        Raises RejectedError for weights that are not finite.
        """
        config, queries = self._config, self._call("students")
        for id, asked in queries.items():
            student.export(
                student.file_of(folder, id, list(self._cards)), self._call("student", id), method=config.name,
                teacher=id, classes=self._cards[id].classes, queries=asked, profile=config.profile, seed=config.seed,
            )  # fmt: skip
        asked = [pair for pair in self._pairs("test") if pair[0].id in queries]
        with self._progress.stage("test", 2 * sum(self._size(card, of) for card, of in asked)):
            scores = [self._score(card, of, fresh=fresh) for fresh in (False, True) for card, of in asked]
            if asked:
                shown = [self._example(card, of) for card, of in asked[:STUDENTS]]
                weights_file.write_bytes(folder / examples.FILE, examples.to_file(shown))
            return scores, []

    def _example(self, card: TeacherCard, of: Labelled) -> examples.Example:
        rows, wanted = top1.rows_known(of, card.classes)
        places = np.unique(np.linspace(0, len(rows) - 1, min(LOOKED, len(rows))).round().astype(int))
        said = self._call("said", card.id, of.data, of.split, places)
        return examples.of_student(of, card.id, card.classes, rows[places], wanted[places], said)

    def _pairs(self, split: str) -> Iterator[tuple[TeacherCard, Labelled]]:
        """Each teacher with each data set of the split of which it knows a class, in images of its student's size."""
        usable = self._call("students")
        for card in self._cards.values():
            for of in self._sets:
                fits = of.split == split and of.shape == card.image.shape
                if card.id in usable and fits and self._size(card, of):
                    yield card, of

    def _size(self, card: TeacherCard, of: Labelled) -> int:
        return len(top1.rows_known(of, card.classes)[0])

    def _score(self, card: TeacherCard, of: Labelled, *, fresh: bool) -> Score:
        key = (card.id, fresh, of.data)
        if key not in self._tested:
            self._tested[key] = self._right(card, of, fresh=fresh)
        name = UNTRAINED if fresh else self._config.name
        return Score(
            method=name if len(self._cards) == 1 else f"{name}:{card.id}", data=of.data, split=of.split, way=None,
            shot=None, bn="running", selection="last", accuracies=100.0 * self._tested[key],
        )  # fmt: skip

    def _right(self, card: TeacherCard, of: Labelled, *, fresh: bool) -> np.ndarray:
        """Whether a student is right about each image whose class it knows: bool [n]."""
        found, size = [], self._size(card, of)
        for start in range(0, size, self._at_once):
            stop = min(start + self._at_once, size)
            found.append(self._call("top1", card.id, fresh, of.data, of.split, start, stop))
            self._progress.advance(stop - start)
        return np.concatenate(found)
