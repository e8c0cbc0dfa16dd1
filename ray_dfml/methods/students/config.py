"""Settings that all methods have that distil each teacher of a pool into a student, and the plan of their queries."""

from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from ray_dfml.core.backbones import BACKBONES, known_arch
from ray_dfml.methods.base import MethodConfig
from ray_dfml.types import TeacherCard

FALLBACK = "lenet"
"""Architecture of the student of a teacher whose own is not known."""


class Batch(NamedTuple):
    """What a round asks: how many images are new, and how many are asked about, old ones in new views included."""

    new: int
    asked: int


class StudentConfig(MethodConfig):
    """Budget, student and training. A round is one batch of queries of each teacher, and the training after it."""

    rounds: int = Field(default=0, ge=0, description="Most rounds; 0 makes as many as the budget pays for.")
    budget: int = Field(default=25_000, ge=1, description="Images that each teacher is asked about in all.")
    batch: int = Field(default=250, ge=2, description="Fewest images that a round asks about.")
    student: Annotated[str, AfterValidator(lambda name: known_arch(name) if name != "teacher" else name)] = Field(
        default="teacher",
        description=f"Architecture of the students; `teacher` is the teacher's own, or {FALLBACK} if it is not known.",
    )
    answers: Literal["hard", "soft"] = Field(
        default="hard", description="What is learned of an answer: its best class, or probabilities if they are given."
    )
    optimiser: Literal["adam", "sgd"] = Field(default="adam", description="Optimiser of the student.")
    lr: float = Field(default=4e-3, gt=0, description="Step size of the student.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of SGD.")
    student_batch: int = Field(default=64, ge=2, description="Images of a step of the student.")

    @model_validator(mode="after")
    def _pays_for_a_batch(self) -> "StudentConfig":
        if self.budget < self.batch:
            raise ValueError(f"method.budget is below one batch of {self.batch} images; raise it or lower method.batch")
        return self

    def batches(self) -> list[Batch]:
        """The batches of all rounds, whose queries never exceed the budget."""
        whole, rest = divmod(self.budget, self.batch)
        return self._bounded([Batch(self.batch, self.batch)] * whole + [Batch(rest, rest)] * (rest > 1))

    @property
    def total_rounds(self) -> int:
        """Rounds that the budget pays for, at most `rounds` if that is set."""
        return len(self.batches())

    def asked(self, r: int) -> int:
        """Images that a teacher has been asked about after `r` rounds."""
        return [0, *accumulate(batch.asked for batch in self.batches())][r]

    def _bounded(self, batches: list[Batch]) -> list[Batch]:
        return batches[: self.rounds] if self.rounds else batches


def architecture(cfg: StudentConfig, card: TeacherCard) -> str:
    """The architecture of a teacher's student."""
    if cfg.student != "teacher":
        return cfg.student
    return card.arch if card.arch in BACKBONES else FALLBACK
