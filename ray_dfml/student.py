"""The students that a run leaves behind, one for each teacher that it distilled, and how to use them.

    from ray_dfml import Student

    Student.load("runs/ideal").predict(x)  # uint8 [n c h w] -> ["mnist/7", ...]

The student of a pool of one is `learner.safetensors` with `learner.json`; of several teachers, each has these two files
under its id in the folder `students/`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ray_dfml import published
from ray_dfml.core.backbones import known_arch
from ray_dfml.data import weights_file
from ray_dfml.data.manifest import Input
from ray_dfml.errors import RejectedError, UsageError, first_of
from ray_dfml.files import located
from ray_dfml.learner import CHUNK, WEIGHTS, Finite, is_student, network_input, read_card
from ray_dfml.types import ImageSpec, LearnerWeights

FOLDER = "students"
"""Where a run folder has the students of several teachers."""


class StudentCard(BaseModel):
    """The JSON file of a student: what is needed to use its weights, and where they come from."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1] = 1
    kind: Literal["student"] = "student"
    method: str
    teacher: str
    """Id of the teacher."""
    queries: int = Field(ge=0)
    """How many images the method asked the teacher about."""
    arch: Annotated[str, AfterValidator(known_arch)]
    classes: list[str] = Field(min_length=2, max_length=100_000)
    """Class names in the order of the outputs, as the teacher's card has them."""
    input: Input
    mean: list[Finite]
    std: list[Annotated[Finite, Field(gt=0)]]
    selection: Literal["last"] = "last"
    profile: str
    seed: int

    @model_validator(mode="after")
    def _one_per_channel(self) -> "StudentCard":
        if not len(self.mean) == len(self.std) == self.input.channels:
            raise ValueError(f"mean and std need {self.input.channels} values, one per channel")
        return self

    @property
    def image(self) -> ImageSpec:
        """Size and normalisation of the images."""
        return ImageSpec(**self.input.model_dump(), mean=tuple(self.mean), std=tuple(self.std))


def file_of(folder: Path, teacher: str, teachers: Sequence[str]) -> Path:
    """Where a run folder has the weights of a teacher's student, `teachers` being those of the run."""
    return folder / WEIGHTS if len(teachers) == 1 else folder / FOLDER / f"{teacher}.safetensors"


def export(
    file: Path, weights: LearnerWeights, *, method: str, teacher: str, classes: Sequence[str], queries: int,
    profile: str, seed: int,
) -> None:  # fmt: skip
    """Write weights and statistics as named tensors to `file`, and the card beside it. Each is replaced in one step.

    Raises RejectedError for values that `Student.load` would refuse.
    """
    image = weights.image
    card = StudentCard(
        method=method, teacher=teacher, queries=queries, arch=weights.arch, classes=list(classes),
        input=Input(channels=image.channels, height=image.height, width=image.width),
        mean=[float(v) for v in image.mean], std=[float(v) for v in image.std], profile=profile, seed=seed,
    )  # fmt: skip
    layouts = weights_file.parts(weights.arch, image, weights.outputs)
    tensors: dict[str, Tensor] = {}
    for layout, flat in zip(layouts, (weights.theta, weights.stats), strict=True):
        tensors |= layout.unflatten(flat)
    weights_file.check_values(tensors)
    file.parent.mkdir(exist_ok=True)
    weights_file.write(file, tensors)
    text = json.dumps(card.model_dump(mode="json"), indent=2) + "\n"
    weights_file.write_bytes(file.with_suffix(".json"), text.encode())


class Student:
    """A classifier that was distilled from a teacher; it knows the teacher's classes.

    student = Student.load("runs/ideal")
    student.predict(x)        # the class name of each image
    student.predict_proba(x)  # [n q], columns in the order of student.classes

    Images must have the size `student.image`; they are not resized here.
    """

    card: StudentCard
    """Where the student comes from."""
    weights: LearnerWeights
    """The network and its weights."""

    def __init__(self, card: StudentCard, theta: Tensor, stats: Tensor) -> None:
        self.card = card
        self.weights = LearnerWeights(
            arch=card.arch, image=card.image, outputs=len(card.classes), theta=theta, stats=stats, head="maml", steps=0,
            lr=1.0,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, *, teacher: str | None = None) -> "Student":
        """Load the student of a run folder, or a `.safetensors` file with its `.json` beside it.

        A run that distilled several teachers has several students, and `teacher` names one. Raises UsageError if there
        is no such student, and RejectedError if it is damaged or does not fit its `.json`.
        """
        path = published.local(located(path))
        file = _chosen(path, teacher) if path.is_dir() else path
        if file.suffix != ".safetensors" or not file.exists():
            raise UsageError(f"{file}: no such student; name the folder of a finished run, or a .safetensors file")
        card = read_card(file.with_suffix(".json"), StudentCard)
        if teacher not in (None, card.teacher):
            raise UsageError(f"{file}: is the student of {card.teacher}, not of {teacher}")
        tensors = weights_file.read(file)
        try:
            layouts = weights_file.parts(card.arch, card.image, len(card.classes))
            tensors = weights_file.fit(tensors, card.arch, card.image, len(card.classes))
            weights_file.check_values(tensors)
        except RejectedError as error:
            raise RejectedError(f"{file}: {error}; export the student again") from None
        return cls(card, layouts.parameters.flatten(tensors), layouts.statistics.flatten(tensors))

    @property
    def image(self) -> ImageSpec:
        """Size and normalisation of the images that the student takes."""
        return self.weights.image

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the probabilities."""
        return tuple(self.card.classes)

    @torch.no_grad()
    def _logits(self, x: np.ndarray | Tensor) -> Tensor:
        of, images = self.weights, network_input(x, self.image)
        chunks = [of.net(of.theta, part, of.stats, first_order=True) for part in images.split(CHUNK) if len(part)]
        return torch.cat(chunks) if chunks else torch.zeros(0, of.outputs)

    def predict(self, x: np.ndarray | Tensor) -> list[str]:
        """The class name of each image: uint8 [n c h w] or [n h w c], or float in [0, 1] [n c h w]."""
        return [self.card.classes[i] for i in self._logits(x).argmax(-1).tolist()]

    def predict_proba(self, x: np.ndarray | Tensor) -> np.ndarray:
        """Probabilities [n q] in the order of `classes`; rows sum to 1. They are not calibrated."""
        return self._logits(x).double().softmax(-1).numpy()


def of_run(path: Path) -> list[Student]:
    """All students of a run folder or of one file; none if it holds a learner, or nothing."""
    if not path.is_dir():
        return [Student.load(path)] if is_student(path) else []
    if is_student(path / WEIGHTS):
        return [Student.load(path / WEIGHTS)]
    return [Student.load(file) for file in _several(path)]


def _several(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("*.safetensors"))


def _chosen(folder: Path, teacher: str | None) -> Path:
    """The file of a teacher's student in a run folder; of the only one if no teacher is named."""
    files = _several(folder)
    if not files:
        return folder / WEIGHTS
    if teacher is not None:
        return folder / FOLDER / f"{teacher}.safetensors"
    raise UsageError(f"{folder}: has {len(files)} students; name a teacher: {first_of([file.stem for file in files])}")
