"""A student in training: its weights, its running statistics, its optimiser, and the mean of its weights.

The mean is exponential: after each step, m <- d m + (1 - d) w, where d grows from 0.1 to `average` as (t + 1)/(t + 10)
in step t, so that the first weights are soon forgotten. Predictions are those of the mean.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import optim
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.net import Net
from ray_dfml.methods.students.config import StudentConfig
from ray_dfml.types import Arrays, ImageSpec

STATS_MOMENTUM = 0.1
"""Share of a batch's statistics in the running ones."""
CHUNK = 500
"""Images that are classified at once."""


@dataclass(frozen=True, kw_only=True)
class Pupil:
    """All that a student's next step depends on. `m` and `v` are Adam's moments; with SGD `m` is the velocity."""

    theta: Tensor
    stats: Tensor
    mean_theta: Tensor
    mean_stats: Tensor
    m: Tensor
    v: Tensor
    step: int = 0

    @classmethod
    def fresh(cls, network: Net, rng: torch.Generator) -> Self:
        """A student before its first step."""
        theta, stats = network.init(rng), network.initial_stats()
        zeros = torch.zeros_like(theta)
        return cls(theta=theta, stats=stats, mean_theta=theta, mean_stats=stats, m=zeros, v=zeros)

    @classmethod
    def of(cls, values: Mapping[str, Any], device: torch.device | str = "cpu") -> Self:
        """The student that `values` describes."""
        parts = {name: torch.tensor(np.asarray(values[name]), device=device) for name in PARTS}
        return cls(**parts, step=int(values["step"]))

    def values(self) -> Arrays:
        """The student as values that can be shipped and stored in a checkpoint."""
        return {name: getattr(self, name).cpu().numpy() for name in PARTS} | {"step": self.step}

    @property
    def finite(self) -> bool:
        """Whether no weight and no statistic is NaN or infinite."""
        return all(bool(torch.isfinite(part).all()) for part in (self.theta, self.stats, self.mean_theta))


PARTS = ("theta", "stats", "mean_theta", "mean_stats", "m", "v")


@dataclass
class Lesson:
    """Steps of one student in one job. `pupil` is replaced by each step."""

    cfg: StudentConfig
    network: Net
    image: ImageSpec
    pupil: Pupil
    average: float = 0.0
    """The largest share d of the mean that a step keeps; with 0 the mean is the last weights."""

    def __post_init__(self) -> None:
        device = self.pupil.theta.device
        self._mean, self._std = (torch.tensor(values, device=device) for values in (self.image.mean, self.image.std))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels [n c h w] in [0, 1] as the network takes them."""
        return normalise(pixels, self._mean, self._std)

    def step(self, pixels: Tensor, loss_of: Callable[[Tensor], Tensor], lr: float) -> Tensor:
        """One step on the loss of the logits of pixels [n c h w]. Returns the loss before the step (scalar)."""
        cfg, pupil = self.cfg, self.pupil
        leaf = pupil.theta.detach().requires_grad_()
        logits, found = self.network.with_stats(leaf, self.normalised(pixels), first_order=True)
        loss = loss_of(logits)
        (grad,) = torch.autograd.grad(loss, leaf)
        if cfg.optimiser == "adam":
            theta, adam = optim.adam_step(pupil.theta, grad, optim.Adam(pupil.m, pupil.v, pupil.step), lr=lr)
            m, v = adam.m, adam.v
        else:
            theta, m = optim.sgd_step(
                pupil.theta, grad, pupil.m, lr=lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
            )
            v = pupil.v
        stats = torch.lerp(pupil.stats, found, STATS_MOMENTUM)
        kept = min(self.average, (pupil.step + 1) / (pupil.step + 10))
        self.pupil = replace(
            pupil, theta=theta, stats=stats, m=m, v=v, step=pupil.step + 1,
            mean_theta=torch.lerp(theta, pupil.mean_theta, kept), mean_stats=torch.lerp(stats, pupil.mean_stats, kept),
        )  # fmt: skip
        return loss.detach()

    @torch.no_grad()
    def logits(self, images: np.ndarray) -> Tensor:
        """Logits [n q] that the mean of the weights gives to uint8 images [n c h w]."""
        parts = [self._logits(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
        return torch.cat(parts) if parts else self._logits(images)

    def _logits(self, images: np.ndarray) -> Tensor:
        pixels = to_pixels(images, self.pupil.theta.device)
        return self.network(self.pupil.mean_theta, self.normalised(pixels), self.pupil.mean_stats, first_order=True)


def targets(answers: np.ndarray) -> Tensor:
    """Answers of a service as targets of a cross-entropy: labels int64 [n], or probabilities float32 [n q]."""
    return torch.tensor(answers, dtype=torch.int64 if answers.ndim == 1 else torch.float32)


def learnable(answers: np.ndarray, access: str, wanted: str) -> np.ndarray:
    """What a student learns from a service's answers: labels int64 [n] (`hard`), or probabilities [n q] (`soft`).

    Logits become probabilities, and probabilities that were rounded or cut are made to sum to 1. Where all were rounded
    to 0, they stay 0, and teach nothing.
    """
    if answers.ndim == 1:
        return answers.astype(np.int64)
    if wanted == "hard":
        return answers.argmax(-1).astype(np.int64)
    found = torch.tensor(answers, dtype=torch.float32)
    found = found if access == "probs" else found.softmax(-1)
    sums = found.sum(-1, keepdim=True)
    return (found / sums.where(sums > 0, 1)).numpy()


def labels_of(answers: np.ndarray) -> np.ndarray:
    """The best class int64 [n] of stored answers."""
    return answers if answers.ndim == 1 else answers.argmax(-1)


def cross_entropy(answers: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of a step: cross-entropy to labels [n] or probabilities [n q], in nats, averaged over the images."""
    return lambda logits: F.cross_entropy(logits, answers)


def picks(weights: Tensor, *, steps: int, batch: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Rows of `steps` batches, drawn with replacement in proportion to `weights` [n]."""
    yield from torch.multinomial(weights, steps * batch, replacement=True, generator=rng).view(steps, batch)
