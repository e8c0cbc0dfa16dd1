"""Random shapes: ellipses, boxes and triangles, full or hollow."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.images import fit
from ray_dfml.core.sources.draws import GROUP, axes, chance, channel_mixed, grouped, standardised, uniform

CANVAS = 28
"""Units of length a side. Smaller images are drawn with this many pixels and shrunk."""
GREY = (1.0, 0.8, 0.6, 0.4, 0.3)
COLOUR = (1.0, 0.7, 0.5, 0.3)
"""Probability of each shape of an image."""


def shapes(rng: torch.Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images [n c h w] of overlapping ellipses, boxes and triangles of any size and angle.

    Grey images have one to five on black, a third of them outlines, in a plain grey; every fifth is black and so cuts
    a hole. Colour images have one to four, each with a smooth random texture, on a smooth random ground.

    It assumes that the data show plain shapes: bright ones on black in grey, textured ones on a soft ground in colour.
    """
    canvas = (shape[0], max(shape[1], CANVAS), max(shape[2], CANVAS))
    draw = _grey if shape[0] == 1 else _colour
    return grouped(lambda: fit(draw(rng, canvas), shape).clamp(0, 1), count, shape)


def _grey(rng: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
    image = torch.zeros(GROUP, *shape)
    for number, probability in enumerate(GREY):
        depth = _depth(rng, shape, low=1, high=9, centre=(7, 21))
        outline = torch.where(chance(rng, GROUP, 0.35), 1.2 - (depth - 1.2).abs(), depth)
        grey = uniform(rng, GROUP, 1, 1, 1, low=0.5 if number else 0.6)
        if number:
            grey = torch.where(chance(rng, GROUP, 0.2), torch.zeros(()), grey)
        mask = torch.sigmoid(3 * outline) * chance(rng, GROUP, probability)
        image = image * (1 - mask) + grey * mask
    return image


def _colour(rng: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
    image = _texture(rng, shape)
    for probability in COLOUR:
        depth = _depth(rng, shape, low=1.75, high=11.4, centre=(6.1, 21.9))
        mask = torch.sigmoid(2 * depth) * chance(rng, GROUP, probability)
        texture = 0.5 * _texture(rng, shape) + 0.5 * uniform(rng, GROUP, shape[0], 1, 1)
        image = image * (1 - mask) + texture * mask
    return image


def _depth(
    rng: torch.Generator, shape: tuple[int, int, int], *, low: float, high: float, centre: tuple[float, float]
) -> Tensor:
    """How deep each pixel lies in a random shape, [n 1 h w] in units of length; outside it is negative."""
    x, y = ((axis + 1) * CANVAS / 2 for axis in axes(*shape[1:]))
    middle = uniform(rng, 2, GROUP, 1, 1, 1, low=centre[0], high=centre[1])
    angle, half = uniform(rng, GROUP, 1, 1, 1, high=math.pi), uniform(rng, 2, GROUP, 1, 1, 1, low=low, high=high)
    x, y = x - middle[0], y - middle[1]
    p, q = (x * angle.cos() + y * angle.sin()) / half[0], (y * angle.cos() - x * angle.sin()) / half[1]
    ellipse = 1 - (p * p + q * q).sqrt()
    box = 1 - torch.maximum(p.abs(), q.abs())
    triangle = torch.minimum(1 - q.abs(), (q + 1) / 2 - p.abs())
    kind = uniform(rng, GROUP, 1, 1, 1)
    found = torch.where(kind < 0.4, ellipse, torch.where(kind < 0.75, box, triangle))
    return found * torch.minimum(half[0], half[1])


def _texture(rng: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
    """Smooth random textures [n c h w] in (0, 1): noise of five scales, each of a random strength."""
    channels, height, width = shape
    total = torch.zeros(GROUP, *shape)
    for knots in (1, 2, 4, 8, 16):
        noise = channel_mixed(rng, channels, GROUP, knots + 2, knots + 2).transpose(0, 1)
        grown = F.interpolate(noise, (height + 6, width + 6), mode="bicubic")[..., 3:-3, 3:-3]
        total = total + uniform(rng, GROUP, 1, 1, 1) ** 2 * grown
    gain = uniform(rng, GROUP, 1, 1, 1, low=-0.5).exp()
    return torch.sigmoid(
        gain * (standardised(total, (1, 2, 3)) - uniform(rng, GROUP, channels, 1, 1, low=-0.8, high=0.8))
    )
