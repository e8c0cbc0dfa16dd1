"""Logits of a frozen classifier that depend on the image alone, and not on the images that it is asked about with."""

import numpy as np
import torch
from torch import Tensor

from ray_dfml.core.images import normalise, to_pixels
from ray_dfml.core.net import Net

MOST = 64
"""Images of the largest forward pass."""
FEWEST = 8
"""Images of the smallest forward pass. Linear algebra adds up the rows of smaller products in another order."""


def steady_logits(network: Net, theta: Tensor, stats: Tensor, images: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
    """Logits [n q] of images [n c h w], which are uint8, or float32 in [0, 1]; `mean` and `std` are [c].

    On a CPU they have the bits of one call of the network on all images, if there are at least FEWEST. A part of fewer
    is filled up with copies of its first image. The logits are on the device of `theta`.
    """
    parts = []
    for first in range(0, len(images), MOST):
        part = images[first : first + MOST]
        filled = part if len(part) >= FEWEST else np.concatenate([part, part[:1].repeat(FEWEST - len(part), 0)])
        pixels = to_pixels(filled) if filled.dtype == np.uint8 else torch.tensor(filled)
        x = normalise(pixels.to(theta.device), mean.to(theta.device), std.to(theta.device))
        with torch.no_grad():
            parts.append(network(theta, x, stats)[: len(part)])
    return torch.cat(parts) if parts else theta.new_zeros(0, network.ways)
