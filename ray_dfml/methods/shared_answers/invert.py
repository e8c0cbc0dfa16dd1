"""Images that teachers with weights are inverted to. They join those of the sources, and all teachers answer them.

An inversion begins at images of the sources, and Adam moves the logits of their pixels down the loss

    cross-entropy to the wished classes + bn_weight R_BN + tv_weight TV

of a random view of them: cropped after padding, and mirrored if it is in colour. R_BN is the distance of the
batch-norm statistics of the view to those that the teacher stores (`losses.statistics_norms`), and TV the total
variation of the whole images (`losses.total_variation`). [Yin2020] DeepInversion, arXiv 1912.08795, Eq. 3-5; its
images begin at noise.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import episodes, losses, optim, seeds
from ray_dfml.core.images import draw_view, fit, normalise, to_bytes, to_pixels, view
from ray_dfml.methods import cost, recovery
from ray_dfml.methods.base import World, stacked
from ray_dfml.methods.inversion import chosen_units
from ray_dfml.methods.shared_answers.config import Config
from ray_dfml.methods.shared_answers.images import drawn
from ray_dfml.types import Arrays, Job, Shard, Teacher, TeacherCard

NEAREST = 0.02
"""How near to 0 and 1 the pixels begin; at 0 and 1 themselves their logits are not finite."""


def is_inverted(cfg: Config, card: TeacherCard) -> bool:
    """Whether a training inverts a teacher: it gives its weights, and `images_per_class` is set."""
    return cfg.inversion.images_per_class > 0 and card.access == "weights"


def is_due(cfg: Config, world: World, card: TeacherCard, r: int) -> bool:
    """Whether a teacher is inverted in round `r`.

    Each one with weights is inverted once. Its round follows from the run's seed and its id alone, so that a teacher
    that is away moves no other; it is not the last round that asks, after which nobody would be asked about the images.
    """
    return is_inverted(cfg, card) and r == seeds.derive(world.seed, "invert", card.id) % (len(cfg.batches) - 1)


def count(cfg: Config, world: World) -> int:
    """How many images the inversions of a whole training make."""
    classes = sum(min(world.way, len(card.classes)) for card in world.cards if is_inverted(cfg, card))
    return classes * cfg.inversion.images_per_class


def seconds(cfg: Config, world: World, shard: Shard, steps: int) -> float:
    """How long all inversions take on a shard, after a few steps of one of them."""
    some = replace(world, cards=tuple(card for card in world.cards if is_inverted(cfg, card)))
    few = cfg.model_copy(update={"inversion": cfg.inversion.model_copy(update={"steps": steps})})

    def seconds_of(card: TeacherCard) -> float:
        return cost.seconds(lambda: invert(few, world.way, shard, [Job(index=0, seed=0, teacher=card.id, values={})]))

    return len(some.cards) * cost.of_mean_teacher(some, seconds_of) * cfg.inversion.steps / steps


def invert(cfg: Config, way: int, shard: Shard, jobs: Sequence[Job]) -> list[Arrays]:
    """One task of the teacher of each job: `images_per_class` images of each of `way` of its classes, or of all q if
    there are fewer.

    A result holds `teacher`, the names of the `classes`, `images` uint8 [n c h w] of the teacher's size, and `labels`
    [n], the places of their classes. Of the last step it has the teacher's `logits` [n way] for these classes, and the
    `loss` in nats. It is `{"rejected": reason}` if the teacher cannot be read or its loss is not finite.
    """
    return recovery.recover(shard, jobs, partial(_batch, cfg, way, shard.device))


def _batch(
    cfg: Config, way: int, device: torch.device, jobs: Sequence[Job], teachers: Sequence[Teacher], batched: bool
) -> list[Arrays | None]:
    own, network, card = cfg.inversion, teachers[0].net, teachers[0].card
    way = min(way, len(card.classes))
    labels = episodes.interleaved(way, own.images_per_class)
    units = [torch.tensor(chosen_units(t.card, way, job.seed)) for t, job in zip(teachers, jobs, strict=True)]
    wished = [chosen[labels].to(device) for chosen in units]
    theta, stats = (torch.stack([getattr(t, name) for t in teachers]) for name in ("theta", "stats"))
    specs = [t.card.image for t in teachers]
    means, stds = (
        torch.tensor([getattr(spec, name) for spec in specs], device=device)[:, None] for name in ("mean", "std")
    )
    rngs = [torch.Generator().manual_seed(job.seed) for job in jobs]
    x = torch.stack([_first(cfg, card, len(labels), rng) for rng in rngs]).to(device).logit()
    adam = optim.Adam.zeros(x)
    loss = logits = torch.zeros(len(jobs))
    for _ in range(own.steps):
        leaf = x.detach().requires_grad_()
        pixels = leaf.sigmoid()
        looks = [draw_view(rng, pad=own.crop_pad, flip=card.image.channels > 1) for rng in rngs]
        seen = torch.stack([view(one, look, pad=own.crop_pad, fill="edge")
                            for one, look in zip(pixels, looks, strict=True)])  # fmt: skip
        call = partial(network.with_stats, first_order=not batched)
        logits, found = stacked(call, theta, normalise(seen, means, stds), stats, batched=batched)
        loss = torch.stack([
            F.cross_entropy(logits[j], wished[j]) + own.tv_weight * losses.total_variation(pixels[j])
            for j in range(len(jobs))
        ])  # fmt: skip
        if own.bn_weight and stats.shape[1]:
            sizes = network.stats_layout.sizes
            gaps = [losses.statistics_norms(*pair, sizes) for pair in zip(found, stats, strict=True)]
            loss = loss + own.bn_weight * torch.stack(gaps)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        x, adam = optim.adam_step(x, grad, adam, lr=own.lr)
    return [
        _task(teachers[j].card, x[j], labels, units[j], logits[j], float(loss[j].detach()))
        if torch.isfinite(loss[j]) and torch.isfinite(x[j]).all() else None
        for j in range(len(jobs))
    ]  # fmt: skip


def _first(cfg: Config, card: TeacherCard, count: int, rng: torch.Generator) -> Tensor:
    """Pixels [n c h w] of the teacher's size, of the sources."""
    zooms = (cfg.zoom_low, cfg.zoom_high)
    images = drawn(cfg.parts, count, card.image.shape, rng, zooms=zooms, invert=cfg.invert)
    mixed = images[torch.randperm(count, generator=rng).numpy()]
    return to_pixels(mixed).clamp(NEAREST, 1 - NEAREST)


def _task(card: TeacherCard, x: Tensor, labels: Tensor, units: Tensor, logits: Tensor, loss: float) -> Arrays:
    return {
        "teacher": card.id,
        "classes": tuple(card.classes[unit] for unit in units.tolist()),
        "images": to_bytes(x.sigmoid()),
        "labels": labels.numpy(),
        "logits": logits.detach()[:, units.to(logits.device)].cpu().numpy(),
        "loss": loss,
    }


def as_asked(world: World, tasks: Sequence[Arrays]) -> np.ndarray:
    """The images of one or more tasks, uint8 [n c h w] of the learner's size."""
    return np.concatenate([to_bytes(fit(to_pixels(task["images"]), world.image.shape)) for task in tasks])


def accuracy(task: Arrays) -> float:
    """The share of a task's images, in percent, that have the wished class, among the classes of the task."""
    return 100.0 * float((task["logits"].argmax(1) == task["labels"]).mean())
