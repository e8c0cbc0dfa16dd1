"""Settings of BiDf-MKD, its profiles and its presets."""

from pydantic import BaseModel, ConfigDict, Field

from ray_dfml.methods.bank import BankKey
from ray_dfml.methods.base import Preset, ReplayConfig, Values
from ray_dfml.methods.characters import REPLAY, STEP
from ray_dfml.methods.sourced import RecoveryConfig


class ZeroOrderConfig(BaseModel):
    """Settings of gradients from answers alone, for teachers that are only asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directions: int = Field(default=20, ge=1, description="q: random directions per image and pass; the code: 100.")
    mu: float | None = Field(
        default=None,
        gt=0,
        description="Length of a displacement, pixels in [0, 1]; by default sqrt(d)/255, the least that 8 bits carry.",
    )
    central: bool = Field(default=False, description="Central differences, which cost twice as many queries.")
    eight_bit: bool = Field(default=False, description="Ask about images of 8 bits, for services that round to them.")


class Config(RecoveryConfig):
    """BiDf-MKD's hyper-parameters. The defaults are the `fixed` profile; docs/methods.md has all three side by side."""

    rounds: int = Field(default=300, ge=1, description="Outer iterations. Teachers are inverted once in each.")
    teachers_per_round: int = Field(
        default=4, ge=1, description="Teachers inverted in a round, drawn with replacement; the paper takes one."
    )
    images_per_class: int = Field(default=30, ge=2, description="Images recovered per class, support and query alike.")
    iterations: int = Field(default=200, ge=1, description="Passes of an inversion; there is one Adam step fewer.")
    lr_generator: float = Field(default=1e-3, gt=0, description="Adam step size of theta_G and Z.")
    conditional: bool = Field(
        default=True, description="Whether the generator is told the label (the paper); the released one is not."
    )
    boundary: bool = Field(default=True, description="Whether the query set is recovered against the task model.")
    boundary_after: int = Field(
        default=0, ge=0, description="Meta-updates before the query set is drawn to the boundary; the code: 4000."
    )
    distill: str = Field(
        default="kl", pattern="^(kl|probdot)$", description="Distillation loss: KL, or the released code's form."
    )
    inner_steps: int = Field(default=10, ge=0, description="SGD steps of the inner distillation.")
    inner_lr: float = Field(default=0.01, gt=0, description="SGD step size of the inner distillation.")
    generate_every: int = Field(
        default=20,
        ge=0,
        description="Meta-updates in a round; with 0, until `replay.patience` of them bring no new best (code).",
    )
    relabel: bool = Field(
        default=True,
        description="Whether images of services enter the bank under the class of the answer, not the wished one.",
    )
    zero_order: ZeroOrderConfig = Field(
        default=ZeroOrderConfig(), description="How the gradients of services are estimated."
    )
    bank_capacity: int = Field(default=600, ge=1, description="Images kept per class, first in first out.")
    bank_key: BankKey = Field(
        default="class",
        description="A bank class is a class name (side information of the cards), or a (teacher, class) pair.",
    )
    replay: ReplayConfig = ReplayConfig(tasks=4, patience=200, max_updates=1000)

    def told(self, way: int) -> int:
        """The number of classes that the generator is told a label of; 0 if it is told none."""
        return way if self.conditional else 0


PROFILES: dict[str, Values] = {
    "paper": {
        "method": {
            "teachers_per_round": 1,
            "kl_clamp": 1e9,
            "crop_pad": 0,
            "flip": "off",
            "relabel": False,
            "zero_order": {"directions": 100, "mu": 0.005},
            "replay": {"mix_data": True},
        }
    },
    "code": {
        "method": {
            "teachers_per_round": 1,
            "conditional": False,
            "adversarial_form": "probdot",
            "crop_fill": "zero",
            "flip": "on",
            "boundary_after": 4000,
            "distill": "probdot",
            "generate_every": 0,
            "relabel": False,
            "zero_order": {"directions": 100, "mu": 0.005},
            "replay": {"reduction": "sum", "max_updates": 60_000, "mix_data": True},
        }
    },
}

PRESETS: dict[str, Preset] = {
    "characters-bidf": Preset(
        "28x28 characters on a small machine: narrow generator that is not told the label, short inversions",
        {
            "method": {
                "teachers_per_round": 4,
                "conditional": False,
                "iterations": 8,
                "images_per_class": 16,
                "width": 16,
                "lr_generator": 3e-2,
                "crop_pad": 2,
                "bn_weight": 1.0,
                "replay": {**REPLAY, "lr": 3e-3},
            },
            "eval": STEP,
        },
    ),
    "no-boundary": Preset("the query set is recovered as the support set is", {"method": {"boundary": False}}),
}
