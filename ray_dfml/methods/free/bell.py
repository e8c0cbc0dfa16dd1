"""BELL: better generalisation via the meta-learner, by sequential distillation of the recovered tasks.

[Wei2024] arXiv 2405.00984, Eq. 3, Algorithm 2, Theorem 1. BELL is sequential by definition: step i starts where step
i - 1 ended. With plain SGD inside and a small alpha, E[theta - theta~] over task orders is
alpha sum_i g_i - (alpha^2 / 2) sum_{i<j} grad(g_i . g_j) + O(alpha^3). So the outer step descends every loss and
ascends the inner products of the gradients.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import losses, optim
from ray_dfml.core.net import Net
from ray_dfml.methods.base import Metrics, State, World
from ray_dfml.methods.free.config import Config


class DistillSet(NamedTuple):
    """One recovered task for distillation: normalised images [n c h w], teacher logits [n q], local labels [n]."""

    images: Tensor
    logits: Tensor
    labels: Tensor


def distill_loss(net: Net, task: DistillSet, form: str) -> Callable[[Tensor], Tensor]:
    """The loss of learner weights [p] on one task, in nats per image ([Wei2024] Eq. 3).

    The form `hard` is the cross-entropy on the labels.
    """
    if form == "hard":
        return lambda w: F.cross_entropy(net(w, task.images, first_order=True), task.labels)
    return lambda w: losses.distillation(task.logits, net(w, task.images, first_order=True), form=form)


class Path(NamedTuple):
    """The end theta~ [p] of a path, and for each of its steps the loss in nats and the gradient g_i [p]."""

    theta: Tensor
    losses: list[Tensor]
    grads: list[Tensor]


def inner_path(loss_fns: Sequence[Callable[[Tensor], Tensor]], theta: Tensor, *, lr: float, optimizer: str) -> Path:
    """Take one step for each loss, in order, from theta [p] ([Wei2024] Algorithm 2, lines 4-6)."""
    adam = optim.Adam.zeros(theta)
    path = Path(theta, [], [])
    for loss in loss_fns:
        value, grad = value_and_grad(loss, theta)
        path.losses.append(value)
        path.grads.append(grad)
        if optimizer == "adam":
            theta, adam = optim.adam_step(theta, grad, adam, lr=lr)
        else:
            theta = theta - lr * grad
    return path._replace(theta=theta)


def value_and_grad(loss: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    """A loss at theta [p], and its gradient [p]."""
    leaf = theta.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def alignment(grads: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over pairs i < j of g_i . g_j, and of their cosine ([Wei2024] Fig. 5). Zero for fewer than two gradients."""
    g = torch.stack(list(grads)).double()
    upper = torch.triu_indices(len(g), len(g), offset=1)
    if upper.shape[1] == 0:
        return 0.0, 0.0
    products = (g @ g.T)[upper[0], upper[1]]
    unit = g / g.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return float(products.mean()), float((unit @ unit.T)[upper[0], upper[1]].mean())


def update(cfg: Config, world: World, state: State, tasks: Sequence[DistillSet], r: int) -> tuple[State, Metrics]:
    """Take one outer step on the learner ([Wei2024] Algorithm 2), or for ERM one step on the summed losses at theta.

    Losses and gradients are computed on `world.device`, and the outer step on the CPU, where the state stays. The
    figure `bell/loss` is the mean of the tasks' losses in nats. Each is taken just before the task's own step, so only
    the first one is at theta. For ERM all losses are at theta.
    """
    theta = state["theta"].to(world.device)
    tasks = [DistillSet(*(part.to(world.device) for part in task)) for task in tasks]
    loss_fns = [distill_loss(world.net, task, cfg.distill) for task in tasks]
    metrics: Metrics = {}
    with_base = cfg.learner_update == "erm" or (cfg.alignment_every > 0 and r % cfg.alignment_every == 0)
    if with_base:
        met, base = zip(*[value_and_grad(loss, theta) for loss in loss_fns], strict=True)
        metrics["align/base_product"], metrics["align/base_cosine"] = alignment(base)
    if cfg.learner_update == "erm":
        pseudo = torch.stack(base).sum(0)
    else:
        moved, met, path = inner_path(loss_fns, theta, lr=cfg.bell_lr, optimizer=cfg.bell_inner)
        metrics["align/path_product"], metrics["align/path_cosine"] = alignment(path)
        pseudo = cfg.bell_scale * (theta - moved)
    metrics["bell/loss"] = float(torch.stack(list(met)).mean())
    before, pseudo = state["theta"], pseudo.cpu()
    if cfg.bell_outer == "interpolate" and cfg.learner_update == "bell":
        state = {**state, "theta": before - cfg.bell_outer_lr * pseudo}
    else:
        slot = "adam" if cfg.bell_outer == "shared-adam" else "adam_bell"
        new, adam = optim.adam_step(before, pseudo, optim.Adam(**state[slot]), lr=cfg.bell_outer_lr)
        state = {**state, "theta": new, slot: adam._asdict()}
    metrics["bell/step_norm"] = float((state["theta"] - before).norm())
    return state, metrics
