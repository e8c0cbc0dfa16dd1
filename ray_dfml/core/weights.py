"""Weights as one flat vector: it is cheap to ship, and an optimiser step or a sum of gradients is one operation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Layout:
    """Names and shapes of the parts of a flat vector, in a fixed order."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.numel = sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy named tensors into one vector `[p]`.

        Raises KeyError if a part is missing, and ValueError if one has another shape.
        """
        for name, shape in self.shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensors[name].shape)}")
        if not self.shapes:
            return torch.zeros(0)
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Views into a vector `[p]`, differentiable with respect to it."""
        pieces = torch.split(flat, self.sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
