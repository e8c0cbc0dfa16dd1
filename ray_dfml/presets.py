"""Published settings and ablations by name, and the three profiles as sets of values.

[Wei2024] FREE, arXiv 2405.00984, section 5.1, Table 5 (ablations) and Table 7 (hard label).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PUBLISHED_TEST: Mapping[str, Any] = {"eval": {"lrs": ()}}
"""What the profiles `paper` and `code` change of the test, for every method: one step size, none chosen."""

PROFILES: dict[str, dict[str, Mapping[str, Any]]] = {
    "free": {
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
    },
    "purer": {
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
                "start": "average",
                "meta": {"inner_steps": 1, "reduction": "sum", "mix_data": True},
            },
            "eval": {"steps": 1},
        },
    },
    "bidf-mkd": {
        "paper": {
            "method": {
                "teachers_per_round": 1,
                "kl_clamp": 1e9,
                "crop_pad": 0,
                "flip": "off",
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
                "replay": {"reduction": "sum", "max_updates": 60_000, "mix_data": True},
            }
        },
    },
}
"""Method -> profile -> values of its run. `fixed` is the defaults."""


@dataclass(frozen=True)
class Preset:
    """Values of a run's config for one method, and why they are together."""

    method: str
    about: str
    values: Mapping[str, Any]


def _free(about: str, **method: Any) -> Preset:
    return Preset("free", about, {"method": method})


REPLAY: dict[str, Any] = {"shot": 1, "tasks": 4, "inner_lr": 0.1}
"""Cheap meta-updates that suit small images: with steps of 0.01 the inner loop hardly moves."""

STEP: dict[str, Any] = {"lr": 0.1}
"""The step of their inner loop: for the validation of rounds, and at test where no data chooses one."""

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
        "free", "[Wei2024] Table 2, CIFAR-FS 5-way 1-shot", {"method": {"replay": {"shot": 1}}, "eval": {"shots": (1,)}}
    ),
    "free-cifarfs-5w5s": Preset(
        "free", "[Wei2024] Table 2, CIFAR-FS 5-way 5-shot", {"method": {"replay": {"shot": 5}}, "eval": {"shots": (5,)}}
    ),
    "characters": Preset(
        "free",
        "28x28 characters on a small machine: narrow generator, larger inversion steps, smaller crops",
        {"method": CHARACTERS, "eval": STEP},
    ),
    "characters-purer": Preset(
        "purer",
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
    "characters-bidf": Preset(
        "bidf-mkd",
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
    "quickstart": Preset(
        "free",
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
    "baseline": _free(
        "Table 5: one generator trained teacher after teacher, no distillation",
        generator_sharing="sequential",
        learner_update="none",
    ),
    "erm": _free("Table 5: FIVE, distillation losses summed at theta", learner_update="erm"),
    "sequence": _free("Table 5: sequential generator, BELL", generator_sharing="sequential"),
    "free_2": _free("k = 2 adaptation steps", steps=2),
    "free_5": _free("k = 5 adaptation steps", steps=5),
    "no-curriculum": Preset("purer", "the images follow the teachers alone", {"method": {"curriculum": 0.0}}),
    "no-boundary": Preset(
        "bidf-mkd", "the query set is recovered as the support set is", {"method": {"boundary": False}}
    ),
    "purer-icfil": Preset(
        "purer", "calibration of the adapted learner at meta-test", {"eval": {"icfil": {"steps": 10}}}
    ),
    "hard-label": _free("Table 7: BELL on the labels instead of the teacher's outputs", distill="hard"),
}
"""Name -> preset."""
