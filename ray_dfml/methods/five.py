"""FIVE: faster inversion via the meta-generator, for one teacher or for several of one architecture at once.

[Wei2024] FREE, arXiv 2405.00984, Algorithm 1, Eq. 1 and 2. First order: no graph through the k steps.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import losses, memory, optim
from ray_dfml.core.generators import Generator
from ray_dfml.core.images import draw_view, normalise, to_bytes, to_pixels, view
from ray_dfml.methods.base import Teacher
from ray_dfml.types import Arrays

if TYPE_CHECKING:
    from ray_dfml.methods.free import Config

Judge = Callable[[Tensor], Tensor]
"""The learner as the disagreement term sees it: pixels [n c h w] in [0, 1] to logits [n q]."""

BETAS = (0.5, 0.999)


def five(
    cfg: "Config",
    net_g: Generator,
    teachers: Sequence[Teacher],
    theta_g: Tensor,
    judge: Judge | None,
    seeds: Sequence[int],
    *,
    batched: bool,
) -> tuple[list[Arrays], Tensor]:
    """Recover one task from each of b teachers ([Wei2024] Algorithm 1, lines 4-7).

    From theta_g [b p] and Z ~ N(0, 1) [b n d], k Adam steps on both; then images, losses and the first-order
    meta-gradient at the adapted weights. `judge` is the learner of the disagreement term, None to leave it out. The
    slots do not touch each other: `batched` runs them through `vmap`, else they run one after another.

    Returns per teacher the recovered task as arrays (uint8 images [n c h w], labels, a view of them with the teacher's
    logits [n q], the meta-gradient [p], losses in nats), and the adapted theta_g [b p].
    """
    card, network, device = teachers[0].card, teachers[0].net, theta_g.device
    way = len(card.classes)
    labels = memory.interleaved(way, cfg.images_per_class).to(device)
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = torch.stack([torch.randn(len(labels), cfg.latent, generator=rng) for rng in rngs]).to(device)
    theta_t, stats_t = (torch.stack([getattr(t, name) for t in teachers]) for name in ("theta", "stats"))
    mean, std = (
        torch.tensor([getattr(t.card.image, name) for t in teachers], device=device)[:, None]
        for name in ("mean", "std")
    )
    mirror = cfg.flip == "on" or (cfg.flip == "auto" and card.image.channels == 3)

    def each(function: Callable[..., Any], *stacked: Tensor) -> Any:
        if batched:
            return torch.func.vmap(function)(*stacked)
        rows = [function(*parts) for parts in zip(*stacked, strict=True)]
        if isinstance(rows[0], tuple):
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return torch.stack(rows)

    def look(images: Tensor) -> Tensor:
        offsets = [draw_view(rng, pad=cfg.crop_pad, flip=mirror) for rng in rngs]
        pairs = zip(images, offsets, strict=True)
        return torch.stack([view(one, at, pad=cfg.crop_pad, fill=cfg.crop_fill) for one, at in pairs])

    def losses_of(weights: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = each(net_g, weights, codes)
        pixels = look(images)
        seen = normalise(pixels, mean, std)
        with torch.no_grad():
            students = None if judge is None else each(judge, pixels)
        found = None
        if cfg.bn_weight:
            logits, found = each(network.with_stats, theta_t, seen, stats_t)
        else:
            logits = each(network, theta_t, seen, stats_t)
        total = []
        for j in range(len(teachers)):
            loss = losses.inversion(
                logits[j],
                labels,
                None if students is None else students[j],
                adversarial=cfg.adversarial,
                form=cfg.adversarial_form,
                clamp=cfg.kl_clamp,
            )
            if found is not None:
                loss = loss + cfg.bn_weight * losses.batch_norm_distance(found[j], stats_t[j])
            if cfg.tv_weight:
                loss = loss + cfg.tv_weight * losses.total_variation(images[j])
            total.append(loss)
        return torch.stack(total), images, logits

    adam_g, adam_z = optim.Adam.zeros(theta_g), optim.Adam.zeros(z)
    first = torch.zeros(len(teachers))
    passes = cfg.steps + 1 if cfg.final_pass or cfg.steps == 0 else cfg.steps
    for i in range(passes):
        leaf_g, leaf_z = theta_g.detach().requires_grad_(), z.detach().requires_grad_()
        loss, images, logits = losses_of(leaf_g, leaf_z)
        grad_g, grad_z = torch.autograd.grad(loss.sum(), (leaf_g, leaf_z))
        first = loss.detach() if i == 0 else first
        if i < cfg.steps:
            theta_g, adam_g = optim.adam_step(theta_g, grad_g, adam_g, lr=cfg.lr_generator, betas=BETAS)
            z, adam_z = optim.adam_step(z, grad_z, adam_z, lr=cfg.lr_latent, betas=BETAS)

    loss, images, logits = loss.detach(), images.detach(), logits.detach()
    tasks = []
    for j, teacher in enumerate(teachers):
        stored = to_bytes(images[j])
        offsets = draw_view(rngs[j], pad=cfg.crop_pad, flip=mirror)
        seen = view(to_pixels(stored, device), offsets, pad=cfg.crop_pad, fill=cfg.crop_fill)
        with torch.no_grad():
            soft = network(teacher.theta, normalise(seen, mean[j], std[j]), teacher.stats)
        task: Arrays = {
            "teacher": teacher.card.id,
            "images": stored,
            "labels": labels.cpu().numpy(),
            "view": offsets,
            "logits": soft.cpu().numpy(),
            "grad": grad_g[j].cpu().numpy(),
            "loss_first": float(first[j]),
            "loss_last": float(loss[j]),
            "ce": float(F.cross_entropy(logits[j], labels)),
            "accuracy": 100.0 * float((logits[j].argmax(-1) == labels).float().mean()),
            "spread": _spread(images[j], labels, way),
        }
        tasks.append(task)
    return tasks, theta_g


def _spread(images: Tensor, labels: Tensor, way: int) -> float:
    """Mean root-mean-square pixel distance of two images of a class: 0 where the generator has collapsed."""
    flat = images.flatten(1)
    distances = torch.stack([torch.pdist(flat[labels == c]).mean() for c in range(way)])
    return float(distances.mean() / flat.shape[1] ** 0.5)
