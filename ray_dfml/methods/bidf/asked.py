"""Recovery from teachers that are only asked ([Hu2023b] zero-order gradients), or images of sources in its place, and
what they answer to sets that were recovered from their surrogates.

A set of images costs queries. With the generator every pass asks about 1 + q images for each image of the set (central
differences: 1 + 2 q), and the finished set is asked about once. With image sources only the finished set is asked
about, so an image costs one query.

The loss of an image is the cross-entropy of the answer to the wished label, less the disagreement of answer and task
model where they agreed at the centre. The task model is ours and is asked at every displaced image for nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import episodes, losses, optim, seeds, zero_order
from ray_dfml.core.generators import Generator
from ray_dfml.core.images import draw_view, fit, to_bytes, to_pixels, view
from ray_dfml.core.sources import SOURCES
from ray_dfml.errors import first_of
from ray_dfml.methods.bidf.config import Config
from ray_dfml.methods.inversion import BETAS, Judge, chosen_units, spread
from ray_dfml.methods.sourced import GENERATOR, drawn
from ray_dfml.methods.students.training import labels_of, learnable
from ray_dfml.types import Arrays, ImageSpec, Service, TeacherCard

FLOOR = 1e-4
"""The least probability that an answer of probabilities is taken to give a class, since rounded ones may be 0, and what
a label is taken to leave to all classes together."""

CANDIDATES = 4
"""Images of a source that the task model looks at for each image of a query set."""


def mu(cfg: Config, image: ImageSpec) -> float:
    """The length of a displacement in the pixels of a teacher's input."""
    return zero_order.least_mu(math.prod(image.shape)) if cfg.zero_order.mu is None else cfg.zero_order.mu


def set_queries(cfg: Config, way: int, inverts: bool) -> int:
    """The queries that one recovered set of a service costs: one an image if a surrogate is inverted, or if nothing is.

    `inverts` says whether the set is of the generator.
    """
    images = cfg.images_per_class * way
    if cfg.surrogate.budget or not inverts:
        return images
    each = zero_order.queries(images, cfg.zero_order.directions, central=cfg.zero_order.central)
    return images + cfg.iterations * each


def logits_of(answers: np.ndarray, card: TeacherCard) -> Tensor:
    """Logits [n q] that stand for the answers of a service.

    Logits are themselves, and probabilities their logarithms. A label is taken for a probability of almost 1.
    """
    if card.access == "label":
        known = len(card.classes)
        sure = F.one_hot(torch.tensor(answers), known).float()
        return (sure * (1 - FLOOR) + FLOOR / known).log()
    found = torch.tensor(answers)
    return found.clamp_min(FLOOR).log() if card.access == "probs" else found


def answered(cfg: Config, service: Service, task: Arrays) -> Arrays:
    """A set that was recovered from the surrogate of a service, with the answers of the service to its view.

    With `cfg.relabel` the answers also give the labels. `agreement` is the share of images whose answer, of all classes
    of the service, is the one that was wished for, in percent.
    """
    card = service.card
    units = np.array([card.classes.index(name) for name in task["classes"]])
    seen = fit(view(to_pixels(task["images"]), task["view"], pad=cfg.crop_pad, fill=cfg.crop_fill), card.image.shape)
    answers = learnable(service.query(to_bytes(seen)), card.access, cfg.surrogate.answers)
    given = replace(card, access="label" if answers.ndim == 1 else "probs")
    soft = logits_of(answers, given)[:, torch.tensor(units)]
    labels = soft.argmax(-1).numpy() if cfg.relabel else task["labels"]
    return task | {
        "logits": soft.numpy(),
        "labels": labels,
        "balance": _balance(labels, len(units)),
        "agreement": 100.0 * float((labels_of(answers) == units[task["labels"]]).mean()),
    }


def _balance(labels: np.ndarray, way: int) -> float:
    """The share of images, in percent, that an even distribution over the classes would keep."""
    shares = np.bincount(labels, minlength=way) / len(labels)
    return 100.0 * float(np.minimum(shares, 1 / way).sum())


class Asking:
    """One service as recovery meets it. `seed` chooses its output units; with `stream` it seeds all other draws."""

    def __init__(
        self, cfg: Config, service: Service, shape: tuple[int, int, int], way: int, seed: int, *, stream: str,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.cfg, self.service, self.shape, self.way, self.device = cfg, service, shape, way, device
        self.image = service.card.image
        self.labels = episodes.interleaved(way, cfg.images_per_class).to(device)
        self.units = torch.tensor(chosen_units(service.card, way, seed), device=device)
        self.rng = torch.Generator().manual_seed(seeds.derive(seed, stream))
        self._mirror = cfg.flip == "on" or (cfg.flip == "auto" and self.image.channels == 3)

    def _offsets(self) -> tuple[int, int, bool]:
        return draw_view(self.rng, pad=self.cfg.crop_pad, flip=self._mirror)

    def _view(self, images: Tensor, offsets: tuple[int, int, bool]) -> Tensor:
        return view(images, offsets, pad=self.cfg.crop_pad, fill=self.cfg.crop_fill)

    def in_its_colours(self, images: Tensor) -> Tensor:
        """Images [n c h w] of the learner's size; grey ones for a service that takes grey images."""
        channels, *size = self.shape
        return fit(fit(images, (self.image.channels, size[0], size[1])), (channels, size[0], size[1]))

    def answers(self, pixels: Tensor) -> Tensor:
        """Logits [n q] that stand for the answers to pixels [n c h w] of the service's own size."""
        asked = pixels.detach().float().clamp(0, 1).cpu().numpy()
        if self.cfg.zero_order.eight_bit:
            asked = (asked * 255).round().astype(np.uint8)
        return logits_of(self.service.query(np.ascontiguousarray(asked)), self.service.card).to(self.device)

    def slope(self, seen: Tensor, judge: Judge | None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [n] at images [n c h w] of the service's size, an estimate of their gradients, and logits [n q]."""
        cfg, wished = self.cfg, self.units[self.labels]
        centre: list[Tensor] = []  # the answers to `seen`, which are asked for first
        agree = torch.zeros(len(wished), device=self.device)

        def ask(probes: Tensor) -> Tensor:
            nonlocal agree
            answers = self.answers(probes.flatten(0, 1)).unflatten(0, probes.shape[:2])
            found = -answers.log_softmax(-1)[:, torch.arange(len(wished)), wished]
            if judge is not None:
                known = answers[..., self.units]
                with torch.no_grad():
                    ours = judge(fit(probes.flatten(0, 1), self.shape)[None])[0].unflatten(0, probes.shape[:2])
                if not centre:
                    agree = (known[0].argmax(-1) == ours[0].argmax(-1)).float()
                apart = losses.disagreements(known, ours, form=cfg.adversarial_form, clamp=cfg.kl_clamp)
                found = found - cfg.adversarial * agree * apart
            centre.append(answers[0])
            return found

        loss, slopes = zero_order.gradient(
            ask, seen, rng=self.rng, directions=cfg.zero_order.directions, mu=mu(cfg, self.image),
            central=cfg.zero_order.central, eight_bit=cfg.zero_order.eight_bit,
        )  # fmt: skip
        return loss, slopes, centre[0]

    def generated(self, net_g: Generator, judge: Judge | None) -> Arrays:
        """A task of images from a fresh generator, which Adam moves along the estimated gradients.

        The images of the pass with the lowest loss are kept. A pass whose loss is not finite moves nothing.
        """
        cfg = self.cfg
        theta_g = net_g.reset(self.rng).to(self.device)
        z = torch.randn((len(self.labels), cfg.latent), generator=self.rng).to(self.device)
        adam_g, adam_z = optim.Adam.zeros(theta_g), optim.Adam.zeros(z)
        first, best = math.nan, math.inf
        kept: tuple[Tensor, Tensor] | None = None
        for i in range(cfg.iterations):
            leaf_g, leaf_z = theta_g.detach().requires_grad_(), z.detach().requires_grad_()
            images = self.in_its_colours(net_g(leaf_g, self._told(net_g, leaf_z), first_order=True))
            seen = fit(self._view(images, self._offsets()), self.image.shape)
            found, slopes, logits = self.slope(seen.detach(), judge)
            objective = (seen * slopes).sum() / len(seen)
            loss = float(found.mean())
            if cfg.tv_weight:
                variation = cfg.tv_weight * losses.total_variation(images)
                objective, loss = objective + variation, loss + float(variation.detach())
            first = loss if math.isnan(first) else first
            if loss < best or kept is None:
                best, kept = loss, (images.detach(), logits)
            if i < cfg.iterations - 1 and math.isfinite(loss):
                grads = torch.autograd.grad(objective, (leaf_g, leaf_z))
                theta_g, adam_g = optim.adam_step(theta_g, grads[0], adam_g, lr=cfg.lr_generator, betas=BETAS)
                z, adam_z = optim.adam_step(z, grads[1], adam_z, lr=cfg.lr_generator, betas=BETAS)
        assert kept is not None
        wished = self.units[self.labels]
        return self._task(kept[0], None if cfg.relabel else self.labels) | {
            "loss_first": first,
            "loss_last": best,
            "ce": float(F.cross_entropy(kept[1], wished)),
            "accuracy": 100.0 * float((kept[1].argmax(-1) == wished).float().mean()),
            "spread": spread(kept[0], self.way),
        }

    def _told(self, net_g: Generator, z: Tensor) -> Tensor:
        return torch.cat([z, F.one_hot(self.labels, net_g.classes).to(z.dtype)], -1) if net_g.classes else z

    def from_sources(self, judge: Judge | None) -> Arrays:
        """A task of images of the sources, which bear the labels of the answers.

        With a task model they are, of `CANDIDATES` times as many, those on which it is least sure: the gap between its
        two best classes is smallest. The choice costs no query.
        """
        count = len(self.labels)
        images = self._drawn(count if judge is None else CANDIDATES * count)
        if judge is not None:
            with torch.no_grad():
                best = judge(images[None])[0].softmax(-1).topk(2, -1).values
            images = images[(best[:, 0] - best[:, 1]).argsort(stable=True)[:count]]
        return self._task(images, None) | {"kind": "asked"}

    def _drawn(self, count: int) -> Tensor:
        """Images of the sources [count c h w] of the learner's size."""
        return drawn(self.cfg.sources, self.rng, count, self.shape, self.image.channels).to(self.device)

    def _task(self, images: Tensor, labels: Tensor | None) -> Arrays:
        """The recovered task, as `inversion.Inversion.task` makes it. Its logits stand for answers to a view of the
        stored bytes; without labels the answers give them."""
        stored, offsets = to_bytes(images), self._offsets()
        soft = self.answers(fit(self._view(to_pixels(stored, self.device), offsets), self.image.shape))[:, self.units]
        card = self.service.card
        found = (soft.argmax(-1) if labels is None else labels).cpu().numpy()
        return {
            "teacher": card.id,
            "classes": [card.classes[u] for u in self.units.tolist()],
            "images": stored,
            "labels": found,
            "view": offsets,
            "logits": soft.cpu().numpy(),
            "balance": _balance(found, self.way),
        }


def notes(cfg: Config, cards: Sequence[TeacherCard]) -> list[str]:
    """Lines on teachers that are only asked: a mu that bytes cannot carry, labels, and what image sources assume."""
    asked = [card for card in cards if card.access != "weights"]
    if not asked:
        return []
    said = [
        f"services are asked about images of {name}, which assumes {SOURCES[name].assumption}" for name in cfg.sources
    ]
    if GENERATOR not in cfg.images:
        return said
    for size in sorted({math.prod(card.image.shape) for card in asked}):
        least = zero_order.least_mu(size)
        if cfg.zero_order.mu is not None and cfg.zero_order.mu < least:
            works = math.ceil(1000 * least) / 1000
            said.append(
                f"method.zero_order.mu={cfg.zero_order.mu:g} moves the pixels of {size}-pixel images by less than a "
                f"level of 8 bits: a service that takes bytes sees no change, and its gradient is 0; "
                f"method.zero_order.mu={works:g} works"
            )
    if labels := [card.id for card in asked if card.access == "label"]:
        said.append(
            f"{first_of(labels)}: labels seldom change with a small displacement, so most zero-order gradients are 0; "
            "method.images=dip asks about images of a source instead"
        )
    return said
