"""The `pretrain` op, which trains one teacher on the classes of one task.

[Wei2024] FREE, arXiv 2405.00984, section 5.1. The released code saves the weights of the last epoch with the accuracy
of the best one. Here the best weights are kept, with both accuracies.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field

from ray_dfml.core import optim
from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.net import net
from ray_dfml.types import Arrays, Job, Shard

STATS_MOMENTUM = 0.1
DEEP = ("resnet", "vgg", "alexnet")
"""Beginnings of the names of architectures that learn by SGD with momentum. The others learn by Adam."""
SGD_MILESTONES = (30, 50, 80)


class PretrainConfig(BaseModel):
    """The recipe for the teachers of a pool."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=60, ge=1, description="Passes over a teacher's training images.")
    batch: int = Field(default=128, ge=2, description="Images per step.")
    lr: float = Field(default=0.01, gt=0, description="Step size of Adam, or for deep networks of SGD.")
    clip: float = Field(default=50.0, gt=0, description="Bound on the gradient's L2 norm.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="SGD momentum (ResNets, VGG, AlexNet).")
    weight_decay: float = Field(default=5e-4, ge=0, description="SGD weight decay (deep networks).")
    milestones: tuple[int, ...] | None = Field(
        default=None,
        description="Epochs at which the step size falls; by default 30, 50 and 80 with SGD, and none with Adam.",
    )
    decay: float = Field(default=0.2, gt=0, le=1, description="Factor by which the step size falls each time.")


def pretrain(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `pretrain` op: train a teacher for each job, on uint8 images [n c h w] with local labels [n].

    Images whose `held_out` [n] is true are not trained on. A result holds the weights of the epoch that was best on
    them, and the accuracies of this epoch and of the last one in percent.
    """
    cfg = PretrainConfig.model_validate(shared["cfg"])
    return [_one(cfg, job, shard.device) for job in jobs]


def _one(cfg: PretrainConfig, job: Job, device: torch.device) -> Arrays:
    values = job.values
    network = net(values["arch"], tuple(values["shape"]), values["way"])
    rng = torch.Generator().manual_seed(job.seed)
    mean, std = (torch.tensor(values[k], device=device) for k in ("mean", "std"))
    held = values["held_out"]
    train_x, test_x = (normalise(to_pixels(values["images"][rows], device), mean, std) for rows in (~held, held))
    train_y, test_y = (torch.tensor(values["labels"][rows], device=device) for rows in (~held, held))

    theta, stats = network.init(rng).to(device), network.initial_stats().to(device)
    adam, velocity = optim.Adam.zeros(theta), torch.zeros_like(theta)
    with_adam = not values["arch"].startswith(DEEP)
    milestones = cfg.milestones if cfg.milestones is not None else () if with_adam else SGD_MILESTONES
    best = (-1.0, theta, stats)
    accuracy = 0.0
    for epoch in range(cfg.epochs):
        lr = cfg.lr * cfg.decay ** sum(epoch >= m for m in milestones)
        order = torch.randperm(len(train_x), generator=rng).to(device)
        for chunk in order.split(cfg.batch):
            if len(chunk) < 2:
                continue
            leaf = theta.detach().requires_grad_()
            logits, found = network.with_stats(leaf, train_x[chunk], first_order=True)
            grad = torch.autograd.grad(F.cross_entropy(logits, train_y[chunk]), leaf)[0]
            grad = optim.clip_norm(grad, cfg.clip)
            if with_adam:
                theta, adam = optim.adam_step(theta, grad, adam, lr=lr)
            else:
                theta, velocity = optim.sgd_step(
                    theta, grad, velocity, lr=lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
                )
            stats = (1 - STATS_MOMENTUM) * stats + STATS_MOMENTUM * found
        with torch.no_grad():
            logits = torch.cat([network(theta, part, stats, first_order=True) for part in test_x.split(256)])
        accuracy = 100.0 * float((logits.argmax(-1) == test_y).float().mean())
        if accuracy > best[0]:
            best = (accuracy, theta.clone(), stats.clone())
    if not torch.isfinite(best[1]).all():
        return {"rejected": f"training diverged (lr {cfg.lr})"}
    return {
        "theta": best[1].cpu().numpy(),
        "stats": best[2].cpu().numpy(),
        "accuracy_best": best[0],
        "accuracy_last": accuracy,
    }
