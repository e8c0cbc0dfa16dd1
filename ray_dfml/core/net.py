"""A network as a function of (flat weights, images): every method and every shard uses networks in this form."""

import functools
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ray_dfml.core import hub
from ray_dfml.core.backbones import BACKBONES, Backbone, known_arch
from ray_dfml.core.hub import HubNet
from ray_dfml.core.layers import Layers, Shapes, statistics_shapes
from ray_dfml.core.weights import Layout


class Net:
    """A classifier without weights.

    `net(theta, x)` uses the statistics of the batch in batch norm, and `net(theta, x, stats)` the given ones. Images
    are normalised `[n c h w]`, and logits are `[n q]`. `layout` names the parameters in the flat vector theta [p], and
    `stats_layout` the running means and variances in the flat vector stats [k]. A call does not change the `Net`, so
    one of them serves any number of threads.

    Every call takes `first_order`. True promises that at most one backward pass follows and that the call is not under
    `vmap`. The call is then about twice as fast on a CPU, and its results differ by rounding only.

    A network of another library (`core.hub`) can be a teacher. It has no `features`, no `split` and no `init`, and it
    needs `stats` if it has batch norms.
    """

    def __init__(self, arch: str, shape: tuple[int, int, int], ways: int) -> None:
        self.arch, self.shape, self.ways = arch, shape, ways
        self.network = built(arch, shape, ways)
        self.layout, self.stats_layout = layouts(self.network)

    @property
    def backbone(self) -> Backbone:
        """The part below the linear head. Raises TypeError for a network of another library."""
        if isinstance(self.network, HubNet):
            raise TypeError(f"{self.arch} can be a teacher only: it has no backbone of its own")
        return self.network

    def _layers(self, theta: Tensor, stats: Tensor | None, *, capture: bool = False, first_order: bool) -> Layers:
        given = None if stats is None else self.stats_layout.unflatten(stats)
        return Layers(self.layout.unflatten(theta), given, capture=capture, first_order=first_order)

    def __call__(self, theta: Tensor, x: Tensor, stats: Tensor | None = None, *, first_order: bool = False) -> Tensor:
        """Logits [n q]. Batch norm uses `stats` if they are given, else the batch's own statistics (transductive)."""
        return self._logits(self._layers(theta, stats, first_order=first_order), x)

    def _logits(self, layers: Layers, x: Tensor) -> Tensor:
        if isinstance(self.network, HubNet):
            return self.network.logits(layers, x)
        return layers.linear("head", self.network.features(layers, x))

    def features(self, theta: Tensor, x: Tensor, stats: Tensor | None = None, *, first_order: bool = False) -> Tensor:
        """Features [n f] that the head reads. Batch norm works as in a call."""
        return self.backbone.features(self._layers(theta, stats, first_order=first_order), x)

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Split weights [p] into those of the backbone and those of the linear head, whose weight precedes its bias."""
        head = sum(self.layout.sizes[-2:])
        return theta[:-head], theta[-head:]

    def with_stats(
        self, theta: Tensor, x: Tensor, stats: Tensor | None = None, *, first_order: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits, and the mean and biased variance that `x` has at each batch norm, laid out as `stats_layout`.

        The statistics are differentiable, except in a `first_order` call without `stats`.
        """
        layers = self._layers(theta, stats, capture=True, first_order=first_order)
        logits = self._logits(layers, x)
        return logits, self.stats_layout.flatten(layers.captured).to(x.device)

    def init(self, rng: torch.Generator, *, zero_head_bias: bool = False) -> Tensor:
        """Fresh weights [p].

        Weights of k x k convolutions are normal with standard deviation sqrt(2 / (k^2 output channels)), batch norm has
        scale 1 and shift 0, and linear layers are uniform by fan-in. In a network without batch norm the input channels
        count instead, which keeps the size of signals. With `zero_head_bias` the head's bias is 0.
        """
        parts: dict[str, Tensor] = {}
        for name, shape in self.layout.shapes.items():
            if len(shape) == 4:
                std = math.sqrt(2.0 / (shape[2] * shape[3] * shape[0 if self.backbone.norms else 1]))
                parts[name] = torch.randn(shape, generator=rng) * std
            elif len(shape) == 2:
                parts[name] = (torch.rand(shape, generator=rng) * 2 - 1) / math.sqrt(shape[1])
            elif name == "head.bias":
                fan_in = self.layout.shapes["head.weight"][1]
                parts[name] = (torch.rand(shape, generator=rng) * 2 - 1) / math.sqrt(fan_in)
                if zero_head_bias:
                    parts[name] = torch.zeros(shape)
            else:
                parts[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        return self.layout.flatten(parts)

    def initial_stats(self) -> Tensor:
        """Running statistics before any batch: mean 0, variance 1."""
        rest = {"running_mean": torch.zeros, "running_var": torch.ones}
        parts = {name: rest[name.rpartition(".")[2]](shape) for name, shape in self.stats_layout.shapes.items()}
        return self.stats_layout.flatten(parts)

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one image (convolutions and linear layers)."""
        if isinstance(self.network, HubNet):
            return self.network.macs
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(self.init(torch.Generator()), torch.zeros(1, *self.shape))
        return counter.get_total_flops() // 2


def known_teacher(arch: str) -> str:
    """The name itself. Raises ValueError, with known names, if no teacher can have this architecture."""
    return hub.known(arch) if hub.is_hub(arch) else known_arch(arch)


def built(arch: str, shape: tuple[int, int, int], ways: int) -> Backbone | HubNet:
    """The network of an architecture, without weights. Nothing is allocated, whatever the sizes.

    Raises KeyError for an unknown name, and RejectedError if a network of another library cannot take such images.
    """
    if hub.is_hub(arch):
        return HubNet(arch, shape, ways)
    if arch not in BACKBONES:
        raise KeyError(f"unknown architecture {arch!r}; known: {', '.join(BACKBONES)}")
    return BACKBONES[arch](*shape, ways)


def layouts(backbone: Backbone | HubNet) -> tuple[Layout, Layout]:
    """Names and shapes of a network's parameters [p], and of the running statistics of its batch norms [k]."""
    statistics: Shapes = {}
    for name, channels in backbone.norms.items():
        statistics |= statistics_shapes(name, channels)
    return Layout(backbone.parameters), Layout(statistics)


@functools.lru_cache(maxsize=64)
def net(arch: str, shape: tuple[int, int, int], ways: int) -> Net:
    """The `Net` of an architecture, built once per process. Raises KeyError for an unknown name, and RejectedError if a
    network of another library cannot take such images."""
    return Net(arch, shape, ways)
