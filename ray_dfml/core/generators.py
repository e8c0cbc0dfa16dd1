"""Image generators, which turn latent codes into pixels in [0, 1].

[Wei2024] FREE, arXiv 2405.00984, Table 6: FREE, BiDf-MKD and the release of IDEAL use one generator, here `standard`.
[Radford2016] Unsupervised Representation Learning with Deep Convolutional GANs, arXiv 1511.06434 (`dcgan`).
[Jiang2021] TransGAN: Two Pure Transformers Can Make One Strong GAN, arXiv 2102.07074 (`transformer`).
"""

import functools
import math
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.layers import Layers, conv_shapes, linear_shapes, norm_shapes
from ray_dfml.core.weights import Layout


def upsampled_conv(x: Tensor, weight: Tensor, layers: Layers) -> Tensor:
    """Double images [n i h w] by nearest upsampling, then convolve them with `weight` [o i 3 3]: images [n o 2h 2w].

    Nearest upsampling repeats each pixel in a 2x2 window. Here the convolution comes first: it is a transposed
    convolution of stride 2, after which each output is the sum of a 2x2 window. This takes a quarter of the
    multiply-accumulates, forward and backward.
    """
    spread = F.conv_transpose2d(layers.laid_out(x), layers.laid_out(weight.flip(2, 3).transpose(0, 1)), stride=2)
    return F.avg_pool2d(spread, 2, 1, divisor_override=1)


class ThinConv(torch.autograd.Function):
    """A 3x3 convolution from many channels [n c h w] to few, with `weight` [o c 3 3].

    One matrix product gives 9 o values for each pixel, which are then added up where they belong. On a CPU this is
    twice as fast as the built-in convolution to 3 channels. It cannot be differentiated twice, nor used under `vmap`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Images [n o h w]."""
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        rows = weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, weight.shape[1])
        ctx.save_for_backward(pixels, rows)
        ctx.sizes = x.shape
        return F.fold(rows @ pixels.mT, x.shape[2:], 3, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients with respect to `x` and `weight`: the products of `forward`, transposed."""
        pixels, rows = ctx.saved_tensors
        n, c, h, w = ctx.sizes
        spread = F.unfold(grads[0], 3, padding=1)
        of_x = (spread.mT @ rows).view(n, h, w, c).permute(0, 3, 1, 2)
        of_weight = (spread @ pixels).sum(0).view(-1, 3, 3, c).permute(0, 3, 1, 2).flip(2, 3)
        return of_x, of_weight


class StandardGenerator:
    """Linear d -> 2w x h/4 x w/4, then twice (nearest x2, conv 3x3, BN, LeakyReLU 0.2), conv 3x3 to c, sigmoid.

    Batch norm always uses the statistics of the batch. The images of a batch therefore depend on each other, and a
    batch of one image is degenerate. With `classes` the generator is told the label: the code ends in a one-hot label,
    from which a second linear layer makes half of the first 2w channels.
    """

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int, classes: int) -> None:
        channels, height, breadth = shape
        self.grid = (2 * width, height // 4, breadth // 4)
        self.sizes = [latent, classes] if classes else [latent]
        half = math.prod(self.grid) // len(self.sizes)
        self.parameters = linear_shapes("project", latent, half)
        if classes:
            self.parameters |= linear_shapes("label", classes, half)
        self.parameters |= norm_shapes("norm0", 2 * width)
        self.parameters |= conv_shapes("conv1", 2 * width, 2 * width, 3) | norm_shapes("norm1", 2 * width)
        self.parameters |= conv_shapes("conv2", 2 * width, width, 3) | norm_shapes("norm2", width)
        self.parameters |= conv_shapes("conv3", width, channels, 3, bias=True)

    def images(self, layers: Layers, z: Tensor) -> Tensor:
        """Images [n c h w] in [0, 1] of codes [n d]."""
        parts = z.split(self.sizes, -1)
        x = layers.linear("project", parts[0])
        if len(parts) > 1:
            x = torch.cat([x, layers.linear("label", parts[1])], -1)
        x = layers.norm("norm0", layers.laid_out(x.view(-1, *self.grid)))
        for i in (1, 2):
            x = layers.norm(f"norm{i}", upsampled_conv(x, layers.tensors[f"conv{i}.weight"], layers))
            x = F.leaky_relu(x, 0.2, inplace=layers.first_order)
        weight, bias = layers.tensors["conv3.weight"], layers.tensors["conv3.bias"]
        if layers.first_order and x.device.type == "cpu":
            return torch.sigmoid(ThinConv.apply(x, weight) + bias[:, None, None])
        return torch.sigmoid(F.conv2d(x, weight, bias, padding=1))


class DcganGenerator:
    """Linear d -> channels at a small grid, transposed convolutions 4x4 that double it, conv 3x3 to c, sigmoid.

    The grid is doubled as often as the size allows, at most four times. Before the last doubling there are twice as
    many channels as `width`, and so on backwards up to 8 x width; each doubling ends in batch norm (of the batch) and
    LeakyReLU 0.2 ([Radford2016], with a last convolution as in IDEAL's table 6).
    """

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        channels, height, breadth = shape
        self.doublings = max(k for k in range(5) if height % 2**k == 0 and breadth % 2**k == 0)
        self.widths = [width * min(2**k, 8) for k in range(self.doublings, 0, -1)] + [width]
        self.grid = (self.widths[0], height >> self.doublings, breadth >> self.doublings)
        self.parameters = linear_shapes("project", latent, math.prod(self.grid)) | norm_shapes("norm0", self.widths[0])
        for i, (before, after) in enumerate(pairwise(self.widths), 1):
            self.parameters |= conv_shapes(f"up{i}", before, after, 4) | norm_shapes(f"norm{i}", after)
        self.parameters |= conv_shapes("last", width, channels, 3, bias=True)

    def images(self, layers: Layers, z: Tensor) -> Tensor:
        """Images [n c h w] in [0, 1] of codes [n d]."""
        x = layers.norm("norm0", layers.laid_out(layers.linear("project", z).view(-1, *self.grid)))
        for i in range(1, self.doublings + 1):
            weight = layers.tensors[f"up{i}.weight"].transpose(0, 1)
            x = F.conv_transpose2d(F.leaky_relu(x, 0.2), weight, stride=2, padding=1)
            x = layers.norm(f"norm{i}", layers.laid_out(x))
        x = F.leaky_relu(x, 0.2)
        return torch.sigmoid(F.conv2d(x, layers.tensors["last.weight"], layers.tensors["last.bias"], padding=1))


class TransformerGenerator:
    """Linear d -> a token of 2w for each 4x4 patch, two blocks of attention, then patches, conv 3x3 to c, sigmoid.

    A block is x + attention(norm(x)), then x + MLP(norm(x)), with four heads, layer norm, and GELU in an MLP that is
    twice as wide. Every patch has a learned position. After the blocks a linear layer makes `CHANNELS` channels of
    pixels of each token. This is the coarse stage of [Jiang2021]; its finer ones are left out, as the images are small.
    Images of a batch do not depend on each other.
    """

    BLOCKS, HEADS, CHANNELS = 2, 4, 8

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        channels, height, breadth = shape
        self.grid, self.size = (height // 4, breadth // 4), 2 * width
        if self.size % self.HEADS:
            raise ValueError(f"a transformer generator needs an even width, got {width}")
        tokens, size = math.prod(self.grid), self.size
        self.parameters = linear_shapes("project", latent, tokens * size) | {"position.weight": (tokens, size)}
        for i in range(self.BLOCKS):
            self.parameters |= norm_shapes(f"norm{i}.attention", size) | linear_shapes(f"heads{i}", size, 3 * size)
            self.parameters |= linear_shapes(f"mixed{i}", size, size) | norm_shapes(f"norm{i}.mlp", size)
            self.parameters |= linear_shapes(f"wide{i}", size, 2 * size) | linear_shapes(f"narrow{i}", 2 * size, size)
        self.parameters |= norm_shapes("norm.last", size) | linear_shapes("patch", size, 16 * self.CHANNELS)
        self.parameters |= conv_shapes("last", self.CHANNELS, channels, 3, bias=True)

    def images(self, layers: Layers, z: Tensor) -> Tensor:
        """Images [n c h w] in [0, 1] of codes [n d]."""
        x = layers.linear("project", z).view(len(z), -1, self.size) + layers.tensors["position.weight"]
        for i in range(self.BLOCKS):
            x = x + self._attention(layers, i, self._norm(layers, f"norm{i}.attention", x))
            wide = F.gelu(layers.linear(f"wide{i}", self._norm(layers, f"norm{i}.mlp", x)))
            x = x + layers.linear(f"narrow{i}", wide)
        x = layers.linear("patch", self._norm(layers, "norm.last", x)).mT.reshape(len(z), -1, *self.grid)
        return torch.sigmoid(layers.conv("last", F.leaky_relu(F.pixel_shuffle(x, 4), 0.2)))

    def _norm(self, layers: Layers, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), layers.tensors[f"{name}.weight"], layers.tensors[f"{name}.bias"])

    def _attention(self, layers: Layers, i: int, x: Tensor) -> Tensor:
        n, tokens, size = x.shape
        split = layers.linear(f"heads{i}", x).view(n, tokens, 3, self.HEADS, size // self.HEADS)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        share = (query @ key.mT / math.sqrt(size // self.HEADS)).softmax(-1)
        return layers.linear(f"mixed{i}", (share @ value).transpose(1, 2).reshape(n, tokens, size))


Kind = Literal["standard", "dcgan", "transformer"]
"""Architectures of generators."""

UNTOLD = {"dcgan": DcganGenerator, "transformer": TransformerGenerator}
"""Those that are not told the label."""


class Generator:
    """The generator as a function of (flat weights [p], latent codes [n d]) -> pixels [n c h w] in [0, 1].

    With `classes` the codes are [n d + classes] and end in a one-hot label.
    """

    def __init__(
        self, shape: tuple[int, int, int], latent: int, width: int, classes: int = 0, kind: Kind = "standard"
    ) -> None:
        if kind in UNTOLD and classes:
            raise ValueError(f"a {kind} generator is not told the label")
        if shape[1] % 4 or shape[2] % 4:
            raise ValueError(f"the generator needs height and width divisible by 4, got {shape[1]}x{shape[2]}")
        self.shape, self.latent, self.classes = shape, latent, classes
        told = StandardGenerator(shape, latent, width, classes) if kind not in UNTOLD else None
        self._network = told or UNTOLD[kind](shape, latent, width)
        self.layout = Layout(self._network.parameters)

    def __call__(self, theta: Tensor, z: Tensor, *, first_order: bool = False) -> Tensor:
        """Images [n c h w] in [0, 1] of codes [n d], n >= 2. `net.Net` describes `first_order`."""
        return self._network.images(Layers(self.layout.unflatten(theta), first_order=first_order), z)

    def init(self, rng: torch.Generator) -> Tensor:
        """Fresh weights [p], drawn as torch draws them by default.

        Linear and convolutional layers are uniform by fan-in; batch norm has scale 1 and shift 0.
        """
        parts: dict[str, Tensor] = {}
        fan_in = 1
        for name, shape in self.layout.shapes.items():
            if name.startswith("norm"):
                parts[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
                continue
            if name.endswith("weight"):
                fan_in = math.prod(shape[1:])
            parts[name] = (torch.rand(shape, generator=rng) * 2 - 1) / math.sqrt(fan_in)
        return self.layout.flatten(parts)

    def reset(self, rng: torch.Generator) -> Tensor:
        """Fresh weights [p], as BiDf-MKD draws them for each inversion.

        Weights are N(0, 0.02), the scales of batch norm N(1, 0.02), and all biases 0.
        """
        parts: dict[str, Tensor] = {}
        for name, shape in self.layout.shapes.items():
            centre = 1.0 if name.startswith("norm") else 0.0
            drawn = centre + 0.02 * torch.randn(shape, generator=rng)
            parts[name] = drawn if name.endswith("weight") else torch.zeros(shape)
        return self.layout.flatten(parts)


@functools.lru_cache(maxsize=16)
def generator(
    shape: tuple[int, int, int], latent: int, width: int, classes: int = 0, kind: Kind = "standard"
) -> Generator:
    """The generator of a shape, built once per process. Raises ValueError for a size not divisible by 4."""
    return Generator(shape, latent, width, classes, kind)
