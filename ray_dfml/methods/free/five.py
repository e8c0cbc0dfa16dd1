"""FIVE: faster inversion via the meta-generator, for one teacher or for several of one architecture at once.

[Wei2024] FREE, arXiv 2405.00984, Algorithm 1, Eq. 1 and 2. The meta-gradient is of first order: no graph is kept
through the k steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_dfml.core import optim
from ray_dfml.core.generators import Generator
from ray_dfml.methods.free.config import Config
from ray_dfml.methods.inversion import BETAS, Inversion, Judge
from ray_dfml.types import Arrays, Teacher


def five(
    cfg: Config,
    net_g: Generator,
    teachers: Sequence[Teacher],
    theta_g: Tensor,
    judge: Judge | None,
    seeds: Sequence[int],
    *,
    way: int,
    batched: bool,
) -> tuple[list[Arrays], Tensor]:
    """Recover one task from each of b teachers ([Wei2024] Algorithm 1, lines 4-7).

    theta_g [b p] and Z ~ N(0, 1) [b n d] take k Adam steps. Images, losses and the first-order meta-gradient are then
    those at the adapted weights. `judge` is the learner in the disagreement term, or None to leave the term out. With
    `batched` the teachers run through `vmap`, else one after another; they do not affect each other.

    Returns the recovered task of each teacher (`inversion.Inversion.task`), with the meta-gradient `grad` [p] and the
    losses in nats, and the adapted theta_g [b p].
    """
    inversion = Inversion(cfg, net_g, teachers, way, seeds, device=theta_g.device, batched=batched)
    z = inversion.codes()
    adam_g, adam_z = optim.Adam.zeros(theta_g), optim.Adam.zeros(z)
    first = torch.zeros(len(teachers))
    passes = cfg.steps + 1 if cfg.final_pass or cfg.steps == 0 else cfg.steps
    for i in range(passes):
        leaf_g, leaf_z = theta_g.detach().requires_grad_(), z.detach().requires_grad_()
        loss, images, logits = inversion.losses(leaf_g, leaf_z, judge)
        grad_g, grad_z = torch.autograd.grad(loss.sum(), (leaf_g, leaf_z))
        first = loss.detach() if i == 0 else first
        if i < cfg.steps:
            theta_g, adam_g = optim.adam_step(theta_g, grad_g, adam_g, lr=cfg.lr_generator, betas=BETAS)
            z, adam_z = optim.adam_step(z, grad_z, adam_z, lr=cfg.lr_latent, betas=BETAS)

    loss, images, logits = loss.detach(), images.detach(), logits.detach()
    tasks = [
        inversion.task(j, images[j], logits[j])
        | {"grad": grad_g[j].cpu().numpy(), "loss_first": float(first[j]), "loss_last": float(loss[j])}
        for j in range(len(teachers))
    ]
    return tasks, theta_g
