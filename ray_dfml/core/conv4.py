"""Passes of a Conv4 written by hand: logits, gradients, batch-norm statistics, and steps of adaptation.

They compute what autograd computes through `net.Net` with batch statistics, in about a third of its time on a CPU.
Letters in shapes: t learners (weight vectors), p weights, n images, h w height and width, c channels of a block,
k = 9 x c entries of a 3x3 input patch, f features, q outputs. Activations are `[n h w t*c]`. Channels come last, so
that a vector with one entry per channel broadcasts; t learners are t groups of channels of one convolution.

A block is y = conv(x, w), then batch norm, max-pooling and ReLU. Four identities make it cheap:

* Batch norm is invariant to the sign of its input: y gamma = (s y) |gamma|. With s = sign(gamma) in the convolution,
  the largest value of a window stays the largest, so pooling comes before the norm, on a quarter of the values:
  p = max y, a = relu(|gamma| r (p - mean) + beta), r = (var + eps)^(-1/2).
* Mean and variance are two numbers per channel. The gradient that reaches y through them is A + B y with vectors A, B,
  to which the pooled gradient is added at the places of the largest values.
* The input of the first block is the same in all steps of an adaptation. The statistics of y therefore follow from the
  mean m [k] and the covariance C [k k] of the input's patches: mean = w m, var = w C w'. The gradient at y is then kept
  only at the places of the largest values, and y itself need not be kept.
* The loss is the cross-entropy to targets that sum to one, so its gradient with respect to the logits is
  softmax - target. The divergence KL(target || softmax) has the same gradient.

Ties get the gradient that autograd gives them: the first of equal values in a window receives it, and a ReLU at 0
passes none. Where gamma is 0, all values of a window are equal.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.backbones import Conv4
from ray_dfml.core.layers import channels_last
from ray_dfml.core.net import Net
from ray_dfml.core.norm import EPS

ROWS = 8192
"""How many rows `moments` takes at a time: 1 MiB for 32 channels."""


class Patches(NamedTuple):
    """Mean [t k] and covariance [t k k] of the 3x3 patches of the images of t learners.

    Every step writes the gradient at y of the first block into `room` [n h w t*c], the largest tensor of all, since
    allocating it anew is slow.
    """

    mean: Tensor
    cov: Tensor
    room: Tensor


class Images(NamedTuple):
    """Images [n h w t*c] of t learners. They come with their patches if the learners adapt to them."""

    values: Tensor
    patches: Patches | None = None


class Block(NamedTuple):
    """What a forward pass keeps of one block; t*c is the number of its channels over all learners."""

    input: Tensor
    weight: Tensor  # [t*c c 3 3], with the sign of gamma
    conv: Tensor | None  # y [n h w t*c]; None where the statistics are those of the patches
    size: torch.Size  # of y
    pooled: Tensor  # p [n h/2 w/2 t*c]
    place: Tensor  # of the largest value of each window, in h*w: [n h/2*w/2 t*c]
    mean: Tensor  # of y [t*c]
    var: Tensor
    gamma: Tensor  # |gamma|
    sign: Tensor | None  # of gamma, None if all are positive
    output: Tensor  # a
    weight_cov: Tensor | None  # w C [t*c k]


class Trace(NamedTuple):
    """A forward pass: logits [t n q], blocks, features [t n f] and the head's weight [t q f].

    `share` [n h w t*c] is for the adaptive network, None for others. It says how the gradient of a feature is divided
    among the values of its channel: all goes to the largest, and equal ones divide it evenly.
    """

    logits: Tensor
    blocks: list[Block]
    features: Tensor
    head: Tensor
    share: Tensor | None


class Slope(NamedTuple):
    """What a backward pass keeps of one block for the Hessian; the names are those of the module's docstring."""

    normed: Tensor  # gradient at the normalised values, after the ReLU's mask [n h/2 w/2 t*c]
    conv: Tensor | None  # gradient at y
    beta: Tensor  # gradients of beta and of |gamma| [t*c]
    gamma: Tensor
    r: Tensor
    var: Tensor  # gradient of the variance
    slope: Tensor | None  # B


def nchw(a: Tensor) -> Tensor:
    """`[n h w c]` viewed as `[n c h w]`."""
    return a.permute(0, 3, 1, 2)


def nhwc(a: Tensor) -> Tensor:
    """`[n c h w]` viewed as `[n h w c]`."""
    return a.permute(0, 2, 3, 1)


def convolve(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """The 3x3 convolution [n h w o] of images [n h w c], zero-padded, without a bias."""
    return nhwc(torch.conv2d(nchw(x), channels_last(weight), None, 1, 1, 1, groups)).contiguous()


def convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, *, of_input: bool = True, of_weight: bool = True, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Gradients of `convolve` with respect to its input and its weight, from the gradient at its output.

    A gradient that is not asked for is an empty tensor.
    """
    ones, wanted = [1, 1], [of_input, of_weight, False]
    gradient, x, weight = nchw(gradient), nchw(x), channels_last(weight)
    found = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, ones, ones, ones, False, [0, 0], groups, wanted
    )
    return nhwc(found[0]) if of_input else x.new_empty(0), found[1] if of_weight else x.new_empty(0)


def lay(images: Tensor, *, channels: int = 0) -> Images:
    """Lay out images [t n c h w] so that each learner is a group of channels.

    With `channels`, the number of channels of a learner's first block, the patches are computed too. A convolution with
    the identity as its weight writes out all patches, and the gradient with respect to that weight is the sum of their
    products.
    """
    t, n, c, h, w = images.shape
    x = nhwc(channels_last(images.transpose(0, 1).reshape(n, t * c, h, w)))
    if not channels:
        return Images(x)
    k = 9 * c
    identity = torch.eye(k, dtype=x.dtype, device=x.device).view(k, c, 3, 3).repeat(t, 1, 1, 1)
    found = convolve(x, identity, t)
    mean = found.mean((0, 1, 2))
    products = convolve_backward(found.sub_(mean), x, identity, of_input=False, groups=t)[1]
    cov = products.reshape(t, k, k) / (n * h * w)
    return Images(x, Patches(mean.view(t, k), cov, x.new_empty(n, h, w, t * channels)))


def error(logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient [... n q] of the mean cross-entropy with respect to logits [... n q].

    Targets are probabilities [... n way]. Outputs from `way` on take no part in the loss.
    """
    way = targets.shape[-1]
    found = (logits[..., :way].softmax(-1) - targets) / targets.shape[-2]
    return F.pad(found, (0, logits.shape[-1] - way)) if way < logits.shape[-1] else found


class Conv4Passes:
    """The passes of one Conv4 of any input, width and number of outputs. Weights are `[t p]` in the order of `net`."""

    def __init__(self, net: Net) -> None:
        assert isinstance(net.backbone, Conv4)
        self.net, self.depth, self.adaptive = net, len(net.backbone.norms), net.backbone.adaptive
        self.channels = net.backbone.norms["blocks.0.norm"]

    def parts(self, theta: Tensor) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor, Tensor]:
        """Split weights [t p] into (weight [t*c c 3 3], gamma [t*c], beta [t*c]) of each block, and the head's weight
        [t q f] and bias [t q]."""
        layout = self.net.layout
        named = dict(zip(layout.shapes, torch.split(theta, layout.sizes, 1), strict=True))
        blocks = []
        for i in range(self.depth):
            weight = named[f"blocks.{i}.conv.weight"].reshape(-1, *layout.shapes[f"blocks.{i}.conv.weight"][1:])
            gamma, beta = (named[f"blocks.{i}.norm.{name}"].reshape(-1) for name in ("weight", "bias"))
            blocks.append((channels_last(weight), gamma, beta))
        return blocks, named["head.weight"].view(len(theta), *layout.shapes["head.weight"]), named["head.bias"]

    def join(self, blocks: list[tuple[Tensor, Tensor, Tensor]], head: Tensor, bias: Tensor) -> Tensor:
        """Join gradients, in the form that `parts` returns, to one tensor [t p].

        The biases of the convolutions get the gradient 0, since batch norm cancels them.
        """
        t, found = len(bias), []
        for weight, gamma, beta in blocks:
            found += [weight.reshape(t, -1), torch.zeros_like(beta).view(t, -1), gamma.view(t, -1), beta.view(t, -1)]
        return torch.cat([*found, head.flatten(1), bias], 1)

    def forward(self, theta: Tensor, images: Images) -> Trace:
        """Logits of each learner on its own images, normalised with their own statistics."""
        parts, head, bias = self.parts(theta)
        t, x, blocks = len(theta), images.values, []
        for i, (weight, gamma, beta) in enumerate(parts):
            sign = None
            if not bool((gamma > 0).all()):
                sign = torch.where(gamma < 0, -1.0, 1.0).to(gamma)
                weight = weight * sign[:, None, None, None]
            block = _block(x, weight, gamma, sign, beta, images.patches if i == 0 else None, t)
            blocks.append(block)
            x = block.output
        features, share = self.features(x, t)
        return Trace(torch.baddbmm(bias[:, None], features, head.mT), blocks, features, head, share)

    def features(self, a: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """Features [t n f] of the last block's output, as `Conv4.features` orders them, and `Trace.share`."""
        if self.adaptive:
            top = a.amax((1, 2), keepdim=True)
            share = (a == top).to(a.dtype)
            return top.view(len(a), t, -1).transpose(0, 1), share / share.sum((1, 2), keepdim=True)
        n, h, w, _ = a.shape
        return a.view(n, h, w, t, -1).permute(3, 0, 4, 1, 2).reshape(t, n, -1), None

    def features_backward(self, gradient: Tensor, trace: Trace) -> Tensor:
        """Gradient at the last block's output from that at the features [t n f]."""
        t, n, _ = gradient.shape
        if trace.share is not None:
            return trace.share * gradient.transpose(0, 1).reshape(n, 1, 1, -1)
        _, h, w, _ = trace.blocks[-1].output.shape
        return gradient.view(t, n, -1, h, w).permute(1, 3, 4, 0, 2).reshape(n, h, w, -1)

    def backward(self, trace: Trace, error: Tensor, images: Images) -> tuple[Tensor, list[Slope]]:
        """Gradients [t p], from the gradient `error` [t n q] at the logits, and what the Hessian needs of each block.

        Images without patches promise that no Hessian follows; then the gradient at y overwrites y in the trace.
        """
        t, gradient = len(error), self.features_backward(error @ trace.head, trace)
        slopes, found = [], []
        for i in reversed(range(self.depth)):
            b = trace.blocks[i]
            slope, of_gamma, at_y = _through_norm(b, gradient, images.patches)
            if b.weight_cov is None:
                gradient, of_weight = convolve_backward(at_y, b.input, b.weight, of_input=i > 0, groups=t)
            else:
                assert images.patches is not None
                of_weight = convolve_backward(at_y, b.input, b.weight, of_input=False, groups=t)[1]
                of_mean = (-b.gamma * slope.r * slope.beta).view(t, -1, 1) * images.patches.mean[:, None]
                of_weight = of_weight.reshape(t, -1, of_mean.shape[-1]) + of_mean
                of_weight = (of_weight + 2 * slope.var.view(t, -1, 1) * b.weight_cov).view(b.weight.shape)
            slopes.append(slope)
            found.append(signed((of_weight, of_gamma, slope.beta), b.sign))
        return self.join(found[::-1], error.mT @ trace.features, error.sum(1)), slopes[::-1]

    def stats(self, theta: Tensor, trace: Trace) -> Tensor:
        """Mean and biased variance [t k] that the images have at each batch norm, laid out as `net.stats_layout`."""
        layout = self.net.layout
        named = dict(zip(layout.shapes, torch.split(theta, layout.sizes, 1), strict=True))
        found = []
        for i, b in enumerate(trace.blocks):
            mean = b.mean if b.sign is None else b.mean * b.sign
            found += [mean.view(len(theta), -1) + named[f"blocks.{i}.conv.bias"], b.var.view(len(theta), -1)]
        return torch.cat(found, 1)

    @torch.no_grad()
    def adapt(self, theta: Tensor, support: Tensor, targets: Tensor, *, lr: float, steps: int) -> Tensor:
        """Weights [t p] after `steps` SGD steps from theta [t p], where each learner has its own support [t s c h w].

        `targets` are probabilities [t s way] of the first `way` outputs.
        """
        images = lay(support, channels=self.channels)
        for _ in range(steps):
            trace = self.forward(theta, images)
            theta = theta - lr * self.backward(trace, error(trace.logits, targets), images)[0]
        return theta


def _block(
    x: Tensor, weight: Tensor, gamma: Tensor, sign: Tensor | None, beta: Tensor, patches: Patches | None, t: int
) -> Block:
    """The forward pass of a block. `patches` are given for the first block of an adaptation alone."""
    y = convolve(x, weight, t)
    n, h, w, c = y.shape
    pooled, place = (nhwc(part) for part in F.max_pool2d(nchw(y), 2, return_indices=True))
    place = place.reshape(n, -1, c)
    if sign is not None and bool((gamma == 0).any()):
        first = 2 * (w * torch.arange(h // 2, device=y.device)[:, None] + torch.arange(w // 2, device=y.device))
        place = torch.where(gamma == 0, first.view(-1, 1), place)
        pooled = y.view(n, -1, c).gather(1, place).view_as(pooled)
    weight_cov = None
    if patches is not None:
        rows = weight.reshape(t, -1, patches.mean.shape[1])
        weight_cov = rows @ patches.cov
        mean = (rows @ patches.mean[:, :, None]).flatten()
        var = (weight_cov * rows).sum(-1).flatten()
    else:
        mean, var = moments(y.view(-1, c))
    gamma = gamma.abs()
    normed = torch.batch_norm(nchw(pooled), gamma, beta, mean, var, False, 0.0, EPS, False)
    return Block(
        x, weight, y if weight_cov is None else None, y.shape, pooled, place, mean, var, gamma, sign,
        nhwc(torch.relu_(normed)), weight_cov,
    )  # fmt: skip


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [c] of rows [m c]. The rows are read in pieces that stay in a core's cache."""
    mean = rows.mean(0)
    return mean, torch.stack([(part - mean).square_().sum(0) for part in rows.split(ROWS)]).sum(0) / len(rows)


def _through_norm(b: Block, gradient: Tensor, patches: Patches | None) -> tuple[Slope, Tensor, Tensor]:
    """Carry the gradient at a block's output back to y.

    Returns the block's `Slope`, the gradient of |gamma|, and the gradient at y [n h w t*c]. Where the statistics are
    those of the patches, the last one lacks the part that comes through the statistics.
    """
    n, c = b.size[0], b.size[3]
    normed = torch.ops.aten.threshold_backward(gradient, b.output, 0)
    pooled, of_gamma, of_beta = torch.ops.aten.native_batch_norm_backward(
        nchw(normed), nchw(b.pooled), b.gamma, b.mean, b.var, None, None, False, EPS, [True, True, True]
    )
    pooled = nhwc(pooled).reshape(n, -1, c)
    r = (b.var + EPS).rsqrt()
    scale = b.gamma * r
    of_var = -0.5 * scale * r * of_gamma
    if b.conv is None:
        assert patches is not None
        return Slope(normed, None, of_beta, of_gamma, r, of_var, None), of_gamma, spread(b, pooled, patches)
    count = b.conv.numel() // c
    slope = of_var * (2 / count)
    room = b.conv if patches is None else None
    at_y = torch.addcmul(-scale * of_beta / count - slope * b.mean, b.conv, slope, out=room)
    at_y.view(n, -1, c).scatter_add_(1, b.place, pooled)
    return Slope(normed, at_y, of_beta, of_gamma, r, of_var, slope), of_gamma, at_y


def spread(b: Block, pooled: Tensor, patches: Patches) -> Tensor:
    """Put pooled values [n h/2*w/2 t*c] of the first block at the places of the largest values of y [n h w t*c].

    All other places are 0.
    """
    room = patches.room.zero_()
    room.view(len(room), -1, room.shape[-1]).scatter_(1, b.place, pooled)
    return room


def signed(part: tuple[Tensor, Tensor, Tensor], sign: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A block's weight, gamma and beta, or their gradients, where weight and gamma are multiplied by gamma's sign."""
    if sign is None:
        return part
    weight, gamma, beta = part
    return weight * sign[:, None, None, None], gamma * sign, beta
