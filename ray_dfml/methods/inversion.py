"""What all inversions by a generator share: how a teacher sees generated images, and the inversion loss.

[Wei2024] FREE, arXiv 2405.00984, Eq. 1. [Hu2023b] BiDf-MKD, arXiv 2305.18413 (the same loss, with the task model in the
boundary term).

The generator makes images of the learner's size in [0, 1]. A teacher of another size sees them resized. A teacher of
grey images sees their mean channel, and the images are then stored in grey.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ray_dfml.core import episodes, losses
from ray_dfml.core.generators import Generator, generator
from ray_dfml.core.images import draw_view, fit, normalise, to_bytes, to_pixels, view
from ray_dfml.core.net import net
from ray_dfml.core.seeds import derive, rng
from ray_dfml.errors import UsageError
from ray_dfml.methods.base import MethodConfig, World, stacked
from ray_dfml.types import Arrays, ImageSpec, Teacher, TeacherCard

BETAS = (0.5, 0.999)

Judge = Callable[[Tensor], Tensor]
"""The other party of the disagreement term: pixels [b n c h w] -> logits [b n q]. It is the learner, or one task model
per teacher."""


class InversionConfig(MethodConfig):
    """Settings of the generator and of the inversion loss."""

    images_per_class: int = Field(default=20, ge=2, description="Images recovered per class of a teacher.")
    latent: int = Field(default=256, ge=1, description="d_z: length of a latent code.")
    width: int = Field(default=64, ge=4, description="Channels of the generator's last hidden layer.")
    adversarial: float = Field(default=1.0, ge=0, description="Weight of the disagreement term of Eq. 1.")
    adversarial_form: Literal["kl", "probdot"] = Field(
        default="kl", description="Form of the disagreement term: KL, or the released code's product form."
    )
    kl_clamp: float = Field(default=10.0, gt=0, description="Bound on one image's KL in the disagreement term, nats.")
    bn_weight: float = Field(
        default=0.0, ge=0, description="Weight of the teacher's batch-norm statistics in the inversion loss."
    )
    tv_weight: float = Field(default=0.0, ge=0, description="Weight of the total variation in the inversion loss.")
    crop_pad: int = Field(
        default=4, ge=0, description="Padding of the random crop between generator and teacher, pixels."
    )
    crop_fill: Literal["edge", "zero"] = Field(
        "edge",
        description="What the padding holds: the repeated border, or black as in the released code.",
    )
    flip: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Random mirror: auto mirrors colour images only, since a mirrored character is another one.",
    )


def check_classes(method: str, world: World) -> None:
    """Raise UsageError for a teacher with fewer classes than the learner, as it could teach only some outputs."""
    few = [card for card in world.cards if len(card.classes) < world.way]
    if few:
        raise UsageError(
            f"{method}: {few[0].id} has {len(few[0].classes)} classes, the learner {world.way}; lower learner.way"
        )


def checked_generator(method: str, cfg: InversionConfig, world: World, classes: int = 0) -> Generator:
    """The generator of images of the learner's size. Raises UsageError for a size that it cannot make.

    `classes` is the number of classes that it is told a label of.
    """
    try:
        return generator(world.image.shape, cfg.latent, cfg.width, classes)
    except ValueError as error:
        raise UsageError(f"{method}: {error}; use teachers of another input size") from None


def dropped_statistics(cards: Sequence[TeacherCard], weight: float) -> list[str]:
    """A line that names the teachers for which the batch-norm term is left out, if there are any."""
    without = [card.id for card in cards if weight and card.access == "weights" and not has_statistics(card)]
    if not without:
        return []
    names = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
    return [f"the batch-norm statistics term is dropped for {names}: no batch norm in the network"]


def has_statistics(card: TeacherCard) -> bool:
    """Whether a teacher's network keeps batch-norm statistics."""
    return net(card.arch, card.image.shape, len(card.classes)).stats_layout.numel > 0


def chosen_units(card: TeacherCard, way: int, seed: int) -> list[int]:
    """The output units of a teacher that a task is made of: all, or `way` of them, drawn at random.

    The draw is from a stream of the job's seed that nothing else uses.
    """
    if len(card.classes) == way:
        return list(range(way))
    return torch.randperm(len(card.classes), generator=rng(seed, "units"))[:way].tolist()


def as_teacher_sees(pixels: Tensor, image: ImageSpec) -> Tensor:
    """Normalised input [n c' h' w'] of a teacher from pixels [n c h w] in [0, 1] of any size."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (image.mean, image.std))
    return normalise(fit(pixels, image.shape), mean, std)


class Inversion:
    """The inversion loss of images for b teachers of one architecture and input, and how the teachers see the images.

    With `batched` the b networks run through `vmap`, else one after another; teachers do not affect each other. The
    seeds alone choose the output units; together with `stream` they seed all other draws. So two inversions with the
    same seeds and different streams have the same units and different images.
    """

    def __init__(
        self, cfg: InversionConfig, net_g: Generator, teachers: Sequence[Teacher], way: int, seeds: Sequence[int],
        *, device: torch.device, batched: bool, stream: str = "",
    ) -> None:  # fmt: skip
        card = teachers[0].card
        self.cfg, self.net_g, self.teachers, self.device, self.batched = cfg, net_g, teachers, device, batched
        self.network, self.image, self.way = teachers[0].net, card.image, way
        self.labels = episodes.interleaved(way, cfg.images_per_class).to(device)
        self.units = [
            torch.tensor(chosen_units(t.card, way, seed), device=device)
            for t, seed in zip(teachers, seeds, strict=True)
        ]
        names = [derive(seed, stream) for seed in seeds] if stream else seeds
        self.rngs = [torch.Generator().manual_seed(name) for name in names]
        self.theta, self.stats = (torch.stack([getattr(t, name) for t in teachers]) for name in ("theta", "stats"))
        self._mean, self._std = (
            torch.tensor([getattr(t.card.image, name) for t in teachers], device=device)[:, None]
            for name in ("mean", "std")
        )
        self._mirror = cfg.flip == "on" or (cfg.flip == "auto" and card.image.channels == 3)

    def codes(self) -> Tensor:
        """Latent codes Z ~ N(0, 1) [b n d], drawn from each teacher's own stream."""
        shape = (len(self.labels), self.cfg.latent)
        return torch.stack([torch.randn(shape, generator=rng) for rng in self.rngs]).to(self.device)

    def each(self, function: Callable[..., Any], *parts: Tensor) -> Any:
        """Apply the call of a network, `function`, to every row of stacked tensors. One backward pass may follow."""
        return stacked(partial(function, first_order=not self.batched), *parts, batched=self.batched)

    def generate(self, theta_g: Tensor, z: Tensor) -> Tensor:
        """Images [b n c h w] in [0, 1] of generator weights [b p] and codes [b n d]; grey for grey teachers."""
        if self.net_g.classes:
            wanted = F.one_hot(self.labels, self.net_g.classes).to(z.dtype).expand(len(z), -1, -1)
            z = torch.cat([z, wanted], -1)
        images = self.each(self.net_g, theta_g, z)
        return self._resized(images, (self.image.channels, *images.shape[-2:]), back=images.shape[2])

    def _resized(self, images: Tensor, shape: tuple[int, int, int], back: int | None = None) -> Tensor:
        if images.shape[2:] == shape:
            return images
        flat = fit(images.flatten(0, 1), shape)
        return (flat if back is None else fit(flat, (back, *shape[1:]))).unflatten(0, images.shape[:2])

    def look(self, images: Tensor) -> Tensor:
        """One new random view [b n c h w] of each teacher's images."""
        return torch.stack([self._view(one, self._offsets(j)) for j, one in enumerate(images)])

    def _offsets(self, j: int) -> tuple[int, int, bool]:
        return draw_view(self.rngs[j], pad=self.cfg.crop_pad, flip=self._mirror)

    def _view(self, images: Tensor, offsets: tuple[int, int, bool]) -> Tensor:
        return view(images, offsets, pad=self.cfg.crop_pad, fill=self.cfg.crop_fill)

    def losses(self, theta_g: Tensor, z: Tensor, judge: Judge | None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [b] in nats, images [b n c h w] and the teachers' logits [b n q].

        They follow from generator weights [b p] and codes [b n d]. `judge` is the other party of the disagreement term;
        None leaves the term out.
        """
        cfg = self.cfg
        images = self.generate(theta_g, z)
        pixels = self.look(images)
        seen = normalise(self._resized(pixels, self.image.shape), self._mean, self._std)
        students = None
        if judge is not None:
            with torch.no_grad():
                students = judge(pixels)
        found = None
        if cfg.bn_weight and self.stats.shape[1]:
            logits, found = self.each(self.network.with_stats, self.theta, seen, self.stats)
        else:
            logits = self.each(self.network, self.theta, seen, self.stats)
        total = []
        for j, units in enumerate(self.units):
            loss = losses.inversion(
                logits[j], units[self.labels], None if students is None else students[j], units=units,
                adversarial=cfg.adversarial, form=cfg.adversarial_form, clamp=cfg.kl_clamp,
            )  # fmt: skip
            if found is not None:
                loss = loss + cfg.bn_weight * losses.batch_norm_distance(found[j], self.stats[j])
            if cfg.tv_weight:
                loss = loss + cfg.tv_weight * losses.total_variation(images[j])
            total.append(loss)
        return torch.stack(total), images, logits

    def task(self, j: int, images: Tensor, logits: Tensor) -> Arrays:
        """The recovered task of teacher j, from its images [n c h w].

        It holds the images as bytes, labels, class names, and a view with the teacher's logits on it. `logits` [n q]
        are those that the loss was computed on; the figures `ce` (nats) and `accuracy` (percent) follow from them.
        """
        teacher, units = self.teachers[j], self.units[j]
        stored, offsets = to_bytes(images), self._offsets(j)
        with torch.no_grad():
            seen = as_teacher_sees(self._view(to_pixels(stored, self.device), offsets), teacher.card.image)
            soft = self.network(teacher.theta, seen, teacher.stats, first_order=True)[:, units]
        wished = units[self.labels]
        return {
            "teacher": teacher.card.id,
            "classes": [teacher.card.classes[u] for u in units.tolist()],
            "images": stored,
            "labels": self.labels.cpu().numpy(),
            "view": offsets,
            "logits": soft.cpu().numpy(),
            "ce": float(F.cross_entropy(logits, wished)),
            "accuracy": 100.0 * float((logits.argmax(-1) == wished).float().mean()),
            "spread": spread(images, self.way),
        }


def spread(images: Tensor, way: int) -> float:
    """Root-mean-square pixel distance of two images of a class, averaged over pairs and classes.

    The classes of `images` take turns. The spread is 0 if the generator has collapsed.
    """
    flat = images.flatten(1)
    distances = torch.stack([torch.pdist(flat[c::way]).mean() for c in range(way)])
    return float(distances.mean() / flat.shape[1] ** 0.5)
