"""The two distillations of BiDf-MKD: the inner one gives a task model, and the outer one moves the learner through it.

[Hu2023b] Learning to Learn from APIs: Black-Box Data-Free Meta-Learning, arXiv 2305.18413 (ICML 2023). Both learn from
what the teacher says of recovered sets, whatever these sets were recovered from.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ray_dfml.core import losses
from ray_dfml.core.images import normalise, to_pixels, view
from ray_dfml.core.inner_loop import GradOf, Task, accuracy, adapt, adapted, graph_grad, meta_gradient, plain_grad
from ray_dfml.core.net import Net, net
from ray_dfml.methods.base import stacked
from ray_dfml.methods.bidf.config import Config
from ray_dfml.methods.inversion import Judge
from ray_dfml.types import Arrays, Job, Shard


def task_models(
    cfg: Config, learner: Net, theta: Tensor, support: Sequence[Arrays], mean: Tensor, std: Tensor, batched: bool
) -> Judge:
    """The task models of support sets: theta [p] after the inner distillation of each, as one judge of images."""
    phi = torch.stack([_inner(cfg, learner, theta, task, mean, std, plain_grad) for task in support])
    ask = partial(learner, first_order=not batched)
    return lambda pixels: stacked(ask, phi, normalise(pixels, mean, std), batched=batched)


def _set(cfg: Config, task: Arrays, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """A recovered task as the learner meets it: the normalised view, and the teacher's logits [n q] on this view."""
    pixels = view(to_pixels(task["images"], mean.device), task["view"], pad=cfg.crop_pad, fill=cfg.crop_fill)
    return normalise(pixels, mean, std), torch.tensor(task["logits"], device=mean.device)


def _inner(
    cfg: Config, learner: Net, theta: Tensor, support: Arrays, mean: Tensor, std: Tensor, grad_of: GradOf
) -> Tensor:
    """The task model [p]: theta after `inner_steps` SGD steps on the distillation of a support set ([Hu2023b])."""
    x, soft = _set(cfg, support, mean, std)
    if cfg.distill == "kl":  # KL has the gradient of the cross-entropy to the teacher's probabilities
        return adapted(
            learner, theta, x, soft.softmax(-1), head="maml", lr=cfg.inner_lr, steps=cfg.inner_steps, grad_of=grad_of
        )
    return adapt(
        lambda w: losses.distillation(soft, learner(w, x), form=cfg.distill),
        theta, lr=cfg.inner_lr, steps=cfg.inner_steps, grad_of=grad_of,
    )  # fmt: skip


def grad(shard: Shard, jobs: Sequence[Job], shared: Arrays) -> list[Arrays]:
    """The `bidf.grad` op: the gradient [p] of the outer distillation at theta, through the inner steps ([Hu2023b]).

    The values of a job are `support` and `query`, the recovered tasks of one teacher. A result holds `grad`, the `loss`
    in nats, and the `accuracy`, which is the share of query images on which task model and teacher agree.
    """
    cfg = Config.model_validate(shared["cfg"])
    learner = net(shared["arch"], tuple(shared["shape"]), shared["way"])
    theta = torch.tensor(shared["theta"], device=shard.device)
    mean, std = (torch.tensor(shared[k], device=shard.device) for k in ("mean", "std"))
    outer = _outer_kl if cfg.distill == "kl" else _outer
    return [outer(cfg, learner, theta, job.values, mean, std) for job in jobs]


def _outer(cfg: Config, learner: Net, theta: Tensor, task: Arrays, mean: Tensor, std: Tensor) -> Arrays:
    leaf = theta.detach().requires_grad_()
    phi = _inner(cfg, learner, leaf, task["support"], mean, std, graph_grad)
    x, soft = _set(cfg, task["query"], mean, std)
    logits = learner(phi, x)
    loss = losses.distillation(soft, logits, form=cfg.distill)
    (found,) = torch.autograd.grad(loss, leaf)
    agree = accuracy(logits, soft)
    return {"grad": found.cpu().numpy(), "loss": float(loss.detach()), "accuracy": float(agree)}


def _outer_kl(cfg: Config, learner: Net, theta: Tensor, task: Arrays, mean: Tensor, std: Tensor) -> Arrays:
    """`_outer` for KL. It uses cross-entropies to the teacher's probabilities, and KL is less by their entropy."""
    (x, soft), (query, asked) = (_set(cfg, task[kind], mean, std) for kind in ("support", "query"))
    targets = asked.softmax(-1)
    tasks = Task(*(part[None] for part in (x, soft.softmax(-1), query, targets)))
    found = meta_gradient(learner, theta, tasks, lr=cfg.inner_lr, steps=cfg.inner_steps, batched=False)
    entropy = -(targets * asked.log_softmax(-1)).sum(-1).mean()
    return {
        "grad": found.grad[0].cpu().numpy(),
        "loss": float(found.loss[0] - entropy),
        "accuracy": float(found.accuracy[0]),
    }
