"""Images as stored bytes, as pixels in [0, 1] and as normalised input of a classifier, and random views of them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_bytes(x: Tensor) -> np.ndarray:
    """Round pixels [n c h w] in [0, 1] to the nearest uint8 value, which changes them by at most 1/510."""
    return (x.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Float pixels in [0, 1] of uint8 images. The array is copied, since arrays from a shared store are read-only."""
    return torch.tensor(images, dtype=torch.uint8).to(device).float() / 255


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std for pixels [... c h w]; mean and std are [c], or [n c] for images of several domains."""
    return (x - mean[..., :, None, None]) / std[..., :, None, None]


def fit(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Bring images [n c h w] to another (channels, height, width), differentiably.

    One channel is repeated to become several; several become their mean where one is wanted. Sizes change by bilinear
    interpolation, with an antialiasing filter when shrinking. Images that already have the shape are returned as they
    are. Raises ValueError for other changes of channels.
    """
    channels, height, width = shape
    if x.shape[1] != channels:
        if channels == 1:
            x = x.mean(1, keepdim=True)
        elif x.shape[1] == 1:
            x = x.expand(-1, channels, -1, -1)
        else:
            raise ValueError(f"cannot turn images of {x.shape[1]} channels into {channels}; 1 and c are possible")
    if x.shape[2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return x


def draw_view(rng: torch.Generator, *, pad: int, flip: bool) -> tuple[int, int, bool]:
    """Draw a view: the two offsets, in 0..2 pad, of a crop after padding by `pad` pixels, and whether to mirror."""
    dy, dx, mirror = (int(v) for v in torch.randint(0, 2**31 - 1, (3,), generator=rng))
    return dy % (2 * pad + 1), dx % (2 * pad + 1), flip and bool(mirror & 1)


def view(x: Tensor, offsets: tuple[int, int, bool], *, pad: int, fill: str) -> Tensor:
    """One view of a whole batch [n c h w]: pad it, crop it back to h x w at the offsets, and mirror it if asked.

    The view is differentiable. `fill` is `zero`, which pads with black, or `edge`, which repeats the border, so that a
    white page stays white.
    """
    dy, dx, mirror = offsets
    height, width = x.shape[-2:]
    if pad:
        x = F.pad(x, (pad, pad, pad, pad), mode="constant" if fill == "zero" else "replicate")
        x = x[..., dy : dy + height, dx : dx + width]
    return x.flip(-1) if mirror else x
