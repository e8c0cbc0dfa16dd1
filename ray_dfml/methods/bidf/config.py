"""Settings of BiDf-MKD."""

from pydantic import Field

from ray_dfml.methods.bank import BankKey
from ray_dfml.methods.base import ReplayConfig
from ray_dfml.methods.inversion import InversionConfig


class Config(InversionConfig):
    """BiDf-MKD's hyper-parameters. The defaults are the `fixed` profile; docs/methods.md has all three side by side."""

    rounds: int = Field(default=300, ge=1, description="Outer iterations: times that teachers are inverted.")
    teachers_per_round: int = Field(
        default=4, ge=1, description="Teachers inverted in a round, drawn with replacement; the paper takes one."
    )
    images_per_class: int = Field(default=30, ge=2, description="Images recovered per class, support and query alike.")
    iterations: int = Field(default=200, ge=1, description="Adam steps of an inversion.")
    lr_generator: float = Field(default=1e-3, gt=0, description="Adam step size of theta_G and Z.")
    conditional: bool = Field(
        default=True, description="A generator that is told the label (the paper); the released one is not."
    )
    boundary: bool = Field(default=True, description="Recover the query set against the task model.")
    boundary_after: int = Field(
        default=0, ge=0, description="Meta-updates before the query set is drawn to the boundary; the code: 4000."
    )
    distill: str = Field(
        default="kl", pattern="^(kl|probdot)$", description="Distillation loss: KL, or the released code's form."
    )
    inner_steps: int = Field(default=10, ge=0, description="SGD steps of the inner distillation.")
    inner_lr: float = Field(default=0.01, gt=0, description="Their step size.")
    generate_every: int = Field(
        default=20,
        ge=0,
        description="Meta-updates in a round; 0: until `replay.patience` of them bring no new best (code).",
    )
    bank_capacity: int = Field(default=600, ge=1, description="Images kept per class, first in first out.")
    bank_key: BankKey = Field(
        default="class",
        description="A bank class is a class name (side information of the cards), or a (teacher, class) pair.",
    )
    replay: ReplayConfig = ReplayConfig(tasks=4, patience=200, max_updates=1000)
