"""Batch normalisation written with mean and variance.

The built-in layer returned wrong second-order gradients under `vmap` in torch 2.13; this one is exact in a loop,
batched, and twice differentiated. It never writes its buffers: running statistics are values, passed in and returned
(`net.Net`).
"""

import torch
from torch import Tensor, nn

EPS = 1e-5


class BatchNorm(nn.Module):
    """Normalises `[n c h w]` or `[n c]` per channel, with the statistics of the batch or with the running ones.

    `use_running` chooses; `captured` receives (mean, biased variance) of each input when it is a list.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.use_running = False
        self.captured: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """`shift` [c] is a bias that the layer before left out: under batch statistics it cancels exactly."""
        axes = (0, 2, 3) if x.dim() == 4 else (0,)
        trailing = (slice(None), None, None) if x.dim() == 4 else (slice(None),)
        shift = torch.zeros_like(self.bias) if shift is None else shift
        mean, var = self.running_mean - shift, self.running_var
        if self.captured is not None or not self.use_running:
            batch_mean = x.mean(axes)
            batch_var = (x - batch_mean[trailing]).square().mean(axes)
            if self.captured is not None:
                self.captured.append((batch_mean + shift, batch_var))
            if not self.use_running:
                mean, var = batch_mean, batch_var
        return (x - mean[trailing]) * (self.weight * (var + EPS).rsqrt())[trailing] + self.bias[trailing]
