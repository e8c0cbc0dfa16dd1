"""Optimiser steps as functions, which take a state and return the next one.

[Kingma2015] Adam, arXiv 1412.6980, Algorithm 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Adam(NamedTuple):
    """First and second moments [p] and the number of steps taken."""

    m: Tensor
    v: Tensor
    step: int

    @classmethod
    def zeros(cls, like: Tensor) -> "Adam":
        """State before the first step."""
        return cls(torch.zeros_like(like), torch.zeros_like(like), 0)


def adam_step(
    x: Tensor, grad: Tensor, state: Adam, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> tuple[Tensor, Adam]:
    """One step of [Kingma2015]: new parameters [p] and state. Nothing is changed in place."""
    step = state.step + 1
    m = torch.lerp(state.m, grad, 1 - betas[0])
    v = (state.v * betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    root = v.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
    return torch.addcdiv(x, m, root, value=-lr / (1 - betas[0] ** step)), Adam(m, v, step)


def sgd_step(
    x: Tensor, grad: Tensor, velocity: Tensor, *, lr: float, momentum: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """One step of SGD with momentum (dampening 0): new parameters [p] and velocity [p]."""
    velocity = momentum * velocity + grad + weight_decay * x
    return x - lr * velocity, velocity


def clip_norm(grad: Tensor, bound: float) -> Tensor:
    """The gradient [p], scaled down where its L2 norm exceeds `bound`."""
    return grad * torch.clamp(bound / (grad.norm() + 1e-6), max=1.0)
