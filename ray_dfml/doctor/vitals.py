"""What the doctor measures on one teacher, from its weights and from its answers to the probe images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.hub import HubNet
from ray_dfml.core.images import normalise
from ray_dfml.core.net import Net, net
from ray_dfml.core.similarity import beyond
from ray_dfml.doctor.probes import Probes, count
from ray_dfml.types import TeacherCard

SAMPLE = 4096
"""How many weights of a teacher are compared with those of others."""
DEAD = 0.01
"""A class whose probability is below this for every probe image may be dead."""
LEAST_VARIANCE = 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class Vitals:
    """Measurements of a teacher on n probe images, of which there are `each` of every source."""

    card: TeacherCard
    each: int
    logits: Tensor
    """[n q]"""
    features: Tensor
    """[n f]: what the head reads, or the logits for a network of another library."""
    weights: Tensor
    """[at most SAMPLE]: entries of the convolutions and linear layers below the head, evenly spaced; without mean."""
    signals: dict[str, float]
    """Name -> value of each measurement that is compared between teachers (`SIGNALS`)."""
    steady: float
    """Share of probe images, in [0, 1], whose label a small warp does not change."""
    untrained: bool
    """Whether the running statistics are those before any batch: means 0 and variances 1."""
    mismatch: float | None
    """How far the statistics of probe images are from the running ones, in nats: the mean over batch norms of the
    median over channels of the Gaussian KL, of the source for which it is least. None without batch norms."""
    pixel_mean: np.ndarray | None
    """[c]: mean pixel in [0, 1] of the training images, as the statistics of the first batch norm imply (`implied`)."""
    pixel_std: float | None
    """Spread of these pixels, implied likewise; roughly."""

    @property
    def group(self) -> tuple[object, ...]:
        """Teachers are compared with those of the same architecture, input size and number of classes."""
        return self.card.arch, self.card.image.shape, len(self.card.classes)

    @property
    def confidence(self) -> float:
        """Mean largest probability on probe images, in [0, 1]."""
        return float(self.logits.softmax(-1).amax(-1).mean())

    @property
    def dead(self) -> tuple[str, ...]:
        """The classes whose probability is below DEAD for every probe image."""
        most = self.logits.softmax(-1).amax(0).tolist()
        return tuple(name for name, value in zip(self.card.classes, most, strict=True) if value < DEAD)


SIGNALS = {
    "length": "length of its weights",
    "scatter": "scatter of its features of probe images beyond as many directions as it has classes, less one",
    "thresholds": "thresholds of its inner units",
    "quiet": "quietness of its last layers on its training images",
    "spread": "spread of its logits on probe images",
}
"""Signal -> what it is, in words."""


def measure(card: TeacherCard, theta: Tensor, stats: Tensor, probes: Probes) -> Vitals:
    """The vitals of a teacher with weights [p] and running statistics [k]."""
    network = net(card.arch, card.image.shape, len(card.classes))
    each = count(network.macs)
    seen = probes.first(each).seen(card.image.shape)
    mean, std = torch.tensor(card.image.mean), torch.tensor(card.image.std)
    images, nudged = normalise(seen.images, mean, std), normalise(seen.nudged, mean, std)
    hub = isinstance(network.network, HubNet)
    with torch.no_grad():
        logits, mismatch = _answers(network, theta, stats, images, each)
        warped = _in_parts(lambda x: network(theta, x, stats), nudged)
        features = logits if hub else _in_parts(lambda x: network.features(theta, x, stats), images)
        found = implied(network, card, theta, stats, images)
    parts = network.layout.unflatten(theta)
    matrices = [part for part in parts.values() if part.ndim > 1]
    last = [part for name, part in network.stats_layout.unflatten(stats).items() if name.endswith("running_var")][-2:]
    shifts = [parts[f"{name}.bias"] for name in network.network.norms if f"{name}.bias" in parts]
    signals = {
        "length": float(torch.cat([part.flatten() for part in matrices[:-1] or matrices]).norm().log()),
        "scatter": float(np.mean([beyond(part, len(card.classes) - 1) for part in features.split(each)])),
        "quiet": -float(torch.stack([var.clamp_min(LEAST_VARIANCE).log().mean() for var in last]).mean())
        if last
        else 0.0,
        "thresholds": -float(torch.cat(shifts[1:-1]).mean()) if len(shifts) > 2 else 0.0,
        "spread": float((logits.double() - logits.double().mean(0)).square().mean().sqrt().clamp_min(1e-12).log()),
    }
    fresh = network.initial_stats()
    return Vitals(
        card=card, each=each, logits=logits, features=features, weights=_sample(matrices), signals=signals,
        steady=float((logits.argmax(-1) == warped.argmax(-1)).double().mean()),
        untrained=len(stats) > 0 and bool((stats == fresh).all()), mismatch=mismatch,
        pixel_mean=None if found is None else found[0], pixel_std=None if found is None else found[1],
    )  # fmt: skip


def _in_parts(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(part) for part in images.split(64)])


def _sample(matrices: list[Tensor]) -> Tensor:
    flat = torch.cat([part.flatten() for part in matrices[:-1] or matrices])
    rows = torch.linspace(0, len(flat) - 1, min(SAMPLE, len(flat))).long()
    return flat[rows] - flat[rows].mean()


def _answers(
    network: Net, theta: Tensor, stats: Tensor, images: Tensor, each: int
) -> tuple[Tensor, float | None]:  # fmt: skip
    """Logits [n q] of normalised probe images [n c h w], `each` of every source, and the mismatch."""
    if not len(stats):
        return _in_parts(lambda x: network(theta, x, stats), images), None
    kept, found, logits = network.stats_layout.unflatten(stats), [], []
    for part in images.split(each):
        answer, moments = network.with_stats(theta, part, stats)
        logits.append(answer)
        batch, layers = network.stats_layout.unflatten(moments), []
        for mean_name in kept:
            if mean_name.endswith("running_mean"):
                var_name = mean_name.replace("running_mean", "running_var")
                var, spread = kept[var_name].clamp_min(LEAST_VARIANCE), batch[var_name].clamp_min(LEAST_VARIANCE)
                shift = (batch[mean_name] - kept[mean_name]).square()
                layers.append((0.5 * ((var / spread).log() + (spread + shift) / var - 1)).median())
        found.append(float(torch.stack(layers).mean()))
    return torch.cat(logits), min(found)


def implied(
    network: Net, card: TeacherCard, theta: Tensor, stats: Tensor, images: Tensor
) -> tuple[np.ndarray, float] | None:
    """Mean [c] and spread of the pixels that a teacher was trained on, as its first batch norm remembers them.

    The mean of what the first batch norm gets is A m + b for images of mean m, if only a convolution precedes it; A and
    b are read off images of one colour, and m solves the least-squares problem for the running mean. The spread is that
    of probe images, `images` [n c h w], times the root of the median ratio of the running variances to theirs. Both are
    in pixels as the teacher's normalisation says, so values that pixels in [0, 1] cannot have tell that the teacher was
    trained with another normalisation. None without batch norms, or if what precedes the first one is not affine.
    """
    if not len(stats):
        return None
    name = next(iter(network.stats_layout.shapes))
    channels = card.image.channels

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        found = network.stats_layout.unflatten(network.with_stats(theta, x, stats)[1])
        return found[name].double(), found[name.replace("running_mean", "running_var")].double()

    plain = torch.zeros(1, *card.image.shape)
    colours = torch.eye(channels)[:, :, None, None].expand(-1, -1, *card.image.shape[1:])
    offset = moments(plain)[0]
    maps = torch.stack([moments(colour[None])[0] - offset for colour in colours], dim=1)
    if not torch.allclose(moments(plain + 2)[0] - offset, 2 * maps.sum(1), rtol=1e-3, atol=1e-4):
        return None
    kept = network.stats_layout.unflatten(stats)
    mean, var = kept[name].double(), kept[name.replace("running_mean", "running_var")].double().clamp_min(1e-12)
    weight = var.rsqrt()[:, None]
    solved = torch.linalg.lstsq(maps * weight, (mean - offset)[:, None] * weight, driver="gelsd").solution[:, 0]
    to_mean, to_std = np.array(card.image.mean), np.array(card.image.std)
    ratio = (var / moments(images)[1].clamp_min(1e-12)).median().sqrt()
    spread = images.double().std((0, 2, 3)).numpy() * to_std * float(ratio)
    return to_mean + to_std * solved.numpy(), float(spread.mean())
