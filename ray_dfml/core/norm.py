"""Batch normalisation as functions of tensors [n c h w] or [n c]; statistics are means and biased variances [c].

In torch 2.13 the built-in layer returned wrong second-order gradients under `vmap`. The functions written out here are
exact in a loop, under `vmap` and when differentiated twice. The built-in layer is used where at most one backward pass
follows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [c] of each channel of `x`, differentiable any number of times."""
    axes = _axes(x)
    mean = x.mean(axes)
    return mean, (x - _broadcast(mean, x)).square().mean(axes)


def normalised(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + EPS) * weight + bias per channel, differentiable any number of times."""
    scale = weight * (var + EPS).rsqrt()
    return (x - _broadcast(mean, x)) * _broadcast(scale, x) + _broadcast(bias, x)


def scaled(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """scale x + offset per channel, differentiable any number of times."""
    return torch.addcmul(_broadcast(offset, x), x, _broadcast(scale, x))


def native_of_batch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x` normalised with its own moments by the built-in layer. It allows one backward pass and no `vmap`."""
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)


def native_with_moments(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`native_of_batch`, and the moments [c] of `x`, which carry no gradient."""
    y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, EPS)
    return y, mean.detach(), (inverse.detach().pow(-2) - EPS).clamp_min(0)


class OnePassMoments(torch.autograd.Function):
    """`moments` with a backward pass that reads `x` once. It cannot be differentiated twice, nor used under `vmap`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [c]."""
        rows = _channels_last(x).reshape(-1, x.shape[1])
        mean = rows.mean(0)
        ctx.save_for_backward(x, mean)
        return mean, (rows - mean).square_().mean(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradient at `x`: g_mean / m + 2 g_var (x - mean) / m, where a channel has m values."""
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = grads[1] * (2 / count)
        level = grads[0] / count - slope * mean
        found = torch.addcmul(level, _channels_last(x), slope)
        return found.permute(0, 3, 1, 2) if x.dim() == 4 else found


def _channels_last(x: Tensor) -> Tensor:
    """A view [n h w c] or [n c], over which a vector [c] broadcasts."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def _axes(x: Tensor) -> tuple[int, ...]:
    return (0, 2, 3) if x.dim() == 4 else (0,)


def _broadcast(channels: Tensor, x: Tensor) -> Tensor:
    return channels[:, None, None] if x.dim() == 4 else channels
