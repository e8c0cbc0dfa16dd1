"""Classifiers of the field, as plain modules. Weights are drawn by `net.Net.init`, never by the constructor's defaults.

[Finn2017] Model-Agnostic Meta-Learning, arXiv 1703.03400 (Conv4). [He2016] Deep Residual Learning, arXiv 1512.03385.
[Wei2024] FREE, arXiv 2405.00984, section 5.1 (Conv4 with 32 channels; ResNet-10/-18 of the few-shot literature).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ray_dfml.core.norm import BatchNorm


class ConvBlock(nn.Module):
    """Conv 3x3 -> batch norm -> max-pool 2 -> ReLU. (ReLU and max-pool commute; pooling first is cheaper.)

    A CPU pools channels-last images 15 times as fast; the values are the same.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.conv2d(x, self.conv.weight, padding=1), shift=self.conv.bias)
        return F.relu(F.max_pool2d(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 2))


class Conv4(nn.Module):
    """Four blocks and a linear head ([Finn2017]). `adaptive` pools to 1x1 first: one head for any input size."""

    def __init__(
        self, channels_in: int, height: int, width: int, ways: int, *, hidden: int = 32, adaptive: bool = False
    ):
        super().__init__()
        self.blocks = nn.Sequential(*[ConvBlock(channels_in if i == 0 else hidden, hidden) for i in range(4)])
        self.adaptive = adaptive
        self.headless = False
        self.head = nn.Linear(hidden if adaptive else hidden * (height // 16) * (width // 16), ways)

    def features(self, x: Tensor) -> Tensor:
        """Features [n f] before the head."""
        x = self.blocks(x)
        return x.amax((2, 3)) if self.adaptive else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return x if self.headless else self.head(x)


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus identity, or plus a 1x1 conv-BN where channels or size change ([He2016])."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = BatchNorm(channels)
        self.project = None
        if stride != 1 or channels_in != channels:
            self.project = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.project_norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.project is None else self.project_norm(self.project(x))
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """Few-shot ResNet: 3x3 stem without pooling, four stages 64/128/256/512, global average pool, linear head.

    The released few-shot variant has no ReLU after the stem; `stem_relu` puts it back.
    """

    def __init__(
        self, channels_in: int, ways: int, *, depths: tuple[int, int, int, int], stem_relu: bool = False
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels_in, 64, 3, 1, 1, bias=False)
        self.stem_norm = BatchNorm(64)
        self.stem_relu = stem_relu
        blocks, channels = [], 64
        for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), depths, strict=True)):
            for i in range(depth):
                blocks.append(ResidualBlock(channels, width, 2 if stage and i == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.headless = False
        self.head = nn.Linear(512, ways)

    def features(self, x: Tensor) -> Tensor:
        """Features [n f] before the head."""
        x = self.stem_norm(self.stem(x))
        return self.blocks(F.relu(x) if self.stem_relu else x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return x if self.headless else self.head(x)


class MLP(nn.Module):
    """Linear 512, linear 128, linear head, with ReLU: a teacher without batch norm. Logits, not probabilities."""

    def __init__(self, channels_in: int, height: int, width: int, ways: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(channels_in * height * width, 512)
        self.layer2 = nn.Linear(512, 128)
        self.headless = False
        self.head = nn.Linear(128, ways)

    def features(self, x: Tensor) -> Tensor:
        """Features [n f] before the head."""
        return F.relu(self.layer2(F.relu(self.layer1(x.flatten(1)))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return x if self.headless else self.head(x)


BACKBONES: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "conv4": lambda c, h, w, ways: Conv4(c, h, w, ways),
    "conv4-64": lambda c, h, w, ways: Conv4(c, h, w, ways, hidden=64),
    "conv4-adaptive": lambda c, h, w, ways: Conv4(c, h, w, ways, adaptive=True),
    "resnet10": lambda c, h, w, ways: ResNet(c, ways, depths=(1, 1, 1, 1)),
    "resnet18": lambda c, h, w, ways: ResNet(c, ways, depths=(2, 2, 2, 2)),
    "mlp": lambda c, h, w, ways: MLP(c, h, w, ways),
}
"""Name -> constructor (channels, height, width, ways). The allow-list of architectures: nothing else is ever built."""
