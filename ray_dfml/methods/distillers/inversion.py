"""DeepInversion and CMI: a batch of images is inverted from the student, the teacher is asked about it, and it is kept.

[Yin2020] Dreaming to Distill, arXiv 1912.08795 (DeepInversion). [Fang2021] Contrastive Model Inversion for Data-Free
Knowledge Distillation, arXiv 2105.08584 (CMI). Both invert the teacher; here, as the package says, they invert the
student. What compares the student with the teacher before it is asked has nothing to compare, and is dropped:
DeepInversion's competition and CMI's adversarial term.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ray_dfml.core import losses, optim
from ray_dfml.core.generators import generator
from ray_dfml.core.images import draw_view, to_bytes, to_pixels, view
from ray_dfml.methods.base import Metrics
from ray_dfml.methods.distillers.making import method_of
from ray_dfml.methods.students import lessons
from ray_dfml.methods.students.config import ReplayConfig
from ray_dfml.methods.students.loop import Study, Work


class InversionConfig(ReplayConfig):
    """Settings of the inversion of a student and of its training on all images so far."""

    batch: int = Field(default=100, ge=2, description="Images of an inversion, which are asked about and kept.")
    iterations: int = Field(default=50, ge=1, description="Adam steps of an inversion.")
    inversion_lr: float = Field(default=0.1, gt=0, description="Adam step size of an inversion.")
    bn_weight: float = Field(default=1.0, ge=0, description="Weight of the student's batch-norm statistics.")


class DeepInversionConfig(InversionConfig):
    """DeepInversion: pixels are optimised."""

    tv_weight: float = Field(default=1.0, ge=0, description="Weight of the total variation.")


class CmiConfig(InversionConfig):
    """CMI: a fresh generator and its codes are optimised, and an image should differ from all others."""

    inversion_lr: float = Field(default=1e-3, gt=0, description="Adam step size of an inversion.")
    ce: float = Field(default=0.5, ge=0, description="Weight of the student's cross-entropy on the wished labels.")
    contrast: float = Field(default=0.8, ge=0, description="Weight of the contrastive term.")
    temperature: float = Field(default=0.2, gt=0, description="Temperature of the contrastive term.")
    negatives: int = Field(default=256, ge=0, description="Kept images that join the contrast; the code: 4096.")
    latent: int = Field(default=256, ge=1, description="d_z: length of a latent code.")
    iterations: int = Field(default=25, ge=1, description="Adam steps of an inversion.")
    width: int = Field(default=32, ge=4, description="Channels of the generator's last hidden layer.")

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError for a shape [c h w] that the generator cannot make."""
        generator(shape, self.latent, self.width)


def _views(study: Study, images: Tensor) -> Tensor:
    """A jittered view; colour images are mirrored half of the time."""
    flip = study.card.image.channels > 1
    return view(images, draw_view(study.rng, pad=2, flip=flip), pad=2, fill="edge")


def _fit(study: Study, images: Tensor, labels: Tensor, ce: float, bn_weight: float) -> Tensor:
    """ce CE + bn_weight R_BN (scalar) of the frozen student on a view of the images.

    An untrained student has no statistics of images: those it begins with would ask for black ones. R_BN waits for it.
    """
    lesson, pupil = study.lesson, study.lesson.pupil
    x = lesson.normalised(_views(study, images))
    logits, found = lesson.network.with_stats(pupil.theta, x, pupil.stats, first_order=True)
    loss = ce * F.cross_entropy(logits, labels)
    if bn_weight and len(pupil.stats) and pupil.step:
        loss = loss + bn_weight * losses.statistics_norms(found, pupil.stats, lesson.network.stats_layout.sizes)
    return loss


def _in_turn(study: Study) -> Tensor:
    return (torch.arange(study.batch.new) % len(study.card.classes)).to(study.device)


def deep_inversion(cfg: DeepInversionConfig, study: Study) -> Tensor:
    """[Yin2020] pixels [n c h w] in [0, 1], from uniform noise: CE + R_BN + total variation."""
    labels, shape = _in_turn(study), study.card.image.shape
    x = torch.rand(len(labels), *shape, generator=study.rng).to(study.device)
    adam = optim.Adam.zeros(x)
    for _ in range(cfg.iterations):
        leaf = x.detach().requires_grad_()
        loss = _fit(study, leaf, labels, 1.0, cfg.bn_weight) + cfg.tv_weight * losses.total_variation(leaf)
        x, adam = optim.adam_step(x, torch.autograd.grad(loss, leaf)[0], adam, lr=cfg.inversion_lr)
        x = x.clamp(0, 1)
    return x


def contrast(features: Tensor, others: Tensor, temperature: float) -> Tensor:
    """[Fang2021] contrastive term (scalar): features [2n f] of two views of n images, against those `others` [m f].

    Each feature should be nearest to that of the other view, among the 2n - 2 of other images and the m of kept ones.
    """
    f, n = F.normalize(features, dim=1), len(features) // 2
    scores = torch.cat([f @ f.T, f @ F.normalize(others, dim=1).T], 1) / temperature
    itself = torch.eye(2 * n, scores.shape[1], dtype=torch.bool, device=f.device)
    partner = torch.arange(2 * n, device=f.device).roll(n)
    return F.cross_entropy(scores.masked_fill(itself, float("-inf")), partner)


def cmi(cfg: CmiConfig, study: Study) -> Tensor:
    """[Fang2021] pixels [n c h w] in [0, 1] of a generator and codes that are optimised together from fresh ones."""
    labels, lesson, pupil = _in_turn(study), study.lesson, study.lesson.pupil
    net_g = generator(study.card.image.shape, cfg.latent, cfg.width)
    theta = net_g.reset(study.rng).to(study.device)
    z = torch.randn(len(labels), cfg.latent, generator=study.rng).to(study.device)
    flat, cut = torch.cat([theta, z.flatten()]), len(theta)
    adam, kept = optim.Adam.zeros(flat), _kept(cfg, study)

    def features(images: Tensor) -> Tensor:
        return lesson.network.features(pupil.theta, lesson.normalised(images), pupil.stats, first_order=True)

    def images_of(parameters: Tensor) -> Tensor:
        return net_g(parameters[:cut], parameters[cut:].view(z.shape), first_order=True)

    for _ in range(cfg.iterations):
        leaf = flat.detach().requires_grad_()
        images = images_of(leaf)
        loss = _fit(study, images, labels, cfg.ce, cfg.bn_weight)
        both = torch.cat([features(_views(study, images)), features(_views(study, images))])
        loss = loss + cfg.contrast * contrast(both, features(kept).detach(), cfg.temperature)
        flat, adam = optim.adam_step(flat, torch.autograd.grad(loss, leaf)[0], adam, lr=cfg.inversion_lr)
    with torch.no_grad():
        return images_of(flat)


def _kept(cfg: CmiConfig, study: Study) -> Tensor:
    """Pixels of up to `negatives` images that were kept, drawn without replacement."""
    rows = torch.randperm(len(study.images), generator=study.rng)[: cfg.negatives]
    return to_pixels(study.images[rows.numpy()], study.device)


def inverted(make: Callable[[Any, Study], Tensor]) -> Work:
    """The work of a round, whose images are those of `make`."""

    def work(cfg: InversionConfig, study: Study) -> Metrics:
        """Invert a batch, ask about it, keep it, and train the student on all images so far."""
        study.lesson.average = cfg.average
        images = to_bytes(make(cfg, study))
        study.keep(images, study.ask(images))
        return {"student/loss": lessons.mean(lessons.replay(cfg, study)), "generator/loss": None}

    return work


KEPT: dict[str, Any] = {"batch": 250, "iterations": 200, "replays": 12.8, "crop_pad": 2}
"""Inversions, and 50 steps of the student on batches of 64 for each 250 of them."""

DEEPINVERSION = method_of(DeepInversionConfig, inverted(deep_inversion), KEPT | {"bn_weight": 10.0, "tv_weight": 1e-3})
CMI = method_of(CmiConfig, inverted(cmi), KEPT | {"width": 64})
