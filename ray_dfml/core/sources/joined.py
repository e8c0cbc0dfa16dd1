"""Two images of `strokes` over one another."""

import torch
from torch import Tensor

from ray_dfml.core.sources.draws import GROUP, grouped
from ray_dfml.core.sources.strokes import strokes
from ray_dfml.core.sources.warp import Warp, warp

BEND = Warp(rotation=0.35, scale=0.2, shear=0.15, shift=0.12, elastic=0.08)
"""What happens to the second image, so that it need not lie in the middle."""


def joined(rng: torch.Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images [n c h w] of two to six strokes: the brighter pixel of two images of `strokes`, of which one is warped.

    It assumes up to six bright strokes of a pen on black.
    """

    def make() -> Tensor:
        first = strokes(rng, GROUP, shape)
        return torch.maximum(first, warp(rng, strokes(rng, GROUP, shape), BEND))

    return grouped(make, count, shape)
