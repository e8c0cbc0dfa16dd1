"""Settings of `shared-answers`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ray_dfml.errors import check_sources
from ray_dfml.methods.base import MethodConfig, Preset
from ray_dfml.methods.shared_answers.images import KNOWN, ZOOMED


class InversionConfig(BaseModel):
    """How teachers that give their weights are inverted, once each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images_per_class: int = Field(default=0, ge=0, description="Images of a class of a teacher; 0 inverts none.")
    steps: int = Field(default=60, ge=1, description="Adam steps on the pixels.")
    lr: float = Field(default=0.1, gt=0, description="Adam step size, of the logits of the pixels.")
    bn_weight: float = Field(default=1.0, ge=0, description="Weight of the teacher's batch-norm statistics.")
    tv_weight: float = Field(default=0.3, ge=0, description="Weight of the total variation.")
    crop_pad: int = Field(default=2, ge=0, description="Padding of the random crop that a teacher sees, pixels.")


class Config(MethodConfig):
    """What is asked and what is learned of it.

    A round is one batch of images, the same for all teachers, and after these a part of the learner's training.
    """

    rounds: int = Field(default=0, ge=0, description="Most rounds that ask; 0 makes as many as the budget pays for.")
    budget: int = Field(
        default=10_000, ge=1, description="Images of the sources that each teacher is asked about in all."
    )
    batch: int = Field(default=1_000, ge=1, description="Images of the sources in a round.")
    images: tuple[str, ...] = Field(
        default=("dip", "dipw", "dipc", "shapes"), min_length=1, description=f"Image sources: {', '.join(KNOWN)}."
    )
    shares: tuple[float, ...] = Field(
        default=(), description="How many images each source makes, relative to the others; empty is equal parts."
    )
    zoom_low: float = Field(default=1.0, gt=0, description=f"Smallest magnification of {' and '.join(ZOOMED)}.")
    zoom_high: float = Field(default=1.0, gt=0, description=f"Largest magnification of {' and '.join(ZOOMED)}.")
    invert: bool = Field(default=False, description="Whether dark and light of the sources change places.")
    inversion: InversionConfig = Field(
        default=InversionConfig(),
        description="Images that teachers with weights are inverted to. All teachers are asked about them, too.",
    )
    answers: Literal["soft", "hard"] = Field(
        default="soft", description="What is learned of an answer: probabilities if they are given, or its best class."
    )
    steps: int = Field(default=900, ge=1, description="Adam steps of the learner after the last answers.")
    fits: int = Field(
        default=5,
        ge=1,
        description="Rounds that these steps are spread over, each with a checkpoint. It changes no bit.",
    )
    minibatch: int = Field(default=128, ge=2, description="Images of a step.")
    lr: float = Field(default=3e-3, gt=0, description="Adam step size of the learner, before it decays.")
    layer_lr: float = Field(default=9e-3, gt=0, description="The same of the teachers' layers.")

    @field_validator("images")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_sources(names, KNOWN)
        return names

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.shares and (len(self.shares) != len(self.images) or min(self.shares) <= 0):
            raise ValueError(f"method.shares needs one number above 0 for each of the {len(self.images)} sources")
        if self.zoom_low > self.zoom_high:
            raise ValueError(f"method.zoom_low is {self.zoom_low:g}, above method.zoom_high, {self.zoom_high:g}")
        if self.fits > self.steps:
            raise ValueError(f"method.fits is {self.fits}, above method.steps, {self.steps}; lower it")
        return self

    @property
    def parts(self) -> dict[str, float]:
        """Name of a source -> how many images it makes, relative to the others."""
        return dict(zip(self.images, self.shares or [1.0] * len(self.images), strict=True))

    @property
    def batches(self) -> list[int]:
        """Images of each round that asks; the last batch is cut at the budget."""
        found = [min(self.batch, self.budget - start) for start in range(0, self.budget, self.batch)]
        return found[: self.rounds] if self.rounds else found

    @property
    def total_rounds(self) -> int:
        """Rounds that the budget pays for, at most `rounds` if that is set, and those of the training."""
        return len(self.batches) + self.fits

    def fitted(self, r: int) -> tuple[int, int]:
        """The first step of the learner in round `r`, and the first one after it. Both are 0 in a round that asks."""
        part = max(0, r - len(self.batches) + 1)
        return max(0, part - 1) * self.steps // self.fits, part * self.steps // self.fits


CHARACTERS: dict[str, Any] = {
    "images": ("strokes", "joined", "shapes", "dipw", "dip", "dipc"),
    "shares": (6.0, 3.0, 3.0, 3.0, 3.0, 2.0),
    "zoom_low": 1.16,
    "zoom_high": 2.12,
    "invert": True,
}

PRESETS: dict[str, Preset] = {
    "characters-shared-answers": Preset(
        "28x28 characters, dark on light: from the learner of no-pool-characters, with the ProtoNet head; the mix of "
        "sources was chosen on validation characters",
        {
            "method": CHARACTERS,
            "learner": {"start": "no-pool-characters", "head": "protonet"},
            "eval": {"every": 5},
        },
    ),
    "best-omniglot": Preset(
        "pools like 20 teachers of Omniglot that give their weights: characters-shared-answers, with teachers that are "
        "inverted once each",
        {
            "method": {
                **CHARACTERS,
                "budget": 4_000,
                "batch": 400,
                "steps": 2_000,
                "fits": 10,
                "inversion": {"images_per_class": 40},
            },
            "learner": {"start": "no-pool-characters", "head": "protonet"},
            "eval": {"every": 2},
        },
    ),
    "best-cifar-fs": Preset(
        "pools like 100 teachers of CIFAR-FS: from the learner of no-pool-colour, with the ProtoNet head; each teacher "
        "is inverted once, and all answer these images and others",
        {
            "method": {
                "budget": 4_000,
                "batch": 400,
                "steps": 3_000,
                "fits": 10,
                "inversion": {"images_per_class": 20},
            },
            "learner": {"start": "no-pool-colour", "head": "protonet"},
            "eval": {"every": 2},
        },
    ),
}
