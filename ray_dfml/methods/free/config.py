"""Settings of FREE, its profiles and its presets.

[Wei2024] FREE, arXiv 2405.00984, section 5.1, Table 5 (ablations) and Table 7 (hard label).
"""

from typing import Any, Literal

from pydantic import Field

from ray_dfml.methods.bank import BankKey
from ray_dfml.methods.base import Preset, ReplayConfig, Values
from ray_dfml.methods.characters import REPLAY, STEP
from ray_dfml.methods.sourced import GENERATOR, RecoveryConfig
from ray_dfml.methods.surrogates.config import SurrogateConfig


class AnsweredConfig(SurrogateConfig):
    """Surrogates whose recovered images the services are asked about."""

    labels: Literal["keep", "drop", "relabel"] = Field(
        default="drop", description="What becomes of a recovered image to which its service gives another class."
    )


class Config(RecoveryConfig):
    """FREE's hyper-parameters. The defaults are the `fixed` profile; docs/methods.md has all three side by side."""

    rounds: int = Field(default=1000, ge=1, description="Outer iterations (epochs in the paper).")
    warmup: int = Field(
        default=19, ge=0, description="First rounds that train the generator only, without the adversarial term."
    )
    teachers_per_round: int = Field(default=4, ge=1, description="b: teachers inverted in a round.")
    draws: Literal["replacement", "turns"] = Field(
        "replacement",
        description="How they are drawn: each by itself (paper, code), or in random order, none twice before all once.",
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
        default="mean", description="How the b meta-gradients are joined; the released code sums them."
    )
    generator_sharing: Literal["meta", "sequential"] = Field(
        default="meta", description="FIVE, or one generator trained on teacher after teacher (ablation)."
    )
    final_pass: bool = Field(
        True,
        description="Whether one more pass follows the k updates, for images and meta-gradient; the code uses pass k.",
    )
    learner_update: Literal["bell", "erm", "none"] = Field(
        default="bell", description="How the b tasks are distilled: BELL, one summed step (ERM), or not at all."
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
        default=10, ge=0, description="Rounds between measurements of the alignment at theta; with 0, there is none."
    )
    bank_capacity: int = Field(default=400, ge=1, description="Images kept per class, first in first out.")
    bank_adds: Literal["all", "last"] = Field(
        default="all", description="Which recovered tasks of a round are stored; the released code stores the last."
    )
    bank_key: BankKey = Field(
        default="class",
        description="A bank class is a class name (side information of the cards), or a (teacher, unit) pair.",
    )
    replay: ReplayConfig = ReplayConfig()
    surrogate: AnsweredConfig = Field(
        default=AnsweredConfig(), description="How services, which give no weights, are asked and used."
    )

    @property
    def first(self) -> int:
        """The first round in which the learner learns. Without a generator there is no warm-up."""
        return self.warmup if GENERATOR in self.images else 0


PROFILES: dict[str, Values] = {
    "paper": {
        "method": {
            "warmup": 0,
            "meta_optimizer": "sgd",
            "kl_clamp": 1e9,
            "crop_pad": 0,
            "flip": "off",
            "bell_inner": "sgd",
            "bell_outer": "interpolate",
            "replay": {"mix_data": True},
        }
    },
    "code": {
        "method": {
            "rounds": 999,
            "meta_optimizer": "adam-fresh",
            "meta_reduction": "sum",
            "final_pass": False,
            "adversarial_form": "probdot",
            "crop_fill": "zero",
            "flip": "on",
            "bell_outer": "shared-adam",
            "bell_scale": 67.0,
            "distill": "probdot",
            "bank_adds": "last",
            "replay": {"reduction": "sum", "max_updates": 1_000_000, "mix_data": True},
        }
    },
}

CHARACTERS: dict[str, Any] = {
    "warmup": 2,
    "width": 16,
    "steps": 8,
    "crop_pad": 2,
    "lr_generator": 1e-2,
    "lr_latent": 0.1,
    "lr_meta": 2e-3,
    "bn_weight": 1.0,
    "replay": {**REPLAY, "lr": 3e-3, "max_updates": 10},
}

PRESETS: dict[str, Preset] = {
    "free-cifarfs-5w1s": Preset(
        "[Wei2024] Table 2, CIFAR-FS 5-way 1-shot", {"method": {"replay": {"shot": 1}}, "eval": {"shots": (1,)}}
    ),
    "free-cifarfs-5w5s": Preset(
        "[Wei2024] Table 2, CIFAR-FS 5-way 5-shot", {"method": {"replay": {"shot": 5}}, "eval": {"shots": (5,)}}
    ),
    "characters": Preset(
        "28x28 characters on a small machine: narrow generator, larger inversion steps, smaller crops",
        {"method": CHARACTERS, "eval": STEP},
    ),
    "quickstart": Preset(
        "`ray-dfml quickstart`: `characters` with the published protocol's small steps, in training and at test",
        {
            "method": {
                **CHARACTERS,
                "rounds": 8,
                "steps": 5,
                "lr_generator": 3e-3,
                "lr_latent": 3e-2,
                "replay": {"shot": 1, "tasks": 6, "max_updates": 12},
            },
            "eval": {"shots": (1,), "every": 100, "val_episodes": 50, "steps": 5, "lrs": ()},
        },
    ),
    "baseline": Preset(
        "Table 5: one generator trained teacher after teacher, no distillation",
        {"method": {"generator_sharing": "sequential", "learner_update": "none"}},
    ),
    "erm": Preset("Table 5: FIVE, distillation losses summed at theta", {"method": {"learner_update": "erm"}}),
    "sequence": Preset("Table 5: sequential generator, BELL", {"method": {"generator_sharing": "sequential"}}),
    "free_2": Preset("k = 2 adaptation steps", {"method": {"steps": 2}}),
    "hard-label": Preset(
        "Table 7: BELL on the labels instead of the teacher's outputs", {"method": {"distill": "hard"}}
    ),
}
