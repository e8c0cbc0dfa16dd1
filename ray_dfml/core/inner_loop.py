"""Inner-loop adaptation and its meta-gradient, one task at a time or batched.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400, Eq. 1 and Algorithm 1.

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


def _query_loss(
    net: Net, theta: Tensor, task: Task, lr: float, steps: int, grad_of: GradOf
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    phi = adapt(
        lambda w: F.cross_entropy(net(w, task.support), task.support_y), theta, lr=lr, steps=steps, grad_of=grad_of
    )
    logits, stats = net.with_stats(phi, task.query)
    loss = F.cross_entropy(logits, task.query_y)
    accuracy = (logits.argmax(-1) == task.query_y).to(loss.dtype).mean()
    return loss, (loss.detach(), accuracy, stats.detach())


def meta_gradient(net: Net, theta: Tensor, tasks: Task, *, lr: float, steps: int, batched: bool) -> MetaGradient:
    """Second-order MAML gradients of tasks that all start from theta [p] ([Finn2017] Algorithm 1, lines 5-8 and 10).

    `tasks` holds t tasks along the first axis; support and query are cross-entropies in nats per image.
    """
    if batched:

        def one(*parts: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
            def loss(w: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
                return _query_loss(net, w, Task(*parts), lr, steps, torch.func.grad)

            return torch.func.grad(loss, has_aux=True)(theta)

        grad, (loss, accuracy, stats) = torch.func.vmap(one)(*tasks)
        return MetaGradient(grad, loss, accuracy, stats)
    rows = []
    for parts in zip(*tasks, strict=True):
        leaf = theta.detach().requires_grad_()
        loss, aux = _query_loss(net, leaf, Task(*parts), lr, steps, graph_grad)
        rows.append((torch.autograd.grad(loss, leaf)[0], *aux))
    return MetaGradient(*(torch.stack(column) for column in zip(*rows, strict=True)))
