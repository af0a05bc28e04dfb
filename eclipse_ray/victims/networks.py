"""Networks of victims in the form usual for CIFAR: a 3x3 convolution of stride 1 comes first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM, WIDTH = 24, 48
LOGIT_SCALE = 0.125
"""Maxima of residual sums are large; unscaled, the first steps of the classifier overshoot."""


class Residual(nn.Module):
    """Two 3x3 convolutions added to their input (He et al., arXiv 1512.03385); keeps (B, channels, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(channels, channels), *_convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of `x`."""
        out: Tensor = x + self.body(x)
        return out


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times the factor."""
        return x * self.factor


def small_network(num_classes: int) -> nn.Module:
    """Return a residual network of 48 and 96 channels, about 11 M multiply-adds an image at 32 px.

    It maps float (B, 3, H, W), sides from 8 px, to logits (B, num_classes). The first convolution sees every
    3x3 window, without which a victim is blind to the finest poisons (an autoregressive one hardly touches a
    network that begins with 2x2 squares); pooling by maximum then keeps such responses and saves work.
    """
    return nn.Sequential(
        *_convolution(3, STEM, pool=True),
        *_convolution(STEM, WIDTH, pool=True),
        Residual(WIDTH),
        *_convolution(WIDTH, 2 * WIDTH, pool=True),
        Residual(2 * WIDTH),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        Scale(LOGIT_SCALE),
        nn.Linear(2 * WIDTH, num_classes),
    )


AIRBENCH_WIDTHS = (64, 256, 256)


def airbench(num_classes: int) -> nn.Module:
    """Return the convolutions of K. Jordan's network for 94 % (arXiv 2404.00498), 147 M multiply-adds at 32 px.

    It maps float (B, 3, H, W), sides from 8 px, to logits (B, num_classes). The first convolution is learned and
    3x3, not fixed and 2x2, for the reason that `small_network` gives; ReLU stands for GELU.
    """
    layers = _convolution(3, STEM)
    inputs = STEM
    for width in AIRBENCH_WIDTHS:
        layers += [*_convolution(inputs, width, pool=True), *_convolution(width, width)]
        inputs = width
    return nn.Sequential(
        *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), Scale(LOGIT_SCALE), nn.Linear(inputs, num_classes)
    )


def _convolution(inputs: int, outputs: int, pool: bool = False) -> list[nn.Module]:
    # Pooling comes first because normalisation then touches a quarter of the values.
    return [
        nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
        *([nn.MaxPool2d(2)] if pool else []),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


RESNET_WIDTHS = (64, 128, 256, 512)
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
    return _resnet(Block, (2, 2, 2, 2), num_classes)


def resnet50(num_classes: int) -> nn.Module:
    """Return a network from float (B, 3, H, W) to logits (B, num_classes), 23.5 M parameters."""
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes)


def _resnet(block: type[Block] | type[Bottleneck], depths: Sequence[int], num_classes: int) -> nn.Module:
    blocks: list[nn.Module] = []
    inputs = RESNET_WIDTHS[0]
    for level, (width, depth) in enumerate(zip(RESNET_WIDTHS, depths, strict=True)):
        for index in range(depth):
            blocks.append(block(inputs, width, 2 if level and not index else 1))
            inputs = width * block.expansion
    return nn.Sequential(
        nn.Conv2d(3, RESNET_WIDTHS[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(RESNET_WIDTHS[0]),
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


VGG_WIDTHS = (64, 128, 256, 512, 512)


def vgg16(num_classes: int) -> nn.Module:
    """Return a network from float (B, 3, H, W) to logits (B, num_classes), 14.7 M parameters; any H, W from 1."""
    return _vgg((2, 2, 3, 3, 3), num_classes)


def vgg19(num_classes: int) -> nn.Module:
    """Return a network from float (B, 3, H, W) to logits (B, num_classes), 20.0 M parameters; any H, W from 1."""
    return _vgg((2, 2, 4, 4, 4), num_classes)


def _vgg(depths: Sequence[int], num_classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for width, depth in zip(VGG_WIDTHS, depths, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
        # At 16 px nothing is left to halve after the fourth level: ceil_mode keeps the last pixel. At 32 px, and
        # wherever five halvings divide the size, it changes nothing.
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))


GROWTH = 32
DEPTHS = (6, 12, 24, 16)


class Dense(nn.Module):
    """A 1x1 and a 3x3 convolution whose 32 channels join their input: (B, C, H, W) to (B, C + 32, H, W)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_densenet_convolution(inputs, 4 * GROWTH, 1),
            *_densenet_convolution(4 * GROWTH, GROWTH, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the new channels, then those of `x`."""
        return torch.cat([self.body(x), x], dim=1)


def densenet121(num_classes: int) -> nn.Module:
    """Return a network from float (B, 3, H, W), sides from 8 px, to logits (B, num_classes), 7.0 M parameters."""
    channels = 2 * GROWTH
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 1, 1, bias=False)]
    for level, depth in enumerate(DEPTHS):
        if level:
            layers += [*_densenet_convolution(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(Dense(channels))
            channels += GROWTH
    return nn.Sequential(
        *layers,
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )


def _densenet_convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    """Normalisation and activation come first here, so that each layer weighs the channels it reads."""
    return [
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, size, 1, size // 2, bias=False),
    ]
