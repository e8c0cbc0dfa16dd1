"""Published settings and ablations by name, and the three profiles as sets of values.

[Wei2024] FREE, arXiv 2405.00984, section 5.1, Table 5 (ablations) and Table 7 (hard label).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROFILES: dict[str, dict[str, Mapping[str, Any]]] = {
    "free": {
        "paper": {
            "warmup": 0,
            "meta_optimizer": "sgd",
            "kl_clamp": 1e9,
            "crop_pad": 0,
            "flip": "off",
            "bell_inner": "sgd",
            "bell_outer": "interpolate",
        },
        "code": {
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
            "replay": {"reduction": "sum", "max_updates": 1_000_000},
        },
    },
}
"""Method -> profile -> values of its config. `fixed` is the defaults."""


@dataclass(frozen=True)
class Preset:
    """Values of a run's config for one method, and why they are together."""

    method: str
    about: str
    values: Mapping[str, Any]


def _free(about: str, **method: Any) -> Preset:
    return Preset("free", about, {"method": method})


CHARACTERS: dict[str, Any] = {
    "warmup": 4,
    "width": 32,
    "crop_pad": 2,
    "lr_generator": 3e-3,
    "lr_latent": 3e-2,
    "lr_meta": 2e-3,
    "bn_weight": 1.0,
    "replay": {"shot": 1, "max_updates": 20},
}

PRESETS: dict[str, Preset] = {
    "free-cifarfs-5w1s": Preset(
        "free", "[Wei2024] Table 2, CIFAR-FS 5-way 1-shot", {"method": {"replay": {"shot": 1}}, "eval": {"shots": (1,)}}
    ),
    "free-cifarfs-5w5s": Preset(
        "free", "[Wei2024] Table 2, CIFAR-FS 5-way 5-shot", {"method": {"replay": {"shot": 5}}, "eval": {"shots": (5,)}}
    ),
    "characters": _free(
        "28x28 characters on a small machine: narrow generator, larger inversion steps, smaller crops", **CHARACTERS
    ),
    "quickstart": Preset(
        "free",
        "`ray-dfml quickstart`: `characters`, shorter and narrower",
        {
            "method": {
                **CHARACTERS,
                "rounds": 8,
                "warmup": 2,
                "width": 16,
                "replay": {"shot": 1, "max_updates": 12, "tasks": 6},
            },
            "eval": {"shots": (1,), "every": 100, "val_episodes": 50, "steps": 5},
        },
    ),
    "baseline": _free(
        "Table 5: one generator trained teacher after teacher, no distillation",
        generator_sharing="sequential",
        learner_update="none",
    ),
    "erm": _free("Table 5: FIVE, distillation losses summed at theta", learner_update="erm"),
    "sequence": _free("Table 5: sequential generator, BELL", generator_sharing="sequential"),
    "free_2": _free("k = 2 adaptation steps", steps=2),
    "free_5": _free("k = 5 adaptation steps", steps=5),
    "hard-label": _free("Table 7: BELL on the labels instead of the teacher's outputs", distill="hard"),
}
"""Name -> preset."""
