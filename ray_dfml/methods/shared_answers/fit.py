"""The learner's features are trained until one linear layer for each teacher reads its answers from them.

With features h(x) of an image x, and layers A_t, b_t of the teachers t that answered it with probabilities p_t(x), the
loss is the mean over images and these teachers of the cross-entropy

    - sum_c p_tc(x) log softmax(A_t h(x) + b_t)_c.

The layers begin at N(0, 1 / features) and are thrown away at the end. No paper has this; it is distillation of many
teachers into one network with a head for each.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import optim
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.net import Net, net
from ray_dfml.methods.base import World, image_values
from ray_dfml.methods.shared_answers.config import Config
from ray_dfml.types import Arrays, Job, Shard

RISE = 30
"""First steps, in which the step size grows linearly."""

PARTS, KEPT = ("theta", "layers", "biases"), ("x", "m", "v")
"""What is trained: the learner, and the teachers' layers and their biases; and what is kept of each: its values and the
moments of Adam."""


def answered(known: Sequence[Mapping[str, Any]], batches: Sequence[int]) -> Arrays:
    """What the loss reads of the answers of all teachers.

    `known` holds for each teacher its `classes`, the numbers of the `rounds` that it answered, in order, and their
    `answers`: labels int64 [m] or probabilities float16 [m q]. A round r has `batches[r]` images. The result holds
    `wished` float16 [n t q], `known` bool [n t], and `units` bool [t q], the outputs that a teacher has. What is not
    known is 0, and an answer whose probabilities were all rounded to 0 is not known.
    """
    starts = [0, *accumulate(batches)]
    most = max(one["classes"] for one in known)
    wished = np.zeros((starts[-1], len(known), most), np.float16)
    there, units = np.zeros(wished.shape[:2], bool), np.zeros(wished.shape[1:], bool)
    for t, one in enumerate(known):
        rows = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in one["rounds"]])
        answers = one["answers"] if one["answers"].ndim == 2 else np.eye(one["classes"])[one["answers"]]
        wished[rows, t, : one["classes"]] = answers
        there[rows, t] = answers.any(1)
        units[t, : one["classes"]] = True
    return {"wished": wished, "known": there, "units": units}


def loss(logits: Tensor, wished: Tensor, known: Tensor, units: Tensor) -> Tensor:
    """The loss (scalar, nats) of the layers' logits [n t q], given probabilities [n t q], whether they are known [n t],
    and the outputs that each teacher has [t q]."""
    said = logits.masked_fill(~units, -torch.inf).log_softmax(2).masked_fill(~units, 0)
    each = -(wished * said).sum(2)
    return (each * known).sum() / known.sum().clamp_min(1)


def agreement(logits: Tensor, wished: Tensor, known: Tensor, units: Tensor) -> Tensor:
    """The share of the known answers, in percent, whose best class is that of the layer."""
    same = logits.masked_fill(~units, -torch.inf).argmax(2) == wished.argmax(2)
    return 100 * (same & known).sum() / known.sum().clamp_min(1)


def slope(step: int, steps: int) -> float:
    """The share of the step size in a step: a linear rise, then half a cosine."""
    return min(1.0, (step + 1) / RISE) * 0.5 * (1 + float(np.cos(np.pi * step / steps)))


def shared_values(cfg: Config, world: World) -> Arrays:
    """The settings, and the learner's network."""
    return image_values(world.image) | {"cfg": cfg.model_dump(), "arch": world.arch, "way": world.way}


def fit(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The op: train the learner of each job, `theta` [p], on `images` uint8 [n c h w] and what `answered` gives.

    `steps` are the first step and the first one after the last. `begun` is the `fit` of the result before, or empty.
    The minibatches are those of one training without a break. The result holds `theta`, the `fit` (all that the next
    step depends on), and the figures `loss_first`, `loss_last` (nats) and `agreement` (percent) of minibatches.
    """
    return [_one(shard, job, shared) for job in jobs]


def _one(shard: Shard, job: Job, shared: Arrays) -> Arrays:
    cfg, device = Config.model_validate(shared["cfg"]), shard.device
    network, rng = net(shared["arch"], tuple(shared["shape"]), shared["way"]), torch.Generator().manual_seed(job.seed)
    mean, std = (torch.tensor(shared[name], device=device) for name in ("mean", "std"))
    images, wished, known, units = (job.values[name] for name in ("images", "wished", "known", "units"))
    outputs = torch.tensor(units, device=device)
    fresh, (start, stop) = _fresh(network, torch.tensor(job.values["theta"]), units.size, rng), job.values["steps"]
    parts, adams = _on(device, job.values["begun"] or fresh)
    step_sizes = (cfg.lr, cfg.layer_lr, cfg.layer_lr)
    figures: dict[str, float] = {}
    for step in range(stop):
        rows = torch.randint(0, len(images), (cfg.minibatch,), generator=rng)
        if step < start:
            continue
        seen = normalise(to_pixels(images[rows.numpy()], device), mean, std)
        told = torch.tensor(wished[rows.numpy()], device=device).float()
        there = torch.tensor(known[rows.numpy()], device=device)
        leaves = [part.detach().requires_grad_() for part in parts]
        logits = F.linear(network.features(leaves[0], seen, first_order=True), *leaves[1:]).unflatten(1, units.shape)
        value = loss(logits, told, there, outputs)
        grads = torch.autograd.grad(value, leaves, materialize_grads=True)
        for i, grad in enumerate(grads):
            parts[i], adams[i] = optim.adam_step(parts[i], grad, adams[i], lr=step_sizes[i] * slope(step, cfg.steps))
        if step == start:
            figures["loss_first"] = float(value.detach())
        if step == stop - 1:
            figures["loss_last"] = float(value.detach())
            figures["agreement"] = float(agreement(logits.detach(), told, there, outputs))
    columns = (parts, [adam.m for adam in adams], [adam.v for adam in adams])
    left = {f"{part}_{what}": value.cpu().numpy() for what, column in zip(KEPT, columns, strict=True)
            for part, value in zip(PARTS, column, strict=True)}  # fmt: skip
    return {"theta": left["theta_x"], "fit": left | {"step": stop}, **figures}


def _fresh(network: Net, theta: Tensor, outputs: int, rng: torch.Generator) -> Arrays:
    """A training before its first step: the learner, layers that read `outputs` answers in all, and optimisers."""
    features = len(network.split(theta)[1]) // network.ways - 1
    values = (theta, torch.randn(outputs, features, generator=rng) / features**0.5, torch.zeros(outputs))
    return {"step": 0} | {
        f"{part}_{what}": (value if what == "x" else torch.zeros_like(value)).numpy()
        for part, value in zip(PARTS, values, strict=True) for what in KEPT
    }  # fmt: skip


def _on(device: torch.device, begun: Arrays) -> tuple[list[Tensor], list[optim.Adam]]:
    """The parts of a training, and their optimisers."""
    columns = [[torch.tensor(begun[f"{part}_{what}"], device=device) for part in PARTS] for what in KEPT]
    return columns[0], [optim.Adam(m, v, begun["step"]) for m, v in zip(*columns[1:], strict=True)]
