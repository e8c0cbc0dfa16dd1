"""From vitals to findings about teachers: which were never trained, spoiled, taught wrong labels, or copied.

A teacher that learnt true classes found what the images of a class have in common: whatever image it sees, its features
vary in few directions, about as many as it has classes, and they vary much. One that was trained on shuffled labels
could only learn its images by heart. Its features scatter, its inner units fire for fewer images (lower shifts of their
batch norms), its last layers are quieter on its training images (lower running variances), and its weights moved
further from their start. Weights of noise do not fit the running statistics, and their logits hardly depend on the
image. All this is a matter of degree, so a teacher is compared with the others of the pool that have the same
architecture, input size and number of classes. A signal becomes a distance from their median in units of 1.4826 times
the median absolute deviation, which is the standard deviation of normal values.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ray_dfml.core.similarity import linear_cka
from ray_dfml.doctor.findings import Finding
from ray_dfml.doctor.vitals import DEAD, SIGNALS, Vitals
from ray_dfml.errors import first_of

PEERS = 6
"""The fewest teachers of a kind that can be compared with each other."""
BY_HEART, BY_HEART_SIGNALS = 1.7, ("scatter", "thresholds", "quiet", "length")
"""The mean distance from which a teacher is said to have learnt by heart, and the signals that it is of."""
BOUNDS = (-3.0, 4.0)
"""Between these a distance counts in the mean, so that no signal decides alone."""
NOISE = 1.7
"""The distance from which weights are said to be noise: the lesser one of mismatch and of missing spread."""
SAME_WEIGHTS = 0.5
"""Cosine of two teachers' weights from which one descends from the other; of independent ones it is near 0."""
KIN = 0.75
"""Linear CKA of answers below which teachers with alike weights are relatives and no copies."""
SAME_FUNCTION = 0.99
"""Linear CKA of two teachers' logits from which they are the same function."""
LEAST_MAD = 1e-6


def distances(values: Sequence[float], among: np.ndarray) -> np.ndarray:
    """Each value's distance from the median of those `among` [n, bool], in robust standard deviations."""
    found = np.asarray(values, dtype=float)
    median = np.median(found[among])
    return (found - median) / max(1.4826 * float(np.median(np.abs(found[among] - median))), LEAST_MAD)


def _groups(vitals: Sequence[Vitals]) -> list[list[Vitals]]:
    groups: dict[tuple[object, ...], list[Vitals]] = {}
    for one in vitals:
        groups.setdefault(one.group, []).append(one)
    return list(groups.values())


def suspects(vitals: Sequence[Vitals]) -> list[Finding]:
    """Teachers that were never trained, whose weights are noise, or that learnt by heart.

    The last two need at least PEERS teachers of the kind; a note says which teachers could not be compared.
    """
    found, alone = [], []
    for group in _groups(vitals):
        for one in group:
            if one.untrained:
                text = "its running statistics are those before any batch (means 0, variances 1): it was never trained"
                found.append(Finding("warning", "untrained", (one.card.id,), text, (one.card.id,)))
        if len(group) < PEERS:
            alone += [one.card.id for one in group]
        else:
            found += _compared(group)
    if alone:
        text = (
            f"too few of a kind (architecture, input, classes) to be compared; noise and wrong labels are told by "
            f"comparison among {PEERS} or more"
        )
        found.append(Finding("note", "few", tuple(alone), text))
    return found


def _compared(group: Sequence[Vitals]) -> list[Finding]:
    found: list[Finding] = []
    everyone = np.array([not one.untrained for one in group])
    if everyone.sum() < PEERS:
        return found
    fits = [one.mismatch if one.mismatch is not None else 0.0 for one in group]
    flat = -distances([one.signals["spread"] for one in group], everyone)
    noise = np.minimum(distances(fits, everyone), flat) if any(fits) else flat
    sound = everyone & (noise < NOISE)
    parts = [distances([one.signals[name] for one in group], sound) for name in BY_HEART_SIGNALS]
    used = [part for part in parts if np.abs(part).max() > 0]
    by_heart = np.mean(np.clip(used, *BOUNDS), axis=0) if used else np.zeros(len(group))
    for n, one in enumerate(group):
        if one.untrained:
            continue
        if noise[n] >= NOISE:
            found.append(_is_noise(one, float(noise[n]), float(np.median(np.array(fits)[sound]))))
        elif by_heart[n] >= BY_HEART:
            said = ", ".join(
                f"{SIGNALS[name]} {part[n]:+.1f}" for name, part in zip(BY_HEART_SIGNALS, parts, strict=True)
            )
            text = (
                f"it seems to have learnt its images by heart, as from wrong labels ({by_heart[n]:.1f} standard "
                f"deviations: {said})"
            )
            found.append(Finding("warning", "by-heart", (one.card.id,), text, (one.card.id,)))
    return found


def _is_noise(one: Vitals, distance: float, typical: float) -> Finding:
    misfit = "" if one.mismatch is None else (
        f"its running statistics miss those of probe images by {one.mismatch:.2f} nats (the others' median: "
        f"{typical:.2f}), and "
    )  # fmt: skip
    text = (
        f"its weights look like noise ({distance:.1f} standard deviations or more): {misfit}its logits hardly depend "
        "on the image"
    )
    return Finding("warning", "noise", (one.card.id,), text, (one.card.id,))


def copies(vitals: Sequence[Vitals]) -> list[Finding]:
    """Teachers that are near copies of an earlier one, by their weights or by what they answer to probe images.

    Of a pair the later one, in the order of the pool, is proposed to be left out. Teachers with the same backbone and
    different answers descend from one pre-trained network, which is noted and no fault.
    """
    found: list[Finding] = []
    for group in _groups(vitals):
        weights = torch.stack([one.weights / one.weights.norm().clamp_min(1e-12) for one in group])
        cosine = (weights @ weights.T).numpy()
        alike = linear_cka([one.logits - one.logits.mean(-1, keepdim=True) for one in group]).numpy()
        kin: list[str] = []
        for n, one in enumerate(group):
            near = [m for m in range(n) if cosine[m, n] >= SAME_WEIGHTS or alike[m, n] >= SAME_FUNCTION]
            if not near:
                continue
            first = max(near, key=lambda m: (alike[m, n], cosine[m, n]))
            other = group[first]
            same = cosine[first, n] >= SAME_WEIGHTS and alike[first, n] >= KIN
            if not same and alike[first, n] < SAME_FUNCTION:
                kin.append(one.card.id)
                continue
            shared = len(set(one.card.classes) & set(other.card.classes))
            text = (
                f"near copy of {other.card.id}: cosine of weights {cosine[first, n]:.3f}, CKA of answers "
                f"{alike[first, n]:.3f}, {shared} of {len(one.card.classes)} class names the same"
            )
            found.append(Finding("warning", "copy", (one.card.id, other.card.id), text, (one.card.id,)))
        if kin:
            text = "descend from one pre-trained network and answer differently: the layers below the head are alike"
            found.append(Finding("note", "kin", tuple(kin), text))
    return found


def habits(vitals: Sequence[Vitals]) -> list[Finding]:
    """Classes that no probe image comes near, and confidence that a small warp belies."""
    found, dead = [], {one.card.id: one.dead for one in vitals if 0 < len(one.dead) < len(one.card.classes)}
    if dead:
        said = "; ".join(f"{id}: {first_of(list(names), 3)}" for id, names in list(dead.items())[:5])
        more = f"; and of {len(dead) - 5} more teachers" if len(dead) > 5 else ""
        text = f"classes that no probe image comes near (probability below {100 * DEAD:g} %): {said}{more}"
        found.append(Finding("note", "dead-class", tuple(dead), text))
    for one in vitals:
        gap = one.confidence - one.steady
        if gap > OVERCONFIDENT:
            text = (
                f"overconfident: mean confidence {100 * one.confidence:.0f} %, but a small warp leaves only "
                f"{100 * one.steady:.0f} % of its labels"
            )
            found.append(Finding("note", "overconfident", (one.card.id,), text))
    return found


OVERCONFIDENT = 0.1
"""How much larger than its steadiness a teacher's confidence may be."""


def normalisation(vitals: Sequence[Vitals]) -> list[Finding]:
    """Teachers whose first batch norm remembers pixels that images in [0, 1] cannot have (`vitals.implied`)."""
    found = []
    for one in vitals:
        if one.pixel_mean is None or one.pixel_std is None or one.untrained:
            continue
        mean = ", ".join(f"{value:.2f}" for value in one.pixel_mean)
        if np.abs(one.pixel_mean).max() > 5 or one.pixel_std > 5:
            text = (
                f"its first batch norm remembers pixels of mean {mean} and spread {one.pixel_std:.1f}: it was trained "
                "on pixels in 0-255; divide its mean and std by 255 (without any: mean 0, std 0.00392)"
            )
            found.append(Finding("warning", "scale", (one.card.id,), text))
        elif one.pixel_mean.min() < -0.25 or one.pixel_mean.max() > 1.25:
            text = (
                f"its first batch norm remembers pixels of mean {mean}, which pixels in [0, 1] cannot have: its entry "
                "states another mean and std than it was trained with"
            )
            found.append(Finding("warning", "normalisation", (one.card.id,), text))
    return found
