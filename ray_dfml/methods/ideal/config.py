"""Settings of IDEAL, its profiles and its presets."""

from typing import Literal

from pydantic import Field, field_validator

from ray_dfml.core.sources import SOURCES
from ray_dfml.errors import did_you_mean
from ray_dfml.methods.base import Values
from ray_dfml.methods.students.config import Batch, StudentConfig

GENERATOR = "generator"
"""The source of IDEAL itself: a generator that is trained on the student."""

NAMES = (GENERATOR, *SOURCES)
"""What `images` may name."""


class GeneratorConfig(StudentConfig):
    """Settings of the generator that is trained on the student ([Zhang2023] section 3.2, stage 1)."""

    generator: Literal["standard"] = Field(default="standard", description="Architecture of the generator.")
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


class Config(GeneratorConfig):
    """IDEAL's hyper-parameters. The defaults are the `fixed` profile; docs/methods_ideal.md has all three."""

    images: tuple[str, ...] = Field(
        default=("dip", "dipw", "dipc", "mutants"),
        min_length=1,
        description="Sources of the images that are asked about, in equal parts but for mutants.",
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
        known = left = 0
        left = self.budget
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


PROFILES: dict[str, Values] = {
    "paper": {
        "method": {
            "images": ("generator",),
            "first": 250,
            "growth": 0.0,
            "candidates": 1.0,
            "generator_steps": 5,
            "training": "batch",
            "optimiser": "sgd",
            "lr": 0.01,
            "last_steps": 0,
            "warmup_steps": 0,
            "average": 0.0,
            "balance": 0.0,
            "warp": 0.0,
            "flip": "off",
        }
    },
    "code": {
        "method": {
            "budget": 1_262_500,
            "images": ("generator",),
            "first": 250,
            "growth": 0.0,
            "generate_rounds": 400,
            "requery": True,
            "candidates": 1.0,
            "generator_steps": 30,
            "information": "sample",
            "code": "fixed",
            "training": "pass",
            "student_batch": 250,
            "optimiser": "sgd",
            "lr": 0.01,
            "weight_decay": 5e-4,
            "last_steps": 0,
            "warmup_steps": 0,
            "average": 0.0,
            "balance": 0.0,
            "warp": 0.0,
            "crop_pad": 4,
            "flip": "on",
        }
    },
}
