"""The images that the doctor shows to every teacher. Nobody took them: they are of image sources (`core.sources`)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ray_dfml.core import seeds
from ray_dfml.core.images import fit
from ray_dfml.core.sources import SOURCES
from ray_dfml.core.sources.warp import Warp, warp

USED = ("strokes", "shapes", "dipw")
"""Sources of probe images: pens, plain shapes, and textured objects on a dark ground."""
MOST, LEAST = 96, 8
"""The most and the fewest images of a source."""
MACS = 2e10
"""Work that the doctor spends on a teacher, in multiply-accumulates."""
LARGEST = 64
"""Probe images are drawn with at most so many pixels a side, and resized for teachers that take larger ones."""
NUDGE = Warp(shift=0.12, rotation=0.1, elastic=0.05)
"""The small change of an image that a classifier of objects should hardly notice."""


class Probes(NamedTuple):
    """Images [n c h w] in [0, 1], the same images slightly warped, and how many there are of each source."""

    images: Tensor
    nudged: Tensor
    each: int

    def seen(self, shape: tuple[int, int, int]) -> "Probes":
        """The images as a teacher with an input of (channels, height, width) sees them."""
        return Probes(fit(self.images, shape), fit(self.nudged, shape), self.each)

    def first(self, each: int) -> "Probes":
        """The first `each` images of every source."""
        rows = torch.cat([torch.arange(n * self.each, n * self.each + each) for n in range(len(USED))])
        return Probes(self.images[rows], self.nudged[rows], each)


def draw(shapes: Sequence[tuple[int, int, int]]) -> Probes:
    """Draw the probe images for teachers with inputs of these shapes, of the largest channels, height and width.

    The same shapes always give the same images.
    """
    channels, height, width = (max(sizes) for sizes in zip(*shapes, strict=True))
    shape = (channels, max(8, min(height, LARGEST)), max(8, min(width, LARGEST)))
    parts = [SOURCES[name].function(seeds.rng("doctor", name), MOST, shape) for name in USED]
    images = torch.cat(parts)
    return Probes(images, warp(seeds.rng("doctor", "nudge"), images, NUDGE), MOST)


def count(macs: int) -> int:
    """How many images of each source a teacher sees: fewer, the more multiply-accumulates an image takes."""
    return int(min(MOST, max(LEAST, MACS / (2 * len(USED) * max(1, macs)))))
