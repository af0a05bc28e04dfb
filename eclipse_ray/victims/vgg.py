"""VGG-16 and -19 in their CIFAR form (Simonyan and Zisserman, arXiv 1409.1556): batch norm, one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

WIDTHS = (64, 128, 256, 512, 512)


def vgg16(num_classes: int) -> nn.Module:
    """Return a network from float (B, 3, H, W) to logits (B, num_classes), 14.7 M parameters; any H, W from 1."""
    return _network((2, 2, 3, 3, 3), num_classes)


def vgg19(num_classes: int) -> nn.Module:
    """Return a network from float (B, 3, H, W) to logits (B, num_classes), 20.0 M parameters; any H, W from 1."""
    return _network((2, 2, 4, 4, 4), num_classes)


def _network(depths: Sequence[int], num_classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for width, depth in zip(WIDTHS, depths, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
        # At 16 px nothing is left to halve after the fourth level: ceil_mode keeps the last pixel. At 32 px, and
        # wherever five halvings divide the size, it changes nothing.
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
