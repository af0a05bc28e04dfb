"""ResNet-18 and -50 in their CIFAR form (He et al., arXiv 1512.03385): 3x3 stem, no pooling before the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
EXPANSION = 4
"""How much wider the output of a bottleneck is than its 3x3 convolution."""


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut: (B, inputs, H, W) to (B, width, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, width, H / stride, W / stride)."""
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut: (B, inputs, H, W) to (B, 4 width, H / stride, W / stride)."""

    expansion = EXPANSION

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 4 width, H / stride, W / stride)."""
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.relu(self.norm2(self.conv2(out)))
        out = self.norm3(self.conv3(out)) + self.shortcut(x)
        return F.relu(out, inplace=True)


def resnet18(num_classes: int) -> nn.Module:
    """Return a network from float (B, 3, H, W) to logits (B, num_classes), 11.2 M parameters."""
    return _network(Block, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int) -> nn.Module:
    """Return a network from float (B, 3, H, W) to logits (B, num_classes), 23.5 M parameters."""
    return _network(Bottleneck, (3, 4, 6, 3), num_classes)


def _network(block: type[Block] | type[Bottleneck], depths: Sequence[int], num_classes: int) -> nn.Module:
    blocks: list[nn.Module] = []
    inputs = WIDTHS[0]
    for level, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
        for index in range(depth):
            blocks.append(block(inputs, width, 2 if level and not index else 1))
            inputs = width * block.expansion
    return nn.Sequential(
        nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(WIDTHS[0]),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, num_classes),
    )


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
