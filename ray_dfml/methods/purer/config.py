"""Settings of PURER, its profiles and its presets."""

from pydantic import Field

from ray_dfml.methods.bank import BankKey
from ray_dfml.methods.base import MetaConfig, MethodConfig, Preset, Values
from ray_dfml.methods.characters import REPLAY, STEP
from ray_dfml.methods.surrogates.config import SurrogateConfig


class Config(MethodConfig):
    """PURER's hyper-parameters. The defaults are the `fixed` profile; docs/methods.md has all three side by side."""

    rounds: int = Field(default=1500, ge=1, description="Outer iterations.")
    image_steps: int = Field(default=10, ge=1, description="Adam steps on the images in a round.")
    updates: int = Field(default=10, ge=1, description="Meta-updates in a round; the paper makes one per image step.")
    image_warmup: int = Field(
        default=20, ge=0, description="First rounds without meta-updates, since noise teaches the learner nothing."
    )
    teachers_per_round: int = Field(
        default=0, ge=0, description="Teachers whose images move in a round, drawn without replacement; 0 is all."
    )
    images_per_class: int = Field(default=20, ge=2, description="Learnable images per class of a teacher.")
    lr_images: float = Field(default=0.25, gt=0, description="Adam step size of the images.")
    tv_weight: float = Field(default=1e-4, ge=0, description="Weight of the four norms of differences of neighbours.")
    l2_weight: float = Field(default=1e-5, ge=0, description="Weight of the norm of the images.")
    bn_weight: float = Field(default=1e-2, ge=0, description="Weight of the teacher's batch-norm statistics.")
    shift: int = Field(default=2, ge=0, description="Largest random cyclic shift of the images, pixels.")
    curriculum: float = Field(default=10.0, ge=0, description="Weight of the adversarial step; 0 is no curriculum.")
    curriculum_after: int = Field(default=4000, ge=1, description="Meta-updates before the first adversarial step.")
    curriculum_patience: int = Field(
        default=6, ge=1, description="Updates without a new best training accuracy before the next adversarial step."
    )
    image_key: BankKey = Field(
        default="class",
        description="A class of pseudo tasks is a class name (side information of the cards), or a (teacher, class).",
    )
    meta: MetaConfig = MetaConfig(tasks=4)
    surrogate: SurrogateConfig = Field(
        default=SurrogateConfig(), description="How services, which give no weights, are asked before the inversion."
    )

    @property
    def total_rounds(self) -> int:
        """The rounds that distil services, and `rounds`."""
        return self.rounds + self.surrogate.rounds


PROFILES: dict[str, Values] = {
    "paper": {
        "method": {
            "rounds": 15_000,
            "image_steps": 1,
            "updates": 1,
            "image_warmup": 0,
            "meta": {"mix_data": True},
        }
    },
    "code": {
        "method": {
            "rounds": 60_000,
            "image_steps": 1,
            "updates": 1,
            "image_warmup": 0,
            "meta": {"inner_steps": 1, "reduction": "sum", "mix_data": True},
        },
        "eval": {"steps": 1},
        "learner": {"start": "average"},
    },
}

PRESETS: dict[str, Preset] = {
    "characters-purer": Preset(
        "28x28 characters on a small machine: few images, smaller steps for pixels in [0, 1], an early curriculum",
        {
            "method": {
                "image_steps": 2,
                "updates": 10,
                "image_warmup": 12,
                "images_per_class": 16,
                "lr_images": 0.1,
                "tv_weight": 1e-3,
                "bn_weight": 1.0,
                "curriculum_after": 20,
                "meta": REPLAY,
            },
            "eval": STEP,
        },
    ),
    "no-curriculum": Preset("the images follow the teachers alone", {"method": {"curriculum": 0.0}}),
    "purer-icfil": Preset("calibration of the adapted learner at meta-test", {"eval": {"icfil": {"steps": 10}}}),
}
