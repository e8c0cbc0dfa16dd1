"""Images between storage (bytes), pixel space ([0, 1]) and classifier input (normalised), and random views of them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_bytes(x: Tensor) -> np.ndarray:
    """Pixels [n c h w] in [0, 1] to uint8, rounded to nearest: at most 1/510 from the source."""
    return (x.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 images to float pixels in [0, 1]. Copies, since arrays from a shared store are read-only."""
    return torch.tensor(images, dtype=torch.uint8).to(device).float() / 255


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std for pixels [... c h w]; mean and std are [c], or [n c] for images of several domains."""
    return (x - mean[..., :, None, None]) / std[..., :, None, None]


def fit(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images [n c h w] brought to another (channels, height, width), differentiably; the same tensor where they agree.

    One channel is repeated, several become their mean where one is wanted. Sizes change by bilinear interpolation,
    with an antialiasing filter when shrinking. Raises ValueError for other changes of channels.
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
    """Offsets of a random crop after padding by `pad` pixels, each in 0..2 pad, and whether to mirror."""
    dy, dx, mirror = (int(v) for v in torch.randint(0, 2**31 - 1, (3,), generator=rng))
    return dy % (2 * pad + 1), dx % (2 * pad + 1), flip and bool(mirror & 1)


def view(x: Tensor, offsets: tuple[int, int, bool], *, pad: int, fill: str) -> Tensor:
    """One random view of a whole batch [n c h w]: pad, crop back to h x w at the offsets, mirror. Differentiable.

    `fill`: `zero` pads with black, `edge` repeats the border (a white page stays white).
    """
    dy, dx, mirror = offsets
    height, width = x.shape[-2:]
    if pad:
        x = F.pad(x, (pad, pad, pad, pad), mode="constant" if fill == "zero" else "replicate")
        x = x[..., dy : dy + height, dx : dx + width]
    return x.flip(-1) if mirror else x
