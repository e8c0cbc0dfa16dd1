"""Inner-loop adaptation and its meta-gradient, one task at a time or batched.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400, Eq. 1 and Algorithm 1. [Raghu2020] Rapid Learning or Feature
Reuse? (ANIL), arXiv 1909.09157. [Snell2017] Prototypical Networks, arXiv 1703.05175.

The same functions serve three strategies, which agree to rounding; tests say so. On a CPU all weights of a Conv4 adapt
with gradients written by hand (`core.conv4`); other cases differentiate with autograd, task by task; `batched` uses
`torch.func` under `vmap`, few launches for accelerators. `by_hand` alone decides on the first.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import conv4_second
from ray_dfml.core.backbones import Conv4
from ray_dfml.core.conv4 import Conv4Passes
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


def by_hand(net: Net, theta: Tensor, head: Head, stats: Tensor | None = None) -> Conv4Passes | None:
    """The hand-written passes where they cover the case: a Conv4 on a CPU, all of whose weights adapt, normalised with
    the statistics of the batch. None elsewhere."""
    covered = head == "maml" and stats is None and theta.device.type == "cpu" and isinstance(net.backbone, Conv4)
    return Conv4Passes(net) if covered else None


def probabilities(labels: Tensor, outputs: int, like: Tensor) -> Tensor:
    """Targets [n q] of a cross-entropy in the type of `like`: labels [n] as one-hot rows; probabilities as they are."""
    return (F.one_hot(labels, outputs) if labels.dim() == 1 else labels).to(like.dtype)


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

    For `maml` and `anil` labels may be probabilities [s way].

    `maml`: `steps` SGD steps of size `lr` on all weights ([Finn2017] Eq. 1). `anil`: the same on the head alone, over
    features computed once ([Raghu2020]). `protonet`: the head becomes 2 c_k and -|c_k|^2 of the class means c_k, no
    step: such logits are minus the squared distances to the means, up to a term that all classes of an image share, so
    probabilities and losses are those of distances ([Snell2017] section 2.4).
    Batch norm uses the support's own statistics, or the given ones [k]. The result may be differentiated once where
    `grad_of` is `graph_grad`.
    """
    passes = by_hand(net, theta, head, stats) if grad_of is plain_grad else None
    if passes is not None:
        targets = probabilities(labels, net.ways if way is None else way, theta)
        return passes.adapt(theta[None], support[None], targets[None], lr=lr, steps=steps)[0]
    first_order = grad_of is plain_grad or (grad_of is graph_grad and head != "maml")
    if head == "maml":
        return adapt(
            lambda w: F.cross_entropy(net(w, support, stats, first_order=first_order)[:, :way], labels),
            theta,
            lr=lr,
            steps=steps,
            grad_of=grad_of,
        )
    backbone, last = net.split(theta)
    features = net.features(theta, support, stats, first_order=first_order)
    if head == "protonet":
        member = (labels[:, None] == torch.arange(net.ways, device=labels.device)).to(features.dtype)
        means = member.T @ features / member.sum(0).clamp_min(1)[:, None]
        return torch.cat([backbone, 2 * means.flatten(), -means.square().sum(1)])

    def loss(h: Tensor) -> Tensor:
        weight, bias = h[: -net.ways].view(net.ways, -1), h[-net.ways :]
        return F.cross_entropy(F.linear(features, weight, bias)[:, :way], labels)

    return torch.cat([backbone, adapt(loss, last, lr=lr, steps=steps, grad_of=grad_of)])


GROUP, SMALL = 5, 10
"""Supports of up to `SMALL` images adapt `GROUP` at a time: a convolution of few images keeps a core waiting."""


def adapted_each(
    net: Net,
    theta: Tensor,
    supports: Tensor,
    labels: Tensor,
    *,
    head: Head,
    lr: float,
    steps: int,
    stats: Tensor | None = None,
    way: int | None = None,
) -> Iterator[Tensor]:
    """Weights [p] adapted to each of t supports [t s c h w] with labels [s] as by `adapted`, for use without gradient.

    Where small supports go together by hand, a group is filled up with the last one: the bits of one result depend on
    its position modulo `GROUP`, and neither on the other supports nor on their number.
    """
    passes = by_hand(net, theta, head, stats)
    if passes is None or supports.shape[1] > SMALL:
        for support in supports:
            yield adapted(
                net, theta, support, labels, head=head, lr=lr, steps=steps, grad_of=plain_grad, stats=stats, way=way
            )
        return
    targets = probabilities(labels, net.ways if way is None else way, theta).expand(GROUP, -1, -1)
    for part in supports.split(GROUP):
        group = torch.cat([part, part[-1:].expand(GROUP - len(part), *part.shape[1:])])
        yield from passes.adapt(theta.expand(GROUP, -1), group, targets, lr=lr, steps=steps)[: len(part)]


class Task(NamedTuple):
    """One few-shot task: normalised images [s c h w], [u c h w], local labels [s], [u] or probabilities [s q], [u q];
    many tasks have a leading axis t."""

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


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share (scalar, in [0, 1]) of logits [n q] whose largest is at the label [n], or at the largest target [n q]."""
    wanted = labels if labels.dim() == 1 else labels.argmax(-1)
    return (logits.argmax(-1) == wanted).to(logits.dtype).mean()


def query_loss(
    net: Net, theta: Tensor, task: Task, lr: float, steps: int, grad_of: GradOf, head: Head = "maml"
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Loss (scalar, nats) of one task's query after the adaptation to its support, differentiable in theta [p] and in
    the images if `grad_of` is; and, detached: the loss, the accuracy in [0, 1], the query's statistics [k]."""
    phi = adapted(net, theta, task.support, task.support_y, head=head, lr=lr, steps=steps, grad_of=grad_of)
    logits, stats = net.with_stats(phi, task.query, first_order=grad_of is graph_grad)
    loss = F.cross_entropy(logits, task.query_y)
    return loss, (loss.detach(), accuracy(logits, task.query_y), stats.detach())


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

        grad, aux = torch.func.vmap(one)(*tasks)
        return MetaGradient(grad, *aux)
    passes = by_hand(net, theta, head)
    rows = []
    for parts in zip(*tasks, strict=True):
        task = Task(*parts)
        if passes is None:
            leaf = theta.detach().requires_grad_()
            loss, aux = query_loss(net, leaf, task, lr, steps, graph_grad, head)
            rows.append((torch.autograd.grad(loss, leaf)[0], *aux))
        else:
            rows.append(_meta_gradient_by_hand(passes, theta, task, lr, steps))
    return MetaGradient(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _meta_gradient_by_hand(passes: Conv4Passes, theta: Tensor, task: Task, lr: float, steps: int) -> MetaGradient:
    targets, query_targets = (probabilities(y, passes.net.ways, theta) for y in (task.support_y, task.query_y))
    found = conv4_second.meta_gradient(
        passes, theta, task.support, targets, task.query, query_targets, lr=lr, steps=steps
    )
    loss = F.cross_entropy(found.logits, task.query_y)
    return MetaGradient(found.grad, loss, accuracy(found.logits, task.query_y), found.stats)
