"""Settings of FREE."""

from typing import Literal

from pydantic import Field

from ray_dfml.methods.bank import BankKey
from ray_dfml.methods.base import ReplayConfig
from ray_dfml.methods.inversion import InversionConfig


class Config(InversionConfig):
    """FREE's hyper-parameters. The defaults are the `fixed` profile; docs/methods.md has all three side by side."""

    rounds: int = Field(default=1000, ge=1, description="Outer iterations (epochs in the paper).")
    warmup: int = Field(
        default=19, ge=0, description="First rounds that train the generator only, without the adversarial term."
    )
    teachers_per_round: int = Field(
        default=4, ge=1, description="b: teachers inverted in a round, drawn with replacement."
    )
    steps: int = Field(default=5, ge=0, description="k: adaptation steps of (Z, theta_G) to one teacher.")
    lr_generator: float = Field(default=1e-3, ge=0, description="Inner Adam step size of theta_G.")
    lr_latent: float = Field(default=1e-3, ge=0, description="Inner Adam step size of Z.")
    lr_meta: float = Field(default=1e-3, ge=0, description="gamma: outer step size of theta_G.")
    meta_optimizer: Literal["adam", "adam-fresh", "sgd"] = Field(
        "adam",
        description="Outer optimiser of theta_G: persistent Adam; Adam re-created every round (code); SGD (paper).",
    )
    meta_reduction: Literal["mean", "sum"] = Field(
        default="mean", description="Of the b meta-gradients; the released code sums."
    )
    generator_sharing: Literal["meta", "sequential"] = Field(
        default="meta", description="FIVE, or one generator trained on teacher after teacher (ablation)."
    )
    final_pass: bool = Field(
        True,
        description="k updates, then one pass for images and meta-gradient; the released code takes both from pass k.",
    )
    learner_update: Literal["bell", "erm", "none"] = Field(
        default="bell", description="Distillation of the b tasks: BELL, or ablations."
    )
    bell_inner: Literal["adam", "sgd"] = Field(default="adam", description="Inner optimiser of BELL.")
    bell_lr: float = Field(default=1e-3, gt=0, description="alpha: inner step size of BELL.")
    bell_outer: Literal["adam", "interpolate", "shared-adam"] = Field(
        "adam",
        description="Outer step: own Adam on theta - theta~; theta += eps (theta~ - theta); the replay's Adam (code).",
    )
    bell_outer_lr: float = Field(default=1e-3, gt=0, le=1.0, description="epsilon: outer step size of BELL.")
    bell_scale: float = Field(
        default=1.0, gt=0, description="Factor on the pseudo-gradient theta - theta~; the released code has 67."
    )
    distill: Literal["kl", "probdot", "hard"] = Field(
        default="kl", description="BELL's loss: KL, the code's form, or CE on labels."
    )
    alignment_every: int = Field(
        default=10, ge=0, description="Rounds between gradient products with all g_i at theta; 0 is never."
    )
    bank_capacity: int = Field(default=400, ge=1, description="Images kept per class, first in first out.")
    bank_adds: Literal["all", "last"] = Field(
        default="all", description="Recovered tasks stored per round; the released code: last."
    )
    bank_key: BankKey = Field(
        default="class",
        description="A bank class is a class name (side information of the cards), or a (teacher, unit) pair.",
    )
    replay: ReplayConfig = ReplayConfig()
