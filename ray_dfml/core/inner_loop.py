"""The inner-loop adaptation and its meta-gradient, for one task at a time or for a batch of tasks.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400, Eq. 1 and Algorithm 1. [Raghu2020] Rapid Learning or Feature
Reuse? (ANIL), arXiv 1909.09157. [Snell2017] Prototypical Networks, arXiv 1703.05175.

There are three ways to compute the same values, and tests check that they agree up to rounding. The gradients written
by hand (`core.conv4`) serve a Conv4 on a CPU, all of whose weights adapt; `by_hand` alone decides on them. Other cases
use autograd, task by task. `batched` uses `torch.func` under `vmap`, which needs few launches on an accelerator.
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
"""What adapts to a support. `maml`: all weights. `anil`: the linear head alone. `protonet`: no weight is stepped, and
queries go to the nearest class mean."""


def graph_grad(loss: Loss) -> Callable[[Tensor], Tensor]:
    """The gradient of a loss by autograd. It can be differentiated again, and its argument must require gradients."""
    return lambda x: torch.autograd.grad(loss(x), x, create_graph=True)[0]


def plain_grad(loss: Loss) -> Callable[[Tensor], Tensor]:
    """The gradient of a loss by autograd without a graph. It is cheaper, and cannot be differentiated again."""

    def grad(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return grad


def by_hand(net: Net, theta: Tensor, head: Head, stats: Tensor | None = None) -> Conv4Passes | None:
    """The hand-written passes if they cover the case, else None.

    They cover a Conv4 on a CPU that normalises with the statistics of the batch and adapts all its weights.
    """
    covered = head == "maml" and stats is None and theta.device.type == "cpu" and isinstance(net.backbone, Conv4)
    return Conv4Passes(net) if covered else None


def probabilities(labels: Tensor, outputs: int, like: Tensor) -> Tensor:
    """Targets [n q] of a cross-entropy, in the type of `like`.

    Labels [n] become one-hot rows, and probabilities [n q] stay as they are.
    """
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
    """Weights [p] adapted to a support: normalised images [s c h w] and labels [s].

    With `maml` all weights take `steps` SGD steps of size `lr` ([Finn2017] Eq. 1). With `anil` the head alone takes
    them, and the features are computed once ([Raghu2020]). For both, labels may be probabilities [s way]. With
    `protonet` no step is taken. Weight and bias of class k in the head become 2 c_k and -|c_k|^2, where c_k is the
    class mean. Up to a term that all classes of an image share, the logits are then minus the squared distances to the
    means, so probabilities and losses are those of distances ([Snell2017] section 2.4).

    Outputs from `way` on take no part in the loss. Batch norm uses the statistics of the support, or `stats` [k] if
    they are given. The result may be differentiated once if `grad_of` is `graph_grad`.
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
"""Supports of up to `SMALL` images adapt `GROUP` at a time, since a convolution of few images does not fill a core."""


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
    """Yield the weights [p] that `adapted` gives for each of t supports [t s c h w], which share the labels [s].

    The weights carry no gradient. Where the hand-written passes adapt small supports in groups, a group that is not
    full is filled up with copies of its last support. So the bits of a result depend on its position modulo `GROUP`,
    and neither on the other supports nor on their number.
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
    """One few-shot task: normalised images [s c h w] and [u c h w], with local labels [s] and [u], or probabilities
    [s q] and [u q]. Several tasks have a leading axis t."""

    support: Tensor
    support_y: Tensor
    query: Tensor
    query_y: Tensor


class MetaGradient(NamedTuple):
    """Results for the queries of t tasks after adaptation: the gradients of the loss [t p], the losses [t] in nats, the
    accuracies [t] in [0, 1], and the batch-norm statistics [t k] that the queries have under the adapted weights."""

    grad: Tensor
    loss: Tensor
    accuracy: Tensor
    stats: Tensor


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share (scalar, in [0, 1]) of images whose largest logit [n q] is at the label [n], or at the largest target
    [n q]."""
    wanted = labels if labels.dim() == 1 else labels.argmax(-1)
    return (logits.argmax(-1) == wanted).to(logits.dtype).mean()


def query_loss(
    net: Net, theta: Tensor, task: Task, lr: float, steps: int, grad_of: GradOf, head: Head = "maml"
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Loss (scalar, nats) of one task's query after the adaptation to its support.

    The loss is differentiable with respect to theta [p] and the images if `grad_of` is. Also returned, without
    gradient, are the loss, the accuracy in [0, 1] and the query's batch-norm statistics [k].
    """
    phi = adapted(net, theta, task.support, task.support_y, head=head, lr=lr, steps=steps, grad_of=grad_of)
    logits, stats = net.with_stats(phi, task.query, first_order=grad_of is graph_grad)
    loss = F.cross_entropy(logits, task.query_y)
    return loss, (loss.detach(), accuracy(logits, task.query_y), stats.detach())


def meta_gradient(
    net: Net, theta: Tensor, tasks: Task, *, lr: float, steps: int, batched: bool, head: Head = "maml"
) -> MetaGradient:
    """Gradients with respect to theta [p] of the query losses of tasks, each adapted from theta to its support.

    The gradients pass through the adaptation (`adapted`), so with `maml` and `anil` they are of second order
    ([Finn2017] Algorithm 1, lines 5-8 and 10). `tasks` holds t tasks along the first axis. The losses on support and
    query are cross-entropies in nats per image. `protonet` reads neither `lr` nor `steps`.
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
