"""Changed copies of images that were already asked about."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.sources.draws import GROUP, axes, grouped, uniform
from ray_dfml.core.sources.warp import Warp, warp

STRENGTH = Warp(rotation=0.35, scale=0.2, shear=0.2, shift=0.12, elastic=0.08, aspect=0.15)


def mutants(rng: torch.Generator, count: int, parents: Tensor, labels: Tensor, *, fill: str = "zero") -> Tensor:
    """Changed copies [n c h w], in [0, 1], of `parents` [m c h w], whose labels are int64 [m].

    The parents are pixels in [0, 1] or bytes (uint8). They are drawn so that each label is equally likely, then
    warped. 40 % stay alone. The others meet a second parent, likewise warped: 20 % by the maximum, 15 % by a blend,
    15 % along a straight cut, and from 10 % the second is taken away. At last 15 % are dilated, 10 % blurred, and 10 %
    get more contrast. `fill` is what lies outside of an image, as in `warp`.

    It assumes that such images resemble the data as much as their parents do. Raises ValueError without parents.
    """
    if not len(parents):
        raise ValueError("mutants need at least one parent image")
    shape = (parents.shape[1], parents.shape[2], parents.shape[3])
    counts = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
    weights = 1 / counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))[labels]

    def parent() -> Tensor:
        drawn = parents[torch.multinomial(weights, GROUP, replacement=True, generator=rng)]
        drawn = drawn.float() / 255 if drawn.dtype == torch.uint8 else drawn
        return warp(rng, drawn, STRENGTH, fill=fill)

    def make() -> Tensor:
        return _altered(rng, _joined(rng, parent(), parent())).clamp(0, 1)

    return grouped(make, count, shape)


def _joined(rng: torch.Generator, one: Tensor, other: Tensor) -> Tensor:
    """Pairs of images joined in one of five ways, of which the first leaves `one` as it is."""
    n = len(one)
    x, y = axes(*one.shape[2:])
    share = uniform(rng, n, 1, 1, 1, low=0.35, high=0.65)
    slope = uniform(rng, 2, n, 1, 1, 1, low=-1)
    side = (slope[0] * x + slope[1] * y > uniform(rng, n, 1, 1, 1, low=-0.2, high=0.2)).float()
    ways = [
        (0.4, one),
        (0.6, torch.maximum(one, other)),
        (0.75, one * share + other * (1 - share)),
        (0.9, one * side + other * (1 - side)),
    ]
    found, how = (one - 0.9 * other).clamp(min=0), uniform(rng, n, 1, 1, 1)
    for below, way in reversed(ways):
        found = torch.where(how < below, way, found)
    return found


def _altered(rng: torch.Generator, x: Tensor) -> Tensor:
    """15 % of the images dilated, 10 % blurred, 10 % with more contrast, the rest as they are."""
    how = uniform(rng, len(x), 1, 1, 1)
    found = torch.where(how < 0.35, (x - 0.4) * 2 + 0.3, x)
    found = torch.where(how < 0.25, F.avg_pool2d(x, 3, 1, 1), found)
    return torch.where(how < 0.15, F.max_pool2d(x, 3, 1, 1), found)
