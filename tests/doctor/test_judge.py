"""Findings from measurements that are given."""

from typing import Any

import numpy as np
import pytest
import torch

from ray_dfml.core.net import net
from ray_dfml.doctor import judge, names, probes
from ray_dfml.doctor.vitals import SIGNALS, Vitals, implied
from ray_dfml.types import ImageSpec, TeacherCard

IMAGE = ImageSpec(channels=3, height=16, width=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def card(id: str, image: ImageSpec = IMAGE, arch: str = "conv4", ways: int = 3) -> TeacherCard:
    classes = tuple(f"{id}/{n}" for n in range(ways))
    return TeacherCard(id=id, arch=arch, image=image, classes=classes, access="weights", sha256="", accuracy=None)


def vitals(n: int, **changes: Any) -> Vitals:
    """Measurements of an ordinary teacher, which vary a little with n."""
    rng = torch.Generator().manual_seed(n)
    wave = float(np.sin(7.0 * n))
    signals = dict.fromkeys(SIGNALS, 1 + 0.1 * wave)
    fields: dict[str, Any] = {
        "card": card(f"t{n}"), "each": 4, "logits": torch.randn(12, 3, generator=rng),
        "features": torch.randn(12, 8, generator=rng), "weights": torch.randn(64, generator=rng), "steady": 0.9,
        "untrained": False, "mismatch": 0.5 + 0.05 * float(np.cos(5.0 * n)), "pixel_mean": None, "pixel_std": None,
    }  # fmt: skip
    return Vitals(**fields | changes | {"signals": signals | changes.get("signals", {})})


def test_a_teacher_that_learnt_by_heart_stands_out_of_all_four_signals() -> None:
    away = dict.fromkeys(judge.BY_HEART_SIGNALS, 1.4)
    found = judge.suspects([*(vitals(n) for n in range(8)), vitals(8, signals=away)])
    assert [(one.kind, one.leave_out) for one in found] == [("by-heart", ("t8",))]
    one_signal = judge.suspects([*(vitals(n) for n in range(8)), vitals(8, signals={"length": 1.4})])
    assert one_signal == [], "one signal alone is no evidence"


def test_noise_needs_a_misfit_and_flat_logits() -> None:
    others = [vitals(n) for n in range(8)]
    both = judge.suspects([*others, vitals(8, mismatch=1.5, signals={"spread": 0.2})])
    assert [(one.kind, one.leave_out) for one in both] == [("noise", ("t8",))]
    assert judge.suspects([*others, vitals(8, mismatch=1.5)]) == []
    assert judge.suspects([*others, vitals(8, signals={"spread": 0.2})]) == []


def test_few_teachers_are_not_compared_and_a_note_says_so() -> None:
    (note,) = judge.suspects([vitals(n, mismatch=9.0 * n, signals={"spread": -1.0 * n}) for n in range(5)])
    assert (note.severity, note.kind, len(note.teachers)) == ("note", "few", 5)


def test_relatives_of_one_backbone_are_no_copies() -> None:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=rng)
    group = [vitals(n, weights=base + 0.1 * torch.randn(64, generator=rng)) for n in range(3)]
    (note,) = judge.copies(group)
    assert (note.severity, note.kind, note.teachers) == ("note", "kin", ("t1", "t2"))


def test_the_same_answers_by_other_weights_are_a_copy() -> None:
    first = vitals(0)
    (found,) = judge.copies([first, vitals(1), vitals(2, logits=first.logits[:, [1, 2, 0]] * 3 + 1)])
    assert (found.kind, found.teachers, found.leave_out) == ("copy", ("t2", "t0"), ("t2",))


def test_dead_classes_and_overconfidence_are_noted() -> None:
    logits = torch.tensor([[9.0, 0, -9], [0, 9.0, -9]]).repeat(6, 1)
    dead, sure = judge.habits([vitals(0), vitals(1, logits=logits, steady=0.6)])
    assert "t1: t1/2" in dead.text
    assert (dead.severity, sure.severity) == ("note", "note")
    assert "mean confidence 100 %, but a small warp leaves only 60 %" in sure.text


def trained_on(pixels: torch.Tensor, image: ImageSpec, arch: str) -> Vitals:
    """A teacher whose running statistics are those of these inputs [n c h w]."""
    network = net(arch, IMAGE.shape, 3)
    theta = network.init(torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (image.mean, image.std))
    with torch.no_grad():
        stats = network.with_stats(theta, pixels)[1]
        seen = (probes.draw([IMAGE.shape]).first(2).images - mean) / std
        found = implied(network, card("t", image, arch), theta, stats, seen)
    assert found is not None
    return vitals(0, pixel_mean=found[0], pixel_std=found[1])


@pytest.mark.parametrize("arch", ["conv4", "resnet10"])
def test_the_first_batch_norm_remembers_the_scale_of_the_pixels(arch: str) -> None:
    rng = torch.Generator().manual_seed(1)
    pixels = (torch.rand(16, 3, 1, 1, generator=rng) * torch.rand(16, 3, 16, 16, generator=rng)).clamp(0, 1)
    plain = ImageSpec(channels=3, height=16, width=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    right = trained_on((pixels - 0.5) / 0.25, IMAGE, arch)
    assert right.pixel_mean == pytest.approx(pixels.mean((0, 2, 3)).numpy(), abs=0.06)
    assert judge.normalisation([right]) == []
    (scale,) = judge.normalisation([trained_on(255 * pixels, plain, arch)])
    assert scale.kind == "scale"
    assert "pixels in 0-255" in scale.text
    (other,) = judge.normalisation([trained_on((pixels - 0.5) / 0.25, plain, arch)])
    assert other.kind == "normalisation"


def test_nearly_equal_names() -> None:
    found = names.nearly_equal(
        ["a/Polar Bear", "a/polar_bears", "b/polar bear", "a/giraffe", "a/girafe", "a/cat", "a/car", "a/character01",
         "a/character02", "a/glass", "a/Élan", "a/elan"]
    )  # fmt: skip
    assert found == [("a/Polar Bear", "a/polar_bears"), ("a/Élan", "a/elan"), ("a/giraffe", "a/girafe")]


def test_label_spaces_count_shared_classes() -> None:
    first, near = names.label_spaces({"x": ("a/one", "a/two"), "y": ("a/two", "a/Two", "b/one")})
    assert first.text == "4 classes (a 3, b 1), 1 of them known to several teachers"
    assert near.teachers == ("x", "y")
