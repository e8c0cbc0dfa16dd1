"""Settings of IDEAL, its profiles and its presets.

[Zhang2023] IDEAL: Query-Efficient Data-Free Learning from Black-Box Models, ICLR 2023, Table 4 (ablations).
"""

from ray_dfml.methods.base import Preset, Values
from ray_dfml.methods.students.config import DistilConfig


class Config(DistilConfig):
    """IDEAL's hyper-parameters. The defaults are the `fixed` profile; docs/methods_ideal.md has all three."""


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

PRESETS: dict[str, Preset] = {
    "ideal-colour": Preset(
        "colour images of objects: plain shapes beside random networks, and a longer training of the student",
        {"method": {"images": ("dip", "dipc", "shapes", "mutants"), "steps": 8.0, "last_steps": 4000}},
    ),
    "no-information": Preset("[Zhang2023] Table 4: the generator without L_info", {"method": {"lam": 0.0}}),
    "no-ce": Preset("[Zhang2023] Table 4: the generator without the cross-entropy", {"method": {"ce": 0.0}}),
    "no-reset": Preset("[Zhang2023] Table 4: one generator that is never begun anew", {"method": {"reset": False}}),
}
