"""Classifiers of the distillation literature, sized for small images: LeNet, AlexNet and VGG-16.

[LeCun1998] Gradient-Based Learning Applied to Document Recognition. [Krizhevsky2012] ImageNet Classification with Deep
Convolutional Neural Networks. [Simonyan2015] Very Deep Convolutional Networks, arXiv 1409.1556. [Zhang2023] IDEAL,
whose release has the LeNet, and an AlexNet of these widths that lacks three of its ReLUs.
"""

import torch.nn.functional as F
from torch import Tensor

from ray_dfml.core.layers import Layers, Shapes, channels_last, conv_shapes, linear_shapes, norm_shapes


class LeNet:
    """Two blocks of conv 5x5, batch norm, ReLU, max-pool 2, of 16 and 32 channels, and a linear head ([Zhang2023])."""

    def __init__(self, channels_in: int, height: int, width: int, ways: int) -> None:
        self.parameters: Shapes = {}
        for i, (fewer, more) in enumerate(((channels_in, 16), (16, 32))):
            self.parameters |= conv_shapes(f"blocks.{i}.conv", fewer, more, 5, bias=True)
            self.parameters |= norm_shapes(f"blocks.{i}.norm", more)
        self.norms = {"blocks.0.norm": 16, "blocks.1.norm": 32}
        self.parameters |= linear_shapes("head", 32 * (height // 4) * (width // 4), ways)

    def features(self, layers: Layers, x: Tensor) -> Tensor:
        """See `backbones.Backbone.features`."""
        for i in range(2):
            x = layers.conv_norm(f"blocks.{i}.conv", f"blocks.{i}.norm", x, padding=2)
            x = layers.relu(F.max_pool2d(channels_last(x), 2))
        return x.flatten(1)


class AlexNet:
    """Five convolutions 3x3 of 32, 64, 128, 256 and 256 channels, a linear layer of 512 units, and a linear head.

    ReLU follows each layer but the head, and max-pool 2 the first, second and fifth convolution. There is no batch
    norm, and no dropout ([Krizhevsky2012], for images of 28 to 64 pixels).
    """

    channels = (32, 64, 128, 256, 256)
    pooled = (0, 1, 4)

    def __init__(self, channels_in: int, height: int, width: int, ways: int) -> None:
        self.parameters: Shapes = {}
        for i, more in enumerate(self.channels):
            fewer = self.channels[i - 1] if i else channels_in
            self.parameters |= conv_shapes(f"convs.{i}", fewer, more, 3, bias=True)
        self.norms: dict[str, int] = {}
        self.parameters |= linear_shapes("hidden", self.channels[-1] * (height // 8) * (width // 8), 512)
        self.parameters |= linear_shapes("head", 512, ways)

    def features(self, layers: Layers, x: Tensor) -> Tensor:
        """See `backbones.Backbone.features`."""
        for i in range(len(self.channels)):
            x = layers.conv(f"convs.{i}", x)
            x = layers.relu(F.max_pool2d(channels_last(x), 2) if i in self.pooled else x)
        return layers.relu(layers.linear("hidden", x.flatten(1)))


class VGG16:
    """Thirteen convolutions 3x3 with batch norm and ReLU in five stages, a global average pool, and a linear head.

    Max-pool 2 ends each stage, unless height or width is a single pixel by then, so that any input size has features.
    The two hidden linear layers of [Simonyan2015] are left out, as usual for small images.
    """

    stages = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

    def __init__(self, channels_in: int, ways: int) -> None:
        self.parameters: Shapes = {}
        self.norms: dict[str, int] = {}
        channels = channels_in
        for stage, (width, depth) in enumerate(self.stages):
            for i in range(depth):
                at = f"stages.{stage}.{i}"
                self.parameters |= conv_shapes(f"{at}.conv", channels, width, 3, bias=True)
                self.parameters |= norm_shapes(f"{at}.norm", width)
                self.norms[f"{at}.norm"] = channels = width
        self.parameters |= linear_shapes("head", channels, ways)

    def features(self, layers: Layers, x: Tensor) -> Tensor:
        """See `backbones.Backbone.features`."""
        for stage, (_, depth) in enumerate(self.stages):
            for i in range(depth):
                at = f"stages.{stage}.{i}"
                x = layers.conv_norm(f"{at}.conv", f"{at}.norm", x)
                if i == depth - 1 and min(x.shape[2:]) > 1:
                    x = F.max_pool2d(channels_last(x), 2)
                x = layers.relu(x)
        return x.mean((2, 3))
