"""DenseNet-121 in its CIFAR form (Huang et al., arXiv 1608.06993): 3x3 stem, no pooling before the first block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROWTH = 32
DEPTHS = (6, 12, 24, 16)


class Dense(nn.Module):
    """A 1x1 and a 3x3 convolution whose 32 channels join their input: (B, C, H, W) to (B, C + 32, H, W)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, 4 * GROWTH, 1),
            *_convolution(4 * GROWTH, GROWTH, 3),
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
            layers += [*_convolution(channels, channels // 2, 1), nn.AvgPool2d(2)]
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


def _convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    """Normalisation and activation come first here, so that each layer weighs the channels it reads."""
    return [
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, size, 1, size // 2, bias=False),
    ]
