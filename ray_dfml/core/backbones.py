"""The classifiers of the few-shot literature: each declares its tensors and computes features from them.

A backbone holds no weights and no state. `net.Net` draws weights, gives a call its `Layers`, and applies the head.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400 (Conv4). [He2016] Deep Residual Learning, arXiv 1512.03385.
[Wei2024] FREE, arXiv 2405.00984, section 5.1 (Conv4 with 32 channels; ResNet-10/-18 of the few-shot literature).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.convnets import VGG16, AlexNet, LeNet
from ray_dfml.core.hub import is_hub
from ray_dfml.core.layers import Layers, Shapes, channels_last, conv_shapes, linear_shapes, norm_shapes
from ray_dfml.errors import did_you_mean


class Backbone(Protocol):
    """A classifier without weights, up to its linear head."""

    parameters: Shapes
    """Names and shapes of the trainable tensors. The last two are `head.weight` [q f] and `head.bias` [q]."""
    norms: dict[str, int]
    """Names of the batch norms, and how many channels each has."""

    def features(self, layers: Layers, x: Tensor) -> Tensor:
        """The features [n f] that the head reads, of normalised images [n c h w]."""
        ...


class Conv4:
    """Four blocks of conv 3x3, batch norm, max-pool 2, ReLU, and a linear head ([Finn2017]).

    ReLU and max-pooling commute, so pooling comes first, which is cheaper. With `adaptive` the features are the maximum
    of each channel, so that one head serves any input size.
    """

    def __init__(
        self, channels_in: int, height: int, width: int, ways: int, *, hidden: int = 32, adaptive: bool = False
    ) -> None:
        self.adaptive = adaptive
        self.parameters: Shapes = {}
        for i in range(4):
            self.parameters |= conv_shapes(f"blocks.{i}.conv", hidden if i else channels_in, hidden, 3, bias=True)
            self.parameters |= norm_shapes(f"blocks.{i}.norm", hidden)
        self.norms = {f"blocks.{i}.norm": hidden for i in range(4)}
        self.parameters |= linear_shapes("head", hidden * (1 if adaptive else (height // 16) * (width // 16)), ways)

    def features(self, layers: Layers, x: Tensor) -> Tensor:
        """See `Backbone.features`."""
        for i in range(4):
            x = layers.conv_norm(f"blocks.{i}.conv", f"blocks.{i}.norm", x)
            x = layers.relu(F.max_pool2d(channels_last(x), 2))
        return x.amax((2, 3)) if self.adaptive else x.flatten(1)


class ResidualBlock(NamedTuple):
    """conv-BN-ReLU-conv-BN plus a shortcut: the identity, or a 1x1 conv-BN where channels or size change ([He2016])."""

    name: str
    channels_in: int
    channels: int
    stride: int

    @property
    def projects(self) -> bool:
        """Whether the shortcut has a convolution."""
        return self.stride != 1 or self.channels_in != self.channels

    @property
    def parameters(self) -> Shapes:
        """Names and shapes of the block's tensors."""
        found: Shapes = {}
        for i, channels_in in ((1, self.channels_in), (2, self.channels)):
            found |= conv_shapes(f"{self.name}.conv{i}", channels_in, self.channels, 3)
            found |= norm_shapes(f"{self.name}.norm{i}", self.channels)
        if self.projects:
            found |= conv_shapes(f"{self.name}.project", self.channels_in, self.channels, 1)
            found |= norm_shapes(f"{self.name}.project_norm", self.channels)
        return found

    @property
    def norms(self) -> dict[str, int]:
        """Names of the block's batch norms, and how many channels each has."""
        names = ("norm1", "norm2", "project_norm") if self.projects else ("norm1", "norm2")
        return {f"{self.name}.{norm}": self.channels for norm in names}

    def __call__(self, layers: Layers, x: Tensor) -> Tensor:
        at = self.name
        shortcut = x
        if self.projects:
            shortcut = layers.conv_norm(f"{at}.project", f"{at}.project_norm", x, stride=self.stride, padding=0)
        x = layers.relu(layers.conv_norm(f"{at}.conv1", f"{at}.norm1", x, stride=self.stride))
        return layers.relu(layers.conv_norm(f"{at}.conv2", f"{at}.norm2", x) + shortcut)


class ResNet:
    """The ResNet for small images: a 3x3 stem, four stages of 64/128/256/512 channels, an average pool, a linear head.

    The stem has no pooling. Without `stem_relu` it has no ReLU either, as in the released few-shot variant.
    """

    def __init__(
        self, channels_in: int, ways: int, *, depths: tuple[int, int, int, int], stem_relu: bool = False
    ) -> None:
        self.stem_relu = stem_relu
        self.blocks: list[ResidualBlock] = []
        channels = 64
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True)):
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                self.blocks.append(ResidualBlock(f"blocks.{len(self.blocks)}", channels, width, stride))
                channels = width
        self.parameters = conv_shapes("stem", channels_in, 64, 3) | norm_shapes("stem_norm", 64)
        self.norms = {"stem_norm": 64}
        for block in self.blocks:
            self.parameters |= block.parameters
            self.norms |= block.norms
        self.parameters |= linear_shapes("head", 512, ways)

    def features(self, layers: Layers, x: Tensor) -> Tensor:
        """See `Backbone.features`."""
        x = layers.conv_norm("stem", "stem_norm", x)
        x = layers.relu(x) if self.stem_relu else x
        for block in self.blocks:
            x = block(layers, x)
        return x.mean((2, 3))


class MLP:
    """Two linear layers of 512 and 128 units with ReLU, and a linear head: a teacher without batch norm.

    The outputs are logits, not probabilities.
    """

    def __init__(self, channels_in: int, height: int, width: int, ways: int) -> None:
        self.parameters = linear_shapes("layer1", channels_in * height * width, 512)
        self.parameters |= linear_shapes("layer2", 512, 128) | linear_shapes("head", 128, ways)
        self.norms: dict[str, int] = {}

    def features(self, layers: Layers, x: Tensor) -> Tensor:
        """See `Backbone.features`."""
        return layers.relu(layers.linear("layer2", layers.relu(layers.linear("layer1", x.flatten(1)))))


BACKBONES: dict[str, Callable[[int, int, int, int], Backbone]] = {
    "conv4": lambda c, h, w, ways: Conv4(c, h, w, ways),
    "conv4-64": lambda c, h, w, ways: Conv4(c, h, w, ways, hidden=64),
    "conv4-adaptive": lambda c, h, w, ways: Conv4(c, h, w, ways, adaptive=True),
    "resnet10": lambda c, h, w, ways: ResNet(c, ways, depths=(1, 1, 1, 1)),
    "resnet18": lambda c, h, w, ways: ResNet(c, ways, depths=(2, 2, 2, 2)),
    "resnet34": lambda c, h, w, ways: ResNet(c, ways, depths=(3, 4, 6, 3), stem_relu=True),
    "lenet": lambda c, h, w, ways: LeNet(c, h, w, ways),
    "mlp": lambda c, h, w, ways: MLP(c, h, w, ways),
    "alexnet": lambda c, h, w, ways: AlexNet(c, h, w, ways),
    "vgg16": lambda c, h, w, ways: VGG16(c, ways),
}
"""Name -> constructor (channels, height, width, ways). No architecture outside this list is ever built."""


def known_arch(name: str) -> str:
    """The name itself. Raises ValueError, with the known names, if it is none of `BACKBONES`."""
    if is_hub(name):
        raise ValueError(
            f"{name} can be a teacher that `pool add` adds, and is not trained here; known: {', '.join(BACKBONES)}"
        )
    if name not in BACKBONES:
        raise ValueError(f"unknown architecture {name!r}{did_you_mean(name, BACKBONES)}; known: {', '.join(BACKBONES)}")
    return name
