"""A small residual network: trained on one CPU core in two minutes, large enough to be fooled by a poison."""

from __future__ import annotations

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


def _convolution(inputs: int, outputs: int, pool: bool = False) -> list[nn.Module]:
    # Pooling comes first because normalisation then touches a quarter of the values.
    return [
        nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
        *([nn.MaxPool2d(2)] if pool else []),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
