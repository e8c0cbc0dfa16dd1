"""The second derivative of a Conv4 by hand: Hessian-vector products, and the meta-gradient made of them.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400, Algorithm 1.

The adaptation takes K steps theta <- theta - lr g(theta) on the support. The gradient of the query loss Q(theta_K) with
respect to theta_0 needs no graph: start from v = grad Q(theta_K), and go back over the steps with
v <- v - lr H(theta_s) v. The product H v is the derivative of g(theta + e v) with respect to e. It is therefore the
tangent of `conv4.Conv4Passes.backward`: every line here differentiates a line there, and `d_x` is the tangent of x.

Letters in shapes are those of `conv4`. There is one learner (t = 1), since several at once gain nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ray_dfml.core.conv4 import (
    Block,
    Conv4Passes,
    Images,
    Slope,
    Trace,
    convolve,
    convolve_backward,
    error,
    lay,
    signed,
    spread,
)


class Found(NamedTuple):
    """Results for the query after the adaptation: the gradient with respect to theta [p], the logits [u q] and the
    batch-norm statistics [k]."""

    grad: Tensor
    logits: Tensor
    stats: Tensor


class Step(NamedTuple):
    """What one step of the adaptation keeps for its Hessian."""

    trace: Trace
    slopes: list[Slope]
    error: Tensor


class Tangent(NamedTuple):
    """Tangents of one block in the forward direction."""

    input: Tensor | None  # None at the images, which do not move
    weight: Tensor
    conv: Tensor | None  # of y, None where the statistics are those of the patches
    mean: Tensor
    r: Tensor
    gamma: Tensor
    scale: Tensor  # of |gamma| r
    centred: Tensor  # p - mean, not a tangent
    d_centred: Tensor
    weight_cov: Tensor | None  # of w C


@torch.no_grad()
def meta_gradient(
    passes: Conv4Passes, theta: Tensor, support: Tensor, targets: Tensor, query: Tensor, query_targets: Tensor,
    *, lr: float, steps: int,
) -> Found:  # fmt: skip
    """The gradient of the query's loss after `steps` SGD steps of size `lr` on the support, with respect to theta [p].

    Support and query are images [s c h w] and [u c h w]; their targets [s q] and [u q] are probabilities.
    """
    images, weights, kept = lay(support[None], channels=passes.channels), theta[None], []
    for _ in range(steps):
        trace = passes.forward(weights, images)
        wrong = error(trace.logits, targets[None])
        gradient, slopes = passes.backward(trace, wrong, images)
        weights = weights - lr * gradient
        kept.append(Step(trace, slopes, wrong))
    asked = lay(query[None])
    trace = passes.forward(weights, asked)
    v, _ = passes.backward(trace, error(trace.logits, query_targets[None]), asked)
    logits, stats = trace.logits[0], passes.stats(weights, trace)[0]
    while kept:
        v = v - lr * hessian_product(passes, kept.pop(), images, v)
    return Found(v[0], logits, stats)


def hessian_product(passes: Conv4Passes, step: Step, images: Images, v: Tensor) -> Tensor:
    """The product of v [1 p] with the Hessian of the support's loss at the weights of a step."""
    trace, wrong = step.trace, step.error
    parts, d_head, d_bias = passes.parts(v)
    tangents: list[Tangent] = []
    d_x: Tensor | None = None
    for block, slope, part in zip(trace.blocks, step.slopes, parts, strict=True):
        tangent, d_x = _forward(block, slope, signed(part, block.sign), d_x, images)
        tangents.append(tangent)
    assert d_x is not None
    if trace.share is None:
        d_features, _ = passes.features(d_x, 1)
    else:
        d_features = (trace.share * d_x).sum((1, 2))[None]
    d_logits = torch.baddbmm(d_bias[:, None], d_features, trace.head.mT) + trace.features @ d_head.mT
    probabilities = trace.logits.softmax(-1)
    d_logits = d_logits - (probabilities * d_logits).sum(-1, keepdim=True)
    d_wrong = probabilities * d_logits / wrong.shape[1]
    gradient = passes.features_backward(d_wrong @ trace.head + wrong @ d_head, trace)
    found = []
    for i in reversed(range(passes.depth)):
        of_part, gradient = _backward(trace.blocks[i], step.slopes[i], tangents[i], gradient, images)
        found.append(signed(of_part, trace.blocks[i].sign))
    return passes.join(found[::-1], d_wrong.mT @ trace.features + wrong.mT @ d_features, d_wrong.sum(1))


def _forward(
    b: Block, s: Slope, part: tuple[Tensor, Tensor, Tensor], d_x: Tensor | None, images: Images
) -> tuple[Tangent, Tensor]:
    """The tangents of a block, and the tangent of its output."""
    d_weight, d_gamma, d_beta = part
    n, _, _, c = b.size
    if d_x is None:
        d_y = convolve(b.input, d_weight)
    else:  # conv(d_x, w) + conv(x, d_w) is one convolution of both inputs
        d_y = convolve(torch.cat([d_x, b.input], -1), torch.cat([b.weight, d_weight], 1))
    d_weight_cov = None
    if b.conv is None:
        assert images.patches is not None
        assert b.weight_cov is not None
        rows = d_weight.reshape(1, c, -1)
        d_weight_cov = rows @ images.patches.cov
        d_mean = (rows @ images.patches.mean[:, :, None]).flatten()
        d_var = 2 * (b.weight_cov * rows).sum(-1).flatten()
    else:
        values = d_y.view(-1, c)
        d_mean = values.mean(0)
        d_var = 2 * ((values * b.conv.view(-1, c)).mean(0) - b.mean * d_mean)
    d_r = -0.5 * s.r**3 * d_var
    d_scale = torch.addcmul(d_gamma * s.r, b.gamma, d_r)
    centred = b.pooled - b.mean
    d_centred = d_y.view(n, -1, c).gather(1, b.place).view_as(centred).sub_(d_mean)
    d_normed = torch.addcmul(d_beta, centred, d_scale).addcmul_(d_centred, b.gamma * s.r)
    d_output = torch.ops.aten.threshold_backward(d_normed, b.output, 0)
    kept = None if b.conv is None else d_y
    tangent = Tangent(d_x, d_weight, kept, d_mean, d_r, d_gamma, d_scale, centred, d_centred, d_weight_cov)
    return tangent, d_output


def _backward(
    b: Block, s: Slope, d: Tangent, d_gradient: Tensor, images: Images
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The tangents of a block's gradients (weight, |gamma|, beta), and the tangent of the gradient at its input."""
    n, _, _, c = b.size
    d_normed = torch.ops.aten.threshold_backward(d_gradient, b.output, 0)
    d_of_beta = d_normed.view(-1, c).sum(0)
    product = s.gamma / s.r  # sum of (gradient x centred)
    d_product = torch.addcmul(d_normed * d.centred, s.normed, d.d_centred).view(-1, c).sum(0)
    scale, r2 = b.gamma * s.r, s.r * s.r
    d_pooled = (d_normed * scale).addcmul_(s.normed, d.scale).view(n, -1, c)
    d_of_mean = -(d.scale * s.beta + scale * d_of_beta)
    d_of_var = -0.5 * ((d.gamma * r2 * s.r + 3 * b.gamma * r2 * d.r) * product + scale * r2 * d_product)
    d_of_gamma = d.r * product + s.r * d_product
    if b.conv is None:
        assert images.patches is not None
        assert b.weight_cov is not None
        assert d.weight_cov is not None
        d_at_y = spread(b, d_pooled, images.patches)
        d_of_weight = convolve_backward(d_at_y, b.input, b.weight, of_input=False)[1].reshape(1, c, -1)
        d_of_weight = d_of_weight + d_of_mean[:, None] * images.patches.mean
        d_of_weight = d_of_weight + 2 * (d_of_var[:, None] * b.weight_cov + s.var[:, None] * d.weight_cov)
        return (d_of_weight.view(b.weight.shape), d_of_gamma, d_of_beta), d_at_y
    assert s.slope is not None
    assert s.conv is not None
    assert d.conv is not None
    assert d.input is not None
    count = b.conv.numel() // c
    d_slope = d_of_var * (2 / count)
    d_at_y = torch.addcmul(d_of_mean / count - d_slope * b.mean - s.slope * d.mean, b.conv, d_slope)
    d_at_y.addcmul_(d.conv, s.slope).view(n, -1, c).scatter_add_(1, b.place, d_pooled)
    # Both terms of a product rule are one convolution: over twice the images, over twice the channels.
    d_of_weight = convolve_backward(
        torch.cat([d_at_y, s.conv]), torch.cat([b.input, d.input]), b.weight, of_input=False
    )[1]
    d_below = convolve_backward(
        torch.cat([d_at_y, s.conv], -1), b.input, torch.cat([b.weight, d.weight]), of_weight=False
    )[0]
    return (d_of_weight, d_of_gamma, d_of_beta), d_below
