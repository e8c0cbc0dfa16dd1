"""Inner-loop adaptation and its meta-gradient, one task at a time or batched.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400, Eq. 1 and Algorithm 1. [Raghu2020] Rapid Learning or Feature
Reuse? (ANIL), arXiv 1909.09157. [Snell2017] Prototypical Networks, arXiv 1703.05175.

The same functions serve both strategies: `LOOP` differentiates with autograd, task by task (fastest on a CPU);
`BATCHED` uses `torch.func` under `vmap` (few launches, for accelerators). They agree to rounding; a test says so.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.net import Net

Loss = Callable[[Tensor], Tensor]
GradOf = Callable[[Loss], Callable[[Tensor], Tensor]]

Head = Literal["maml", "anil", "protonet"]
"""What adapts to a support: all weights; the linear head alone; nothing, since queries go to the nearest class mean."""


def graph_grad(loss: Loss) -> Callable[[Tensor], Tensor]:
    """Gradient by autograd, itself differentiable; its argument must require gradients."""
    return lambda x: torch.autograd.grad(loss(x), x, create_graph=True)[0]


def plain_grad(loss: Loss) -> Callable[[Tensor], Tensor]:
    """Gradient by autograd without a graph: cheaper where nothing differentiates through it."""

    def grad(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return grad


def adapt(loss: Loss, theta: Tensor, *, lr: float, steps: int, grad_of: GradOf) -> Tensor:
    """Weights [p] after `steps` plain SGD steps on `loss` from theta [p] ([Finn2017] Eq. 1)."""
    grad = grad_of(loss)
    for _ in range(steps):
        theta = theta - lr * grad(theta)
    return theta


def adapted(
    net: Net,
    theta: Tensor,
    support: Tensor,
    labels: Tensor,
    *,
    head: Head,
    lr: float,
    steps: int,
    grad_of: GradOf,
    stats: Tensor | None = None,
    way: int | None = None,
) -> Tensor:
    """Weights [p] adapted to a support: normalised images [s c h w], labels [s]. Outputs from `way` on get no loss.

    `maml`: `steps` SGD steps of size `lr` on all weights ([Finn2017] Eq. 1). `anil`: the same on the head alone, over
    features computed once ([Raghu2020]). `protonet`: the head becomes 2 c_k and -|c_k|^2 of the class means c_k, no
    step: such logits are minus the squared distances to the means, up to a term that all classes of an image share, so
    probabilities and losses are those of distances ([Snell2017] section 2.4).
    Batch norm uses the support's own statistics, or the given ones [k].
    """
    if head == "maml":
        return adapt(
            lambda w: F.cross_entropy(net(w, support, stats)[:, :way], labels),
            theta,
            lr=lr,
            steps=steps,
            grad_of=grad_of,
        )
    backbone, last = net.split(theta)
    features = net.features(theta, support, stats)
    if head == "protonet":
        member = (labels[:, None] == torch.arange(net.ways, device=labels.device)).to(features.dtype)
        means = member.T @ features / member.sum(0).clamp_min(1)[:, None]
        return torch.cat([backbone, 2 * means.flatten(), -means.square().sum(1)])

    def loss(h: Tensor) -> Tensor:
        weight, bias = h[: -net.ways].view(net.ways, -1), h[-net.ways :]
        return F.cross_entropy(F.linear(features, weight, bias)[:, :way], labels)

    return torch.cat([backbone, adapt(loss, last, lr=lr, steps=steps, grad_of=grad_of)])


class Task(NamedTuple):
    """One few-shot task: normalised images [s c h w], [u c h w], local labels [s], [u]; many have a leading axis t."""

    support: Tensor
    support_y: Tensor
    query: Tensor
    query_y: Tensor


class MetaGradient(NamedTuple):
    """Of the query loss after adaptation: gradients [t p]; losses in nats [t]; query accuracy in [0, 1] [t]; the
    query's batch-norm statistics [t k] under the adapted weights."""

    grad: Tensor
    loss: Tensor
    accuracy: Tensor
    stats: Tensor


def query_loss(
    net: Net, theta: Tensor, task: Task, lr: float, steps: int, grad_of: GradOf, head: Head = "maml"
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Loss (scalar, nats) of one task's query after the adaptation to its support, differentiable in theta [p] and in
    the images if `grad_of` is; and, detached: the loss, the accuracy in [0, 1], the query's statistics [k]."""
    phi = adapted(net, theta, task.support, task.support_y, head=head, lr=lr, steps=steps, grad_of=grad_of)
    logits, stats = net.with_stats(phi, task.query)
    loss = F.cross_entropy(logits, task.query_y)
    accuracy = (logits.argmax(-1) == task.query_y).to(loss.dtype).mean()
    return loss, (loss.detach(), accuracy, stats.detach())


def meta_gradient(
    net: Net, theta: Tensor, tasks: Task, *, lr: float, steps: int, batched: bool, head: Head = "maml"
) -> MetaGradient:
    """Gradients of the query loss of tasks that all start from theta [p], through what adapts to the support
    (`adapted`): for `maml` and `anil` of second order ([Finn2017] Algorithm 1, lines 5-8 and 10).

    `tasks` holds t tasks along the first axis; support and query are cross-entropies in nats per image. `protonet`
    reads neither `lr` nor `steps`.
    """
    if batched:

        def one(*parts: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
            def loss(w: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
                return query_loss(net, w, Task(*parts), lr, steps, torch.func.grad, head)

            return torch.func.grad(loss, has_aux=True)(theta)

        grad, (loss, accuracy, stats) = torch.func.vmap(one)(*tasks)
        return MetaGradient(grad, loss, accuracy, stats)
    rows = []
    for parts in zip(*tasks, strict=True):
        leaf = theta.detach().requires_grad_()
        loss, aux = query_loss(net, leaf, Task(*parts), lr, steps, graph_grad, head)
        rows.append((torch.autograd.grad(loss, leaf)[0], *aux))
    return MetaGradient(*(torch.stack(column) for column in zip(*rows, strict=True)))
