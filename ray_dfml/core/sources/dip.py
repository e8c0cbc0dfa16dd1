"""Images of random convolutional networks, whole (`dip`), in a round window (`dipw`) and joined to collages (`dipc`).

The name is that of the deep image prior (Ulyanov et al., arXiv 1711.10925): what an untrained convolutional network
puts out looks more like an image than like noise. Here the networks are small and never trained.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.sources.draws import GROUP, axes, chance, channel_mixed, grouped, normal, pick, standardised, uniform

ACTIVATIONS = (torch.relu, lambda t: F.leaky_relu(t, 0.2), torch.tanh, lambda t: torch.sin(2 * t))
PIECES = (1.0, 0.65, 0.35)
"""Probability of each piece of a collage."""


def dip(rng: torch.Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images [n c h w] of random networks, a new one for each group of images.

    A network turns normal noise of 2 to 7 pixels a side into an image in one to three stages of resizing, 3x3
    convolution, standardisation and an activation. Contrast and brightness are drawn for each image. Grey images are
    more often dark than light, as where an object stands on a dark ground; colour images are as often light.

    It assumes that neighbouring pixels are alike at some scale, and nothing about objects.
    """
    return grouped(lambda: _network_images(rng, shape), count, shape)


def _network_images(rng: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    features, side, stages = pick(rng, (4, 8, 12)), pick(rng, (2, 3, 4, 5, 7)), pick(rng, (1, 2, 3))
    x = normal(rng, GROUP, features, side, side)
    for stage in range(1, stages + 1):
        size = [round(side + (full - side) * stage / stages) for full in (height, width)]
        x = F.interpolate(x, size, mode=pick(rng, ("nearest", "bilinear")))
        x = F.conv2d(x, normal(rng, features, features, 3, 3) / math.sqrt(9 * features), padding=1)
        x = pick(rng, ACTIVATIONS)(standardised(x, (0, 2, 3)))
    kernel = channel_mixed(rng, channels, features, 3, 3) / math.sqrt(9 * features)
    x = standardised(F.conv2d(x, kernel, padding=1), (1, 2, 3))
    if channels == 1:
        gain, threshold = uniform(rng, GROUP, 1, 1, 1, high=2.3).exp(), uniform(rng, GROUP, 1, 1, 1, low=-0.7, high=1.8)
    else:
        gain = uniform(rng, GROUP, 1, 1, 1, low=-0.3, high=1.5).exp()
        cast = 0.4 * normal(rng, GROUP, channels, 1, 1)
        threshold = uniform(rng, GROUP, 1, 1, 1, low=-1, high=1) - cast
    return torch.sigmoid(gain * (x - threshold))


def dipw(rng: torch.Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images [n c h w] of `dip`, 70 % of them in a soft round window of 0.35 to 1 half-widths; black is around it.

    It assumes one textured object in the middle of a dark ground.
    """
    x, y = axes(*shape[1:])
    radius = (x * x + y * y).sqrt()

    def make() -> Tensor:
        window = torch.sigmoid(12 * (uniform(rng, GROUP, 1, 1, 1, low=0.35) - radius))
        return _network_images(rng, shape) * torch.where(chance(rng, GROUP, 0.7), window, torch.ones(()))

    return grouped(make, count, shape)


def dipc(rng: torch.Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Collages [n c h w] of up to three pieces of `dip` on black.

    A piece is an image in a round or square window, rotated by any angle, shrunk by up to five times along each axis,
    and shifted. The second and the third lie over what is there (half of them), are joined to it by the maximum, or
    are taken away from it.

    It assumes up to three textured objects that overlap on a dark ground.
    """
    x, y = axes(*shape[1:])
    windows = [torch.sigmoid(12 * (0.9 - r)) for r in ((x * x + y * y).sqrt(), torch.maximum(x.abs(), y.abs()))]

    def make() -> Tensor:
        collage = torch.zeros(GROUP, *shape)
        for number, probability in enumerate(PIECES):
            window = torch.where(chance(rng, GROUP, 0.5), *windows)
            piece = _placed(rng, torch.cat([_network_images(rng, shape), window], 1))
            piece, mask = piece[:, :-1], piece[:, -1:]
            how = uniform(rng, GROUP, 1, 1, 1)
            over = collage * (1 - mask) + piece * mask
            joined = torch.where(how < 0.8, torch.maximum(collage, piece * mask), (collage - piece * mask).clamp(min=0))
            joined = over if number == 0 else torch.where(how < 0.5, over, joined)
            collage = torch.where(chance(rng, GROUP, probability), joined, collage)
        return collage

    return grouped(make, count, shape)


def _placed(rng: torch.Generator, x: Tensor) -> Tensor:
    """Pieces [n c h w], each rotated, shrunk and shifted. Outside of them is 0."""
    n = len(x)
    angle = uniform(rng, n, high=2 * math.pi)
    shrink_x, shrink_y = uniform(rng, n, high=1.6).exp(), uniform(rng, n, high=1.6).exp()
    shift_x, shift_y = uniform(rng, n, low=-0.45, high=0.45), uniform(rng, n, low=-0.45, high=0.45)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos, -sin, sin * shift_y - cos * shift_x], 1) * shrink_x[:, None]
    row_y = torch.stack([sin, cos, -(sin * shift_x + cos * shift_y)], 1) * shrink_y[:, None]
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
