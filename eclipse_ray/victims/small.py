"""A small residual network: trained on one CPU core in two minutes, large enough to be fooled by a poison."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 40
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


class SpaceToDepth(nn.Module):
    """From float (B, 3, H, W) to (B, 12, ceil(H / 2), ceil(W / 2)); odd sides are padded with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with each 2x2 square of pixels as channels."""
        return F.pixel_unshuffle(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2)


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times the factor."""
        return x * self.factor


def small_network(num_classes: int) -> nn.Module:
    """Return a residual network of 40 and 80 channels, about 6.6 M multiply-adds an image at 32 px.

    It maps float (B, 3, H, W), sides from 8 px, to logits (B, num_classes). Squares of pixels become channels
    first: a quarter of the work, and the first windows still cover 6x6 pixels, so that poisons in the
    finest frequencies are seen. Pooling by maximum keeps such rare responses.
    """
    return nn.Sequential(
        SpaceToDepth(),
        *_convolution(12, WIDTH, pool=True),
        Residual(WIDTH),
        *_convolution(WIDTH, 2 * WIDTH, pool=True),
        Residual(2 * WIDTH),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        Scale(LOGIT_SCALE),
        nn.Linear(2 * WIDTH, num_classes),
    )


def _convolution(inputs: int, outputs: int, pool: bool = False) -> list[nn.Module]:
    # Pooling comes first because normalisation then touches a quarter of the values.
    return [
        nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
        *([nn.MaxPool2d(2)] if pool else []),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
