"""The layers of one call of a network: its tensors by name, and how its batch norms work in this call.

Each call makes a `Layers` of its own and drops it, so calls share nothing. A network may therefore be called from
several threads at once, and under `torch.func.vmap` and `torch.func.grad`.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core import norm

Shapes = dict[str, tuple[int, ...]]
"""Names of tensors and their shapes, in the order of a flat vector."""


class Layers:
    """Applies named layers to tensors.

    `tensors` holds `NAME.weight` and `NAME.bias` of every layer. `given` holds `NAME.running_mean` and
    `NAME.running_var` of every batch norm; if it is None, a batch is normalised with its own statistics. With `capture`
    the statistics of each input of a batch norm are kept in `captured`, under the names of `given`.

    `first_order` promises that at most one backward pass follows and that no `vmap` is around. The built-in batch norm
    and channels-last images are then used, which is twice as fast on a CPU. Statistics captured under `first_order`
    carry no gradient if the batch is normalised with them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        given: Mapping[str, Tensor] | None = None,
        *,
        capture: bool = False,
        first_order: bool = False,
    ) -> None:
        self.tensors, self.given, self.capture, self.first_order = tensors, given, capture, first_order
        self.captured: dict[str, Tensor] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Features [n o] of features [n i]."""
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def conv(self, name: str, x: Tensor, *, padding: int = 1) -> Tensor:
        """Convolve images [n i h w] and add the bias."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.conv2d(self.laid_out(x), self.laid_out(weight), bias, padding=padding)

    def norm(self, name: str, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Batch norm of [n c h w] or [n c].

        `shift` [c] is the bias that the layer before left out. With batch statistics it cancels exactly.
        """
        if self.given is not None:
            if self.capture:
                self._keep(name, *self._moments(x), shift)
            return norm.scaled(x, *self._affine(name, shift))
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        if self.first_order:
            if not self.capture:
                return norm.native_of_batch(x, weight, bias)
            y, mean, var = norm.native_with_moments(x, weight, bias)
            self._keep(name, mean, var, None if shift is None else shift.detach())
            return y
        mean, var = norm.moments(x)
        if self.capture:
            self._keep(name, mean, var, shift)
        return norm.normalised(x, mean, var, weight, bias)

    def conv_norm(self, conv: str, name: str, x: Tensor, *, stride: int = 1, padding: int = 1) -> Tensor:
        """Convolve images [n i h w], then apply batch norm.

        Given statistics are folded into the convolution's weights. Without them the convolution leaves its bias, if it
        has one, to the batch norm.
        """
        weight, shift = self.tensors[f"{conv}.weight"], self.tensors.get(f"{conv}.bias")
        bias = None
        if self.given is not None and not self.capture:
            scale, bias = self._affine(name, shift)
            weight = weight * scale[:, None, None, None]
        x = F.conv2d(self.laid_out(x), self.laid_out(weight), bias, stride, padding)
        return self.norm(name, x, shift) if bias is None else x

    def relu(self, x: Tensor) -> Tensor:
        """The larger of `x` and 0. Under `first_order` it overwrites `x`, which must be a layer's own output."""
        return F.relu(x, inplace=self.first_order)

    def laid_out(self, x: Tensor) -> Tensor:
        """Images or convolution weights, unchanged in value, in the memory layout that is fastest in this call."""
        return channels_last(x) if self.first_order else x

    def keep(self, name: str, x: Tensor) -> None:
        """Keep the moments of what a batch norm gets in `captured`."""
        self._keep(name, *self._moments(x), None)

    def _affine(self, name: str, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and offset [c] of a batch norm with given statistics, whose layer before left out its bias `shift`."""
        assert self.given is not None
        mean, var = self.given[f"{name}.running_mean"], self.given[f"{name}.running_var"]
        scale = self.tensors[f"{name}.weight"] * (var + norm.EPS).rsqrt()
        return scale, self.tensors[f"{name}.bias"] - (mean if shift is None else mean - shift) * scale

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm.OnePassMoments.apply(x) if self.first_order else norm.moments(x)  # pyright: ignore[reportReturnType]

    def _keep(self, name: str, mean: Tensor, var: Tensor, shift: Tensor | None) -> None:
        self.captured[f"{name}.running_mean"] = mean if shift is None else mean + shift
        self.captured[f"{name}.running_var"] = var


def channels_last(x: Tensor) -> Tensor:
    """The same images [n c h w], on a CPU laid out in memory as [n h w c], which convolves and pools them faster.

    Images of one channel have both layouts at once. The stride of the channel, which `view` makes 1, tells a
    convolution which layout its output should have.
    """
    if x.device.type != "cpu":
        return x
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).flatten(1).view(n, h, w, c).permute(0, 3, 1, 2)


def conv_shapes(name: str, channels_in: int, channels: int, size: int, *, bias: bool = False) -> Shapes:
    """Names and shapes of the tensors of a square convolution."""
    found: Shapes = {f"{name}.weight": (channels, channels_in, size, size)}
    return found | ({f"{name}.bias": (channels,)} if bias else {})


def linear_shapes(name: str, inputs: int, outputs: int) -> Shapes:
    """Names and shapes of the tensors of a linear layer."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm_shapes(name: str, channels: int) -> Shapes:
    """Names and shapes of the tensors of a batch norm, without its statistics."""
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def statistics_shapes(name: str, channels: int) -> Shapes:
    """Names and shapes of the statistics of a batch norm."""
    return {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
