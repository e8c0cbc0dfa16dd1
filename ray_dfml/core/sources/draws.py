"""Draws that the sources share. Each is made on the CPU from the generator that is given."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

GROUP = 125
"""Images that a source makes at a time. Images of one group may share a random network."""

SHARED = 0.8
"""Share of the variance of a colour image that its channels have in common."""

T = TypeVar("T")


def uniform(rng: torch.Generator, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform draws in [low, high)."""
    return torch.rand(size, generator=rng) * (high - low) + low


def normal(rng: torch.Generator, *size: int) -> Tensor:
    """Standard normal draws."""
    return torch.randn(size, generator=rng)


def chance(rng: torch.Generator, n: int, probability: float) -> Tensor:
    """One draw for each of n images: bool [n 1 1 1], true with the given probability."""
    return torch.rand(n, 1, 1, 1, generator=rng) < probability


def pick(rng: torch.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(torch.randint(len(options), (), generator=rng))]


def channel_mixed(rng: torch.Generator, channels: int, *size: int) -> Tensor:
    """Normal draws [channels, *size] of variance 1, of which the channels share `SHARED`; one channel has its own."""
    own = normal(rng, channels, *size)
    if channels == 1:
        return own
    return math.sqrt(SHARED) * normal(rng, 1, *size) + math.sqrt(1 - SHARED) * own


def standardised(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Values of mean 0 and standard deviation 1 over `dims`; a constant becomes 0."""
    return (x - x.mean(dims, keepdim=True)) / (x.std(dims, keepdim=True) + 1e-5)


def grouped(make: Callable[[], Tensor], count: int, shape: tuple[int, int, int]) -> Tensor:
    """The first `count` images of as many groups [GROUP c h w] as it takes. Raises ValueError for a size below 8."""
    if min(shape[1:]) < 8:
        raise ValueError(f"image sources need height and width of at least 8, got {shape[1]}x{shape[2]}")
    made = [make() for _ in range(math.ceil(count / GROUP))]
    return torch.cat([torch.empty(0, *shape), *made])[:count]


def axes(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixel centres as x [1 1 1 w] and y [1 1 h 1], in half-widths and half-heights from the middle."""
    x = (torch.arange(width) + 0.5) * 2 / width - 1
    y = (torch.arange(height) + 0.5) * 2 / height - 1
    return x.view(1, 1, 1, -1), y.view(1, 1, -1, 1)
