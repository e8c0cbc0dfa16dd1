"""A backbone as a function of (flat weights, images): the form in which every method and every worker uses it."""

import functools
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ray_dfml.core.backbones import BACKBONES
from ray_dfml.core.norm import BatchNorm
from ray_dfml.core.weights import Layout


class Net:
    """A classifier without weights. `net(theta, x)` normalises with the batch; `net(theta, x, stats)` with given
    statistics.

    `layout` names the parameters in a flat vector [p], `stats_layout` the running means and variances in another.
    Images are normalised `[n c h w]`; logits are `[n q]`.
    """

    def __init__(self, arch: str, shape: tuple[int, int, int], ways: int) -> None:
        if arch not in BACKBONES:
            raise KeyError(f"unknown architecture {arch!r}; known: {', '.join(BACKBONES)}")
        self.arch, self.shape, self.ways = arch, shape, ways
        self.module: nn.Module = BACKBONES[arch](*shape, ways).requires_grad_(False)
        self.layout = Layout((name, p.shape) for name, p in self.module.named_parameters())
        self.stats_layout = Layout((name, b.shape) for name, b in self.module.named_buffers())
        self._norms = [m for m in self.module.modules() if isinstance(m, BatchNorm)]

    def _set(self, *, use_running: bool, capture: bool, headless: bool = False) -> None:
        self.module.headless = headless  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        for norm in self._norms:
            norm.use_running, norm.captured = use_running, [] if capture else None

    def _run(self, theta: Tensor, x: Tensor, stats: Tensor | None) -> Tensor:
        tensors = self.layout.unflatten(theta)
        if stats is not None:
            tensors |= self.stats_layout.unflatten(stats)
        return functional_call(self.module, tensors, (x,))

    def __call__(self, theta: Tensor, x: Tensor, stats: Tensor | None = None) -> Tensor:
        """Logits [n q]. Without `stats`, batch norm uses the batch (transductive); with them, the given statistics."""
        self._set(use_running=stats is not None, capture=False)
        return self._run(theta, x, stats)

    def features(self, theta: Tensor, x: Tensor, stats: Tensor | None = None) -> Tensor:
        """Features [n f] before the head; batch norm as in a call."""
        self._set(use_running=stats is not None, capture=False, headless=True)
        return self._run(theta, x, stats)

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [p] as those of the backbone and those of the linear head, its weight and then its bias."""
        head = sum(self.layout.sizes[-2:])
        return theta[:-head], theta[-head:]

    def with_stats(self, theta: Tensor, x: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits, and the mean and biased variance that `x` has at each batch norm, laid out as `stats_layout`."""
        self._set(use_running=stats is not None, capture=True)
        logits = self._run(theta, x, stats)
        found = [part for norm in self._norms for pair in norm.captured or () for part in pair]
        self._set(use_running=False, capture=False)
        return logits, torch.cat(found) if found else torch.zeros(0)

    def init(self, generator: torch.Generator, *, zero_head_bias: bool = False) -> Tensor:
        """Fresh weights [p]: conv N(0, sqrt(2 / (9 fan_out))), batch norm 1 and 0, head uniform by fan-in."""
        parts: dict[str, Tensor] = {}
        for name, shape in self.layout.shapes.items():
            if len(shape) == 4:
                std = math.sqrt(2.0 / (shape[2] * shape[3] * shape[0]))
                parts[name] = torch.randn(shape, generator=generator) * std
            elif len(shape) == 2:
                parts[name] = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])
            elif name == "head.bias":
                fan_in = self.layout.shapes["head.weight"][1]
                parts[name] = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
                if zero_head_bias:
                    parts[name] = torch.zeros(shape)
            else:
                parts[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        return self.layout.flatten(parts)

    def initial_stats(self) -> Tensor:
        """Running statistics before any batch: mean 0, variance 1."""
        return self.stats_layout.flatten(dict(self.module.named_buffers())).clone()

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one image (convolutions and linear layers)."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(self.init(torch.Generator()), torch.zeros(1, *self.shape))
        return counter.get_total_flops() // 2


@functools.lru_cache(maxsize=64)
def net(arch: str, shape: tuple[int, int, int], ways: int) -> Net:
    """The `Net` of an architecture, built once per process. Raises KeyError for an unknown name."""
    return Net(arch, shape, ways)
