"""Stage 1 of IDEAL: a generator is trained on the student alone, and makes images that the teacher has not seen.

[Zhang2023] IDEAL, ICLR 2023, section 3.2. The loss of generator weights theta_G is, with images x = G(z), wished labels
y, the frozen student S of C classes and its probabilities p_jc on image j,

    ce CE(S(x), y) + lam L,    L = (1/C) sum_c q_c log q_c,    q_c = mean_j p_jc.

L is lowest, -(log C)/C, if the batch has as much of every class. The released code takes the mean of p log p over all
images and classes instead, which makes each image doubtful and does not balance the batch; that is `sample`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import optim
from ray_dfml.core.generators import Generator, generator
from ray_dfml.core.images import draw_view, view
from ray_dfml.methods.students.config import GeneratorConfig
from ray_dfml.methods.students.loop import Study

FLOOR = 1e-8
"""Probabilities below this one count as it in the logarithm, so that 0 log 0 is 0."""


def information(logits: Tensor, form: Literal["batch", "sample"]) -> Tensor:
    """The information term L (scalar, in nats, between -(log C)/C and 0) of a batch's logits [n C]."""
    p = logits.softmax(-1)
    p = p.mean(0) if form == "batch" else p
    return (p * p.clamp_min(FLOOR).log()).mean()


def wished(cfg: GeneratorConfig, count: int, classes: int, rng: torch.Generator) -> Tensor:
    """Wished labels [n]: drawn uniformly, or with fixed codes all classes in turn, as the released code has them."""
    if cfg.code == "fixed":
        return torch.arange(count) % classes
    return torch.randint(0, classes, (count,), generator=rng)


class Stage:
    """The generator of one round of one student. `images` may be called several times."""

    def __init__(self, cfg: GeneratorConfig, study: Study, *, crop_pad: int = 0, flip: bool = False) -> None:
        self._cfg, self._study, self._pad, self._flip = cfg, study, crop_pad, flip
        self._net: Generator = generator(study.card.image.shape, cfg.latent, cfg.width, kind=cfg.generator)

    def images(self, count: int) -> Tensor:
        """Pixels [n c h w] in [0, 1], in batches of at most `batch`, each from a generator trained for it."""
        size = self._cfg.batch
        parts = [self._batch(min(size, count - start)) for start in range(0, count, size)]
        return torch.cat(parts)[:count]

    def _batch(self, count: int) -> Tensor:
        cfg, study, size = self._cfg, self._study, max(count, 2)
        theta = study.own.get("theta_g")
        fresh = theta is None or cfg.reset
        theta = (self._net.reset(study.rng) if fresh else torch.tensor(theta)).to(study.device)
        adam = optim.Adam.zeros(theta)
        z, labels = self._draw(size)
        lowest, best = float("inf"), None
        for i in range(cfg.generator_steps):
            if i and cfg.code == "fresh":
                z, labels = self._draw(size)
            leaf = theta.detach().requires_grad_()
            images = self._net(leaf, z, first_order=True)
            loss = self._loss(images, labels)
            (grad,) = torch.autograd.grad(loss, leaf)
            if cfg.code == "fixed" and float(loss.detach()) < lowest:
                lowest, best = float(loss.detach()), images.detach()
            theta, adam = optim.adam_step(theta, grad, adam, lr=cfg.generator_lr)
        if not cfg.reset:
            study.own["theta_g"] = theta.cpu().numpy()
        if best is None:
            with torch.no_grad():
                best = self._net(theta, self._draw(size)[0], first_order=True)
        return best[:count]

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        rng, device = self._study.rng, self._study.device
        z = torch.randn(count, self._cfg.latent, generator=rng)
        return z.to(device), wished(self._cfg, count, len(self._study.card.classes), rng).to(device)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss (scalar). The student is frozen and normalises with its running statistics."""
        cfg, lesson = self._cfg, self._study.lesson
        if self._pad or self._flip:
            images = view(
                images, draw_view(self._study.rng, pad=self._pad, flip=self._flip), pad=self._pad, fill="zero"
            )
        pupil = lesson.pupil
        logits = lesson.network(pupil.theta, lesson.normalised(images), pupil.stats, first_order=True)
        loss = cfg.ce * F.cross_entropy(logits, labels)
        return loss + cfg.lam * information(logits, cfg.information) if cfg.lam else loss
