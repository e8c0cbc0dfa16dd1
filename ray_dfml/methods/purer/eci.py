"""The shards' part of ECI: steps on a teacher's learnable images, and the pixel gradient of the learner's outer loss.

[Hu2023] PURER, arXiv 2303.11183 (episode curriculum inversion). The images live in the teacher's normalised space and
are never clamped. A step descends cross-entropy + total variation + batch-norm statistics + norm of the images. If the
curriculum is due, the first step of a job also ascends the outer loss of the learner; the job brings its gradient.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import episodes, losses, optim
from ray_dfml.core.images import fit, normalise, to_bytes
from ray_dfml.core.inner_loop import adapted, graph_grad
from ray_dfml.core.net import net
from ray_dfml.methods.base import stacked
from ray_dfml.methods.pictures import SHOWN
from ray_dfml.methods.purer.config import Config
from ray_dfml.types import Arrays, ImageSpec, Job, Shard, Teacher, TeacherCard


def as_learner_sees(x: Tensor, teacher: ImageSpec, learner: ImageSpec) -> Tensor:
    """Turn normalised images [n c h w] of a teacher into the learner's normalised images [n c' h' w'].

    If both inputs agree, the result is the same tensor.
    """
    if teacher == learner:
        return x
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (teacher.mean, teacher.std))
    to_mean, to_std = (torch.tensor(values, device=x.device) for values in (learner.mean, learner.std))
    return normalise(fit(x * std + mean, learner.shape), to_mean, to_std)


def invert(
    cfg: Config, teachers: Sequence[Teacher], jobs: Sequence[Job], *, device: torch.device, batched: bool
) -> list[Arrays]:
    """Take `cfg.image_steps` Adam steps on the images of b teachers of one architecture and input.

    The values of a job are the images `x` [n c h w], Adam's `m`, `v` and `step`, and `push` [n c h w] or None, which is
    added to the gradient of the first step. A result holds the new `x`, `m`, `v` and `step`, and of the last step the
    `logits` [n q] and figures: losses in nats, and the accuracy in percent.
    """
    network, classes = teachers[0].net, len(teachers[0].card.classes)
    theta, stats = (torch.stack([getattr(t, name) for t in teachers]) for name in ("theta", "stats"))
    labels = episodes.interleaved(classes, cfg.images_per_class).to(device)
    x = torch.stack([torch.tensor(job.values["x"], device=device) for job in jobs])
    adams = [
        optim.Adam(
            torch.tensor(job.values["m"], device=device),
            torch.tensor(job.values["v"], device=device),
            job.values["step"],
        )
        for job in jobs
    ]
    rngs = [torch.Generator().manual_seed(job.seed) for job in jobs]
    with_statistics = bool(cfg.bn_weight) and stats.shape[1] > 0
    first, figures = torch.zeros(len(jobs)), {}
    for i in range(cfg.image_steps):
        leaf = x.detach().requires_grad_()
        shifts = [torch.randint(-cfg.shift, cfg.shift + 1, (2,), generator=rng).tolist() for rng in rngs]
        seen = torch.stack([torch.roll(one, at, (-2, -1)) for one, at in zip(leaf, shifts, strict=True)])
        if with_statistics:
            call = partial(network.with_stats, first_order=not batched)
            logits, found = stacked(call, theta, seen, stats, batched=batched)
        else:
            call = partial(network, first_order=not batched)
            logits, found = stacked(call, theta, seen, stats, batched=batched), None
        total = []
        for j in range(len(jobs)):
            loss = F.cross_entropy(logits[j], labels)
            loss = loss + cfg.tv_weight * losses.variation_norms(seen[j])
            loss = loss + cfg.l2_weight * torch.linalg.vector_norm(seen[j])
            if found is not None:
                gap = losses.statistics_norms(found[j], stats[j], network.stats_layout.sizes)
                loss = loss + cfg.bn_weight * gap
            total.append(loss)
        loss = torch.stack(total)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        first = loss.detach() if i == 0 else first
        figures = {"loss": loss.detach(), "logits": logits.detach()}
        moved = []
        for j, job in enumerate(jobs):
            g = grad[j]
            if i == 0 and job.values["push"] is not None:
                g = g + torch.tensor(job.values["push"], device=device)
            one, adams[j] = optim.adam_step(x[j], g, adams[j], lr=cfg.lr_images)
            moved.append(one)
        x = torch.stack(moved)
    return [
        {
            "x": x[j].cpu().numpy(),
            "m": adams[j].m.cpu().numpy(),
            "v": adams[j].v.cpu().numpy(),
            "step": adams[j].step,
            "logits": figures["logits"][j].cpu().numpy(),
            "loss_first": float(first[j]),
            "loss_last": float(figures["loss"][j]),
            "ce": float(F.cross_entropy(figures["logits"][j], labels)),
            "accuracy": 100.0 * float((figures["logits"][j].argmax(-1) == labels).float().mean()),
        }
        for j in range(len(jobs))
    ]


def as_task(card: TeacherCard, result: Arrays) -> Arrays:
    """A result of `invert` as a recovered task, as `inversion.Inversion.task` makes it, for the gallery."""
    image, count = card.image, SHOWN * len(card.classes)
    mean, std = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std))
    return {
        "teacher": card.id,
        "classes": card.classes,
        "images": to_bytes(torch.tensor(result["x"][:count]) * std + mean),
        "labels": np.arange(min(count, len(result["x"]))) % len(card.classes),
        "logits": result["logits"][:count],
    }


def grad(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `purer.grad` op: the gradient of the outer loss with respect to the normalised pixels of a pseudo task.

    The gradient passes through the inner loop ([Hu2023], the step of the gradient switch). The values of a job are
    `support` [s c h w] and `query` [u c h w]. A result holds their gradients under the same names, and `loss` in nats.
    """
    network = net(shared["arch"], tuple(shared["shape"]), shared["way"])
    theta = torch.tensor(shared["theta"], device=shard.device)
    results = []
    for job in jobs:
        parts = [torch.tensor(job.values[k], device=shard.device).requires_grad_() for k in ("support", "query")]
        labels = [episodes.interleaved(shared["way"], len(part) // shared["way"]).to(shard.device) for part in parts]
        phi = adapted(
            network, theta.requires_grad_(), parts[0], labels[0], head=shared["head"], lr=shared["inner_lr"],
            steps=shared["inner_steps"], grad_of=graph_grad,
        )  # fmt: skip
        loss = F.cross_entropy(network(phi, parts[1]), labels[1])
        found = torch.autograd.grad(loss, parts, materialize_grads=True)
        grads = {name: g.cpu().numpy() for name, g in zip(("support", "query"), found, strict=True)}
        results.append({"loss": float(loss.detach()), **grads})
    return results


def push_of(
    x: Tensor, rows: np.ndarray, gradient: Tensor, teacher: ImageSpec, learner: ImageSpec, weight: float
) -> np.ndarray:
    """The push on a teacher's images [n c h w] from the pixel gradient at the learner's input.

    At `rows` [k] it is -weight x gradient, carried back through the change of size and normalisation. Elsewhere it is
    zero.
    """
    leaf = x[rows].detach().requires_grad_()
    back = torch.autograd.grad(as_learner_sees(leaf, teacher, learner), leaf, gradient)[0]
    push = torch.zeros_like(x)
    push[rows] = -weight * back
    return push.numpy()
