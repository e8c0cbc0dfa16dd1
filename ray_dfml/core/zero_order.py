"""Zero-order gradients: the slope of a loss at an image, estimated from the answers to images near it.

[Hu2023b] Learning to Learn from APIs, arXiv 2305.18413: q directions u on the unit sphere of R^d and a displacement of
length mu give the estimate (d / q) sum_k u_k (l(x + mu u_k) - l(x)) / mu of the gradient. It has no bias for a linear
loss. Its squared error is then (d - 1) / q times that of the gradient itself, and its cosine to the gradient about
sqrt(q / (d + q - 1)), so it takes many images to say little: at q = 100 the cosine is 0.34 for 28x28 and 0.18 for
3x32x32.

Pixels are in [0, 1], and what is asked about stays there: the displacement that counts is the realised one, after
clamping, and after rounding where a service takes bytes. Everything is float32, since bfloat16 drowns the differences.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 2048
"""How many images are asked about in one call, or the images of one direction if these are more."""

Ask = Callable[[Tensor], Tensor]
"""Pixels [k n c h w] in [0, 1], k times the same n images displaced -> the loss [k n] of each."""


def least_mu(size: int) -> float:
    """The least mu that images of 8 bits can carry: a level, 1/255, in each of `size` pixels (root mean square)."""
    return math.sqrt(size) / 255


def cosine(size: int, directions: int) -> float:
    """The cosine of estimate and gradient to be expected for a linear loss of `size` pixels: sqrt(q / (d + q - 1))."""
    return math.sqrt(directions / (size + directions - 1))


def queries(images: int, directions: int, *, central: bool) -> int:
    """How many images are asked about to estimate the gradients of `images` images and to know their losses."""
    return images * (1 + directions * (2 if central else 1))


def on_sphere(rng: torch.Generator, count: int, shape: torch.Size) -> Tensor:
    """Directions [count n c h w], uniform on the unit sphere of one image, one for each of n images."""
    drawn = torch.stack([torch.randn(shape, generator=rng) for _ in range(count)])
    return drawn / drawn.flatten(2).norm(dim=2).clamp_min(1e-12).view(count, shape[0], *(1,) * (len(shape) - 1))


def to_levels(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] rounded to 8 bits."""
    return (pixels * 255).round() / 255


def gradient(
    ask: Ask, pixels: Tensor, *, rng: torch.Generator, directions: int, mu: float, central: bool = False,
    eight_bit: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss [n] at images [n c h w] in [0, 1], and an estimate [n c h w] of its gradient.

    `ask` gives the loss of each displaced image. Forward differences ask about 1 + q images for each image, central
    ones about 1 + 2 q, with an error of the order of mu^2 instead of mu. With `eight_bit` all images are rounded to 8
    bits. A direction that moves no pixel adds nothing, so the gradient is 0 if mu is too small to change a level.
    """
    centre = (to_levels if eight_bit else _same)(pixels.detach().float().clamp(0, 1))
    size = centre[0].numel()
    loss = ask(centre[None])[0]
    total = torch.zeros_like(centre)
    each = max(1, AT_ONCE // (len(centre) * (2 if central else 1)))
    for start in range(0, directions, each):
        u = on_sphere(rng, min(each, directions - start), centre.shape).to(centre.device)
        ahead = _moved(centre, mu * u, eight_bit)
        if central:
            behind = _moved(centre, -mu * u, eight_bit)
            asked = ask(torch.cat([ahead, behind]))
            step, rise = ahead - behind, asked[: len(u)] - asked[len(u) :]
        else:
            step, rise = ahead - centre, ask(ahead) - loss
        length = step.flatten(2).square().sum(2)
        slope = torch.where(length > 0, rise / length.clamp_min(1e-30), torch.zeros_like(rise))
        total += (step * slope[..., None, None, None]).sum(0)
    return loss, total * (size / directions)


def _moved(centre: Tensor, step: Tensor, eight_bit: bool) -> Tensor:
    return (to_levels if eight_bit else _same)((centre + step).clamp(0, 1))


def _same(pixels: Tensor) -> Tensor:
    return pixels
