"""Tasks of images that nobody recovered: a teacher with weights labels images of sources itself.

No paper has this. FREE and BiDf-MKD invert a teacher to images of its classes. The same tasks can be made of images of
a source (`core.sources`), of which several times as many are drawn as the task needs. The teacher is asked about all of
them, and of each class those stay that fit best. These have the lowest inversion loss, which of an image x with the
class y of the task that the teacher finds likeliest is

    -log p(y | x) - adversarial 1[teacher and judge agree] disagreement(x).

Without a judge they are the most confident ones. Their answers are what the learner distils.

[Wei2024] FREE, arXiv 2405.00984, Eq. 1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ray_dfml.core import losses, seeds
from ray_dfml.core.images import fit, to_bytes, to_pixels
from ray_dfml.core.sources import SOURCES
from ray_dfml.core.steady import steady_logits
from ray_dfml.errors import RejectedError, UsageError, check_sources
from ray_dfml.methods import cost
from ray_dfml.methods.base import World
from ray_dfml.methods.inversion import InversionConfig, Judge, check_classes, checked_generator, chosen_units
from ray_dfml.methods.surrogates.config import SurrogateConfig
from ray_dfml.types import Arrays, Service, Shard, TeacherCard

GENERATOR = "generator"
IMAGES = (GENERATOR, *(name for name, source in SOURCES.items() if not source.parents))
"""What tasks may be made of: images of a generator, which an inversion trains, or image sources."""

CANDIDATES = 8
"""Images of the sources that a teacher with weights labels for each image of a task."""


class RecoveryConfig(InversionConfig):
    """Settings of what the tasks of a teacher are made of."""

    images: tuple[str, ...] = Field(
        default=(GENERATOR,),
        min_length=1,
        description="What a task is made of: inversions by the generator, image sources in equal parts, or, if both "
        f"are named, these two in turn: {', '.join(IMAGES)}.",
    )
    surrogate: SurrogateConfig = Field(
        default=SurrogateConfig(),
        description="How services are distilled before the inversion; with a budget of 0 there are no surrogates.",
    )

    @property
    def total_rounds(self) -> int:
        """The rounds that distil services, and `rounds`."""
        return self.rounds + self.surrogate.rounds

    @property
    def sources(self) -> tuple[str, ...]:
        """The image sources among `images`."""
        return tuple(name for name in self.images if name != GENERATOR)

    def inverts(self, place: int) -> bool:
        """Whether a visit at a place of a sequence of visits is an inversion. The two kinds take turns if both are
        wanted, and inversions begin."""
        return GENERATOR in self.images and (not self.sources or place % 2 == 0)

    @field_validator("images")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_sources(names, IMAGES, "images")
        return names

    @model_validator(mode="after")
    def _one_way_to_ask(self) -> "RecoveryConfig":
        if self.surrogate.budget and self.images != (GENERATOR,):
            raise ValueError(
                "images: with surrogate.budget the generator inverts surrogates; leave images at generator, and name "
                "the sources of the surrogates in surrogate.images"
            )
        return self


def check(method: str, cfg: RecoveryConfig, world: World, classes: int = 0) -> None:
    """Raise UsageError for teachers with too few classes, and for an input of a size that cannot be made.

    `classes` is the number of classes that a generator is told a label of.
    """
    check_classes(method, world)
    if GENERATOR in cfg.images:
        checked_generator(method, cfg, world, classes)
    if cfg.sources and min(world.image.shape[1:]) < 8:
        raise UsageError(f"{method}: image sources need a height and a width of at least 8")


def notes(cfg: RecoveryConfig, cards: Sequence[TeacherCard]) -> list[str]:
    """Lines that say what the images of sources assume about the data that teachers with weights label."""
    if not any(card.access == "weights" for card in cards):
        return []
    return [f"teachers label images of {name}, which assumes {SOURCES[name].assumption}" for name in cfg.sources]


def set_queries(cfg: RecoveryConfig, way: int) -> int:
    """How many images a teacher with weights is asked about for a task."""
    return CANDIDATES * cfg.images_per_class * way


def drawn(
    names: Sequence[str], rng: torch.Generator, count: int, shape: tuple[int, int, int], channels: int
) -> Tensor:  # fmt: skip
    """Images of the sources [count c h w] in equal parts; the first sources make those left over.

    `channels` are those of the teacher: for a teacher of grey images all channels are equal.
    """
    share, left = divmod(count, len(names))
    parts = [SOURCES[name].function(rng, share + (i < left), (channels, *shape[1:])) for i, name in enumerate(names)]
    return fit(torch.cat(parts), shape)


def labelled(
    cfg: RecoveryConfig, service: Service, shape: tuple[int, int, int], way: int, seed: int, *, device: torch.device,
    stream: str = "", judge: Judge | None = None,
) -> Arrays:  # fmt: skip
    """A task of images of the sources that a teacher with weights labels, as `inversion.Inversion.task` makes them.

    There are `images_per_class` images of each class at most, and fewer of a class that the teacher seldom sees.
    `seed` chooses the output units of the teacher; with `stream` it seeds the images. The logits are those of the
    images that were asked about, so that the view changes nothing. `confidence` is the mean probability of the label
    among all classes of the teacher, and `filled` the share of the wished images that were found, in percent. Raises
    RejectedError for a teacher that answers NaN.
    """
    card, count = service.card, set_queries(cfg, way)
    units = torch.tensor(chosen_units(card, way, seed))
    rng = torch.Generator().manual_seed(seeds.derive(seed, stream, "sources"))
    stored = to_bytes(drawn(cfg.sources, rng, count, shape, card.image.channels))
    pixels = to_pixels(stored)
    logits = torch.tensor(service.query(to_bytes(fit(pixels, card.image.shape))))
    if not logits.isfinite().all():
        raise RejectedError(f"{card.id}: answers NaN or infinite numbers")
    known = logits[:, units]
    labels = known.argmax(1)
    loss = ce = -logits.log_softmax(1).gather(1, units[labels, None])[:, 0]
    if judge is not None:
        with torch.no_grad():
            ours = judge(pixels.to(device)[None])[0].cpu()
        apart = losses.disagreements(known, ours, form=cfg.adversarial_form, clamp=cfg.kl_clamp)
        loss = ce - cfg.adversarial * (ours.argmax(1) == labels) * apart
    labels = labels.numpy()
    rows = best(loss.numpy(), labels, way, cfg.images_per_class)
    return {
        "kind": "asked",
        "teacher": card.id,
        "classes": [card.classes[unit] for unit in units.tolist()],
        "images": stored[rows],
        "labels": labels[rows],
        "view": (cfg.crop_pad, cfg.crop_pad, False),
        "logits": known.numpy()[rows],
        "confidence": 100.0 * float((-ce[rows]).exp().mean()),
        "filled": 100.0 * len(rows) / (way * cfg.images_per_class),
    }


def best(loss: np.ndarray, labels: np.ndarray, way: int, most: int) -> np.ndarray:
    """The places of the `most` images of each class with the lowest `loss` [n]; `labels` [n] are 0..way-1."""
    order = loss.argsort(kind="stable")
    return np.concatenate([order[labels[order] == local][:most] for local in range(way)])


def seconds(cfg: RecoveryConfig, world: World, shard: Shard, card: TeacherCard, sets: int) -> float:
    """How long a shard takes to draw the images of `sets` tasks and to compute the answers of a teacher to them."""
    teacher, count = shard.teacher(card.id), sets * set_queries(cfg, world.way)

    def visit() -> None:
        images = drawn(cfg.sources, torch.Generator().manual_seed(0), count, world.image.shape, card.image.channels)
        mean, std = (torch.tensor(values) for values in (card.image.mean, card.image.std))
        steady_logits(teacher.net, teacher.theta, teacher.stats, to_bytes(fit(images, card.image.shape)), mean, std)

    return cost.seconds(visit)
