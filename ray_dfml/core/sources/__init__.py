"""Image sources: images that nobody took, to ask a service about or to make tasks of.

A source is a function of (rng, count, shape (c, h, w)) -> pixels [n c h w] in [0, 1]; height and width are at least 8.
All draws are made on the CPU from the generator that is given. A source makes its images in groups of `draws.GROUP`,
so that the first images of a longer call are those of a shorter one.

No source is neutral. Each says what it assumes about the data; reports print that. Sizes and positions are fractions
of the image: what is drawn at 28x28 looks the same at 84x84.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ray_dfml.core.sources.dip import dip, dipc, dipw
from ray_dfml.core.sources.mutants import mutants
from ray_dfml.core.sources.shapes import shapes
from ray_dfml.core.sources.strokes import strokes


@dataclass(frozen=True)
class Source:
    """Where images come from, and what that assumes about the data."""

    function: Callable[..., Tensor]
    """(rng, count, shape) -> pixels [n c h w] in [0, 1]; with `parents`, (rng, count, parents, labels)."""
    assumption: str
    """What holds of the data if images of this source stand in for it: a phrase that completes "assumes ..."."""
    parents: bool = False
    """Whether the images are changed copies of earlier ones, so that the source cannot come first."""


SOURCES = {
    "dip": Source(dip, "that neighbouring pixels are alike, at some scale, and nothing about objects"),
    "dipw": Source(dipw, "one textured object in the middle of a dark ground"),
    "dipc": Source(dipc, "up to three textured objects that overlap on a dark ground"),
    "shapes": Source(shapes, "plain shapes: bright ones on black in grey, textured ones on a soft ground in colour"),
    "strokes": Source(strokes, "one to three bright strokes of a pen on black"),
    "mutants": Source(mutants, "that warped, joined, thickened or blurred images resemble the data", parents=True),
}
