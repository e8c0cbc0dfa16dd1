"""Settings that all methods have that distil each teacher of a pool into a student, and the plan of their queries."""

from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, field_validator, model_validator

from ray_dfml.core.backbones import BACKBONES, known_arch
from ray_dfml.core.generators import Kind, generator
from ray_dfml.core.sources import SOURCES
from ray_dfml.errors import did_you_mean
from ray_dfml.methods.base import MethodConfig
from ray_dfml.types import TeacherCard

FALLBACK = "lenet"
"""Architecture of the student of a teacher whose own is not known."""

GENERATOR = "generator"
"""The source of IDEAL itself: a generator that is trained on the student."""

NAMES = (GENERATOR, *SOURCES)
"""What `images` may name."""


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

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError for a shape [c h w] of which the method can make no images."""

    def _bounded(self, batches: list[Batch]) -> list[Batch]:
        return batches[: self.rounds] if self.rounds else batches


class TrainingConfig(StudentConfig):
    """Settings of a student that trains on all answers so far. The defaults are the recommended way."""

    student_batch: int = Field(default=64, ge=2, description="Images of a step of the student.")
    last_steps: int = Field(default=800, ge=0, description="Steps after the last batch, with cosine decay to 0.")
    warmup_steps: int = Field(default=50, ge=0, description="First steps, in which the step size grows linearly.")
    average: float = Field(default=0.995, ge=0, lt=1, description="Decay of the mean of the student's weights.")
    balance: float = Field(
        default=0.5, ge=0, description="Images are drawn as (images of their class) to the power of minus this."
    )
    warp: float = Field(
        default=1.0, ge=0, description="Strength of the warps of the student's training images; 0 warps nothing."
    )
    crop_pad: int = Field(default=0, ge=0, description="Padding of random crops, pixels; 0 crops nothing.")
    flip: Literal["auto", "on", "off"] = Field(
        default="auto", description="Random mirror; auto mirrors colour images only, as a mirrored digit is another."
    )


class ReplayConfig(TrainingConfig):
    """Settings of a method of its own images, whose student learns again from answers that were paid for."""

    replays: float = Field(
        default=12.0,
        ge=0,
        description="Images that the student trains on after a round for each one that was asked about, drawn from all "
        "answers so far; 0 keeps none, and trains as the paper does.",
    )


class GeneratorConfig(StudentConfig):
    """Settings of the generator that is trained on the student ([Zhang2023] section 3.2, stage 1)."""

    generator: Kind = Field(default="standard", description="Architecture of the generator.")
    latent: int = Field(default=256, ge=1, description="d_z: length of a latent code.")
    width: int = Field(default=64, ge=4, description="Channels of the generator's last hidden layer.")
    generator_steps: int = Field(default=10, ge=0, description="E_G: Adam steps of the generator in a round.")
    generator_lr: float = Field(default=1e-3, gt=0, description="Adam step size of the generator.")
    reset: bool = Field(default=True, description="Whether each round begins with a fresh generator.")
    ce: float = Field(default=1.0, ge=0, description="Weight of the student's cross-entropy on the wished labels.")
    lam: float = Field(default=5.0, ge=0, description="lambda: weight of the information term; 0 leaves it out.")
    information: Literal["batch", "sample"] = Field(
        default="batch",
        description="The term is of the batch's mean probabilities, or the mean of that of each image (code).",
    )
    code: Literal["fresh", "fixed"] = Field(
        default="fresh",
        description="Whether each step draws codes and labels anew, or one draw serves the round, of which the images "
        "with the lowest loss are asked about (code).",
    )

    @model_validator(mode="after")
    def _even_width(self) -> "GeneratorConfig":
        if self.generator == "transformer" and self.width % 2:
            raise ValueError("method.generator=transformer needs an even method.width; raise or lower it by 1")
        return self


class DistilConfig(GeneratorConfig, TrainingConfig):
    """Settings of what is asked about and of the training on all answers. The defaults are the recommended way."""

    images: tuple[str, ...] = Field(
        default=("dip", "dipw", "dipc", "mutants"),
        min_length=1,
        description="Sources of the images that are asked about, in equal parts but for mutants.",
    )
    invert: bool = Field(
        default=False, description="Whether dark and light of the sources change places; not those of `generator`."
    )
    mutants: float = Field(
        default=0.25, gt=0, lt=1, description="Share of mutants after the first round, if `images` names them."
    )
    first: int = Field(default=500, ge=2, description="Images of the first round, which are not selected.")
    growth: float = Field(
        default=0.5, ge=0, description="A round asks about at least this multiple of the images known, or `batch`."
    )
    generate_rounds: int = Field(default=0, ge=0, description="Rounds that make new images; 0 is all of them.")
    requery: bool = Field(
        default=False, description="Whether each round asks again about all images, in a new view (code)."
    )
    candidates: float = Field(default=3.0, ge=1, description="Images made for each one that is asked about.")
    margin: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of candidates that are chosen by the student's doubt, not at random.",
    )
    quota: float = Field(
        default=0.3, ge=0, le=1, description="What a class gets at least, as a multiple of its even share."
    )
    training: Literal["root", "pass", "batch"] = Field(
        default="root",
        description="Steps after each batch: `steps` times the root of the images known, a pass over all of them, or "
        "one step on the new ones.",
    )
    steps: float = Field(default=4.0, ge=0, description="Steps of the student per root of the images known.")

    @field_validator("images")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in NAMES:
                raise ValueError(f"unknown source {name!r}{did_you_mean(name, NAMES)}; known: {', '.join(NAMES)}")
        if not any(name == GENERATOR or not SOURCES[name].parents for name in names):
            raise ValueError("mutants are copies of earlier images; name a source beside them")
        return tuple(dict.fromkeys(names))

    def batches(self) -> list[Batch]:
        """The first round asks about `first` images, each later one about more, as `growth` says.

        With `requery` a round asks about all images so far, and the last round is the last that the budget pays for.
        Without, the last batch is cut at the budget.
        """
        found: list[Batch] = []
        known, left = 0, self.budget
        while True:
            new = max(self.batch, int(self.growth * known)) if known else max(self.first, self.batch)
            if self.generate_rounds and len(found) >= self.generate_rounds:
                new = 0
            elif not self.requery:
                new = min(new, left)
            asked = known + new if self.requery else new
            if asked > left or asked < 2 or (self.rounds and len(found) == self.rounds):
                return found
            found.append(Batch(new, asked))
            known, left = known + new, left - asked

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError for a shape [c h w] that the generator cannot make, if it is among the sources."""
        if GENERATOR in self.images:
            generator(shape, self.latent, self.width, kind=self.generator)


def architecture(cfg: StudentConfig, card: TeacherCard) -> str:
    """The architecture of a teacher's student."""
    if cfg.student != "teacher":
        return cfg.student
    return card.arch if card.arch in BACKBONES else FALLBACK
