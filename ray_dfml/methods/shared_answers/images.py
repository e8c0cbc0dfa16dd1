"""The images that the teachers are asked about: of the common sources, and of one more."""

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.images import to_bytes
from ray_dfml.core.sources import SOURCES, Source
from ray_dfml.core.sources.draws import GROUP, grouped
from ray_dfml.core.sources.strokes import strokes
from ray_dfml.core.sources.warp import Warp, warp, zoom

BEND = Warp(rotation=0.35, scale=0.2, shear=0.15, shift=0.12, elastic=0.08)
"""What happens to the second image of `joined`."""


def joined(rng: torch.Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images [n c h w] of two to six strokes: the brighter pixel of two images of `strokes`, of which one is warped.

    It assumes up to six bright strokes of a pen on black.
    """

    def make() -> Tensor:
        first = strokes(rng, GROUP, shape)
        return torch.maximum(first, warp(rng, strokes(rng, GROUP, shape), BEND))

    return grouped(make, count, shape)


KNOWN: dict[str, Source] = {
    **{name: source for name, source in SOURCES.items() if not source.parents},
    "joined": Source(joined, "up to six bright strokes of a pen on black"),
}
"""The sources that need no earlier images, and `joined`."""

ZOOMED = ("strokes", "joined")
"""The sources that are magnified."""


def drawn(
    parts: Mapping[str, float], count: int, shape: tuple[int, int, int], rng: torch.Generator, *,
    zooms: tuple[float, float], invert: bool,
) -> np.ndarray:  # fmt: skip
    """So many images of the sources, uint8 [count c h w]. `parts` says how many each makes, relative to the others.

    `zooms` are the bounds of the magnification of `ZOOMED`. With `invert` dark and light change places.
    """
    ends = [round(count * end / sum(parts.values())) for end in accumulate(parts.values())]
    found: list[Tensor] = []
    for name, start, end in zip(parts, [0, *ends], ends, strict=False):
        some = KNOWN[name].function(rng, end - start, shape)
        if name in ZOOMED and zooms != (1, 1):
            some = zoom(rng, some, *zooms)
        found.append(1 - some if invert else some)
    return to_bytes(torch.cat(found))
