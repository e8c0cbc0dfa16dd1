"""Random changes of images that keep what they show: warps, zooms, crops and changes of colour."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.sources.draws import normal, uniform

PADDING = {"zero": "zeros", "edge": "border"}
"""What lies outside of an image, by the name that `images.view` uses."""

PAD = 8
"""`augment` pads an image by one part in so many of its height, rounded down, before it crops."""
RECOLOUR = 0.3
"""How strongly `augment` recolours, as the preset `no-pool-colour` does."""
GREY = 1 / 255
"""An image whose channels differ by less at each pixel is grey for `augment`."""


@dataclass(frozen=True, kw_only=True)
class Warp:
    """How strong a random warp is. Each number bounds a draw that is uniform around 0; 0 leaves its change out."""

    rotation: float = 0.0
    """Radians."""
    scale: float = 0.0
    """Logarithm of the magnification."""
    shear: float = 0.0
    shift: float = 0.0
    """In half-widths of the image."""
    elastic: float = 0.0
    """Displacement, in half-widths, of a smooth random field with five knots a side; its strength varies."""
    aspect: float = 0.0
    """Logarithm of the ratio of the two scales."""
    mirror: bool = False
    """Whether every other image is mirrored."""


def warp(rng: torch.Generator, x: Tensor, strength: Warp, *, fill: str = "zero") -> Tensor:
    """Each image of [n c h w] warped by a draw of its own; values stay within those of the image and of what is around.

    `fill` says what is around an image: `zero` is black, `edge` repeats the border.
    """
    n = len(x)

    def draw(bound: float) -> Tensor:
        return uniform(rng, n, low=-bound, high=bound)

    angle, scale, shear = draw(strength.rotation), draw(strength.scale).exp(), draw(strength.shear)
    other_scale = scale * draw(strength.aspect).exp()
    sign = torch.where(uniform(rng, n) < 0.5, -1.0, 1.0) if strength.mirror else torch.ones(n)
    row_x = torch.stack([angle.cos() * scale * sign, (shear - angle.sin()) * other_scale, draw(strength.shift)], 1)
    row_y = torch.stack([angle.sin() * scale * sign, angle.cos() * other_scale, draw(strength.shift)], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(x.shape), align_corners=False)
    if strength.elastic:
        knots = normal(rng, n, 2, 5, 5) * strength.elastic * uniform(rng, n, 1, 1, 1, high=2)
        grid = grid + F.interpolate(knots, x.shape[2:], mode="bicubic").permute(0, 2, 3, 1)
    return F.grid_sample(x, grid.to(x.device), padding_mode=PADDING[fill], align_corners=False)


def zoom(rng: torch.Generator, x: Tensor, low: float, high: float, *, fill: str = "zero") -> Tensor:
    """Each image of [n c h w] magnified about its middle by a factor drawn log-uniformly from [low, high].

    The vertical factor differs from the horizontal one by up to exp(0.2). Raises ValueError for a factor that is not
    positive.
    """
    if not 0 < low <= high:
        raise ValueError(f"a zoom needs 0 < low <= high, got {low} and {high}")
    n = len(x)
    scale = uniform(rng, n, low=-math.log(high), high=-math.log(low)).exp()
    other_scale, zero = scale * uniform(rng, n, low=-0.2, high=0.2).exp(), torch.zeros(n)
    rows = torch.stack([torch.stack([scale, zero, zero], 1), torch.stack([zero, other_scale, zero], 1)], 1)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode=PADDING[fill], align_corners=False)


def recolour(rng: torch.Generator, x: Tensor, strength: float) -> Tensor:
    """Each image of [n c h w] with another contrast, brightness, colour cast and saturation, within [0, 1].

    `strength` bounds the logarithm of the change of contrast; brightness and cast change by up to 0.4 of it. The
    saturation shrinks by up to exp(2 strength) and grows by up to exp(strength).
    """
    n, channels = x.shape[:2]

    def draw(count: int, low: float) -> Tensor:
        return uniform(rng, n, count, 1, 1, low=low, high=strength)

    x = (x - 0.5) * draw(1, -strength).exp() + 0.5 + 0.4 * (draw(1, -strength) + draw(channels, -strength))
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * draw(1, -2 * strength).exp()).clamp(0, 1)


def crop(rng: torch.Generator, x: Tensor, pad: int) -> Tensor:
    """Each image of [n c h w] shifted by whole pixels, up to `pad` along each axis, by a draw of its own.

    What comes in repeats the border.
    """
    n, channels, height, width = x.shape
    dy, dx = torch.randint(2 * pad + 1, (2, n, 1), generator=rng)
    rows, columns = dy + torch.arange(height), dx + torch.arange(width)
    padded = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    image, channel = torch.arange(n).view(-1, 1, 1, 1), torch.arange(channels).view(-1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def augment(rng: torch.Generator, x: Tensor) -> Tensor:
    """Each image of [n c h w], pixels in [0, 1], cropped after padding; colour images also mirrored and recoloured.

    All draws are each image's own. A mirrored character is another one, and its greys say what is ink, so grey images,
    those of equal channels included, are cropped alone.
    """
    x = crop(rng, x, x.shape[2] // PAD)
    if x.shape[1] == 1:
        return x
    grey = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).amax((2, 3), keepdim=True) < GREY
    mirror = uniform(rng, len(x), 1, 1, 1) < 0.5
    return torch.where(grey, x, recolour(rng, torch.where(mirror, x.flip(-1), x), RECOLOUR))
