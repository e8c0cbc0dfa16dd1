"""Random strokes of a pen."""

import math

import torch
from torch import Tensor

from ray_dfml.core.images import fit
from ray_dfml.core.sources.draws import GROUP, axes, grouped, uniform
from ray_dfml.core.sources.shapes import CANVAS

STROKES, KNOTS, POINTS = 3, 5, 28
"""Strokes of an image at most, control points of a stroke, and points at which a stroke is drawn."""
PRESENT = (1.0, 0.65, 0.3)
"""Probability that a stroke is there; a stroke that is there may be cut short."""


def strokes(rng: torch.Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images [n c h w] of one to three strokes, bright on black, near the middle.

    A stroke is a Bezier curve of five control points (60 %), the broken line through them (20 %), or between the two.
    Every fifth is closed; half begin on the stroke before. Width, softness and brightness are drawn for each image; in
    colour, so is the tint.

    It assumes one to three bright strokes of a pen on black.
    """
    height, width = max(shape[1], CANVAS), max(shape[2], CANVAS)

    def make() -> Tensor:
        distance = _distance(_points(rng), height, width)
        radius, softness = (uniform(rng, GROUP, 1, 1, 1, low=a, high=b) for a, b in ((0.5, 1.9), (0.25, 0.7)))
        ink = uniform(rng, GROUP, 1, 1, 1, low=0.75)
        if shape[0] > 1:
            ink = ink * uniform(rng, GROUP, shape[0], 1, 1, low=0.5)
        image = torch.sigmoid(1.5 * (radius - distance) / softness) * ink
        return fit(image, shape).clamp(0, 1)

    return grouped(make, count, shape)


def _points(rng: torch.Generator) -> Tensor:
    """Points of the strokes of a group of images, [n p 2], in units of length. Strokes that are not there add none."""
    middle = uniform(rng, GROUP, 1, 1, 2, low=11.5, high=16.5)
    extent = uniform(rng, GROUP, 1, 1, 2, low=4, high=10)
    knots = middle + extent * uniform(rng, GROUP, STROKES, KNOTS, 2, low=-1)
    closed = uniform(rng, GROUP, STROKES, 1) < 0.2
    knots[:, :, -1] = torch.where(closed, knots[:, :, 0], knots[:, :, -1])
    for number in range(1, STROKES):
        joined = uniform(rng, GROUP, 1) < 0.5
        start = knots[:, number - 1, 2 if number % 2 else 4]
        knots[:, number, 0] = torch.where(joined, start, knots[:, number, 0])
    roundness = uniform(rng, GROUP, STROKES, 1, 1, low=-1, high=4).clamp(0, 1)
    time = torch.linspace(0, 1, POINTS)
    curves = torch.einsum("pk,nskx->nspx", _bernstein(time), knots)
    points = roundness * curves + (1 - roundness) * torch.einsum("pk,nskx->nspx", _hats(time), knots)
    drawn = time <= uniform(rng, GROUP, STROKES, 1, low=0.3, high=1.1)
    drawn &= (uniform(rng, GROUP, STROKES) < torch.tensor(PRESENT))[..., None]
    first = points[:, :1, :1]  # it is always there, and a point drawn twice changes nothing
    return torch.where(drawn[..., None], points, first).flatten(1, 2)


def _bernstein(time: Tensor) -> Tensor:
    """Weights [p k] of the control points of a Bezier curve at times [p]."""
    degree = KNOTS - 1
    return torch.stack([math.comb(degree, k) * time**k * (1 - time) ** (degree - k) for k in range(KNOTS)], 1)


def _hats(time: Tensor) -> Tensor:
    """Weights [p k] of the control points of the broken line at times [p]."""
    return (1 - (time[:, None] * (KNOTS - 1) - torch.arange(KNOTS)).abs()).clamp(min=0)


def _distance(points: Tensor, height: int, width: int) -> Tensor:
    """Distance [n 1 h w] of each pixel to the nearest of the points [n p 2] of its image."""
    x, y = ((axis + 1) * CANVAS / 2 for axis in axes(height, width))
    nearest = torch.full((len(points), 1, height, width), math.inf)
    for point in points.unbind(1):
        across, down = (x - point[:, 0].view(-1, 1, 1, 1)) ** 2, (y - point[:, 1].view(-1, 1, 1, 1)) ** 2
        nearest = torch.minimum(nearest, across + down)
    return nearest.sqrt()
