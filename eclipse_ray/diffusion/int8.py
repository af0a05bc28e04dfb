"""`Int8Network`: the default network in integers of 8 bits, for CPUs that multiply them faster than floats.

All images of a step have the same timestep, so its scales and shifts become part of the convolutions. Then oneDNN,
which torch contains, computes a convolution, its ReLU or its sum with the stream, and the rounding to 8 bits in
one pass. Weights are rounded per output channel, activations per layer. How far these reach is found with drawn
images, and not with those to purify, so that the result of an image depends on no other image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from eclipse_ray.diffusion.shuffled import BLOCK, AtTimestep, ShuffledNetwork, assembled

# Drawn images of each kind, their side, and the share of their activations that must not be clipped.
DRAWN, SIDE, INSIDE = 16, 32, 0.9999
ONE = [1, 1]


class Scale(NamedTuple):
    """A byte stands for (byte - zero) * step."""

    step: float
    zero: int


class Int8Network:
    """A `ShuffledNetwork` at one timestep, shown to it as `timestep`, where the schedule has `abar`.

    There are no gradients.
    """

    @torch.inference_mode()
    def __init__(self, network: ShuffledNetwork, timestep: float, abar: float) -> None:
        at = network.at(timestep)
        self.skip = at.skip
        scales = _scales(at, abar)
        self.streams = scales[1::2]
        self.layers = [_Convolution(*one, scale) for one, scale in zip(at.convolutions, scales[:-2], strict=True)]
        self.last = _Convolution(*at.last, scales[-1])
        # From bytes of the stream to bytes for `last`.
        step, zero = self.streams[-1]
        self.gain = at.gain * step / self.last.source.step
        self.shift = at.shift / self.last.source.step - self.gain * zero

    @torch.inference_mode()
    def __call__(self, sample: Tensor) -> Tensor:
        """Return the output (B, out_channels, H, W) for x_t, float32 (B, 3, H, W) with even sides."""
        pixels = functional.pixel_unshuffle(sample, BLOCK).contiguous(memory_format=torch.channels_last)
        first, *blocks = self.layers
        step, zero = first.source
        stream = first(_bytes(pixels / step + zero), self.streams[0])
        for index in range(0, len(blocks), 2):
            inside = blocks[index](stream, blocks[index + 1].source, relu=True)
            stream = blocks[index + 1].added(
                inside, stream, self.streams[index // 2], self.streams[index // 2 + 1]
            )
        # The ReLU is that bytes do not go below zero.
        features = _bytes(torch.addcmul(self.shift, stream.float(), self.gain))
        return assembled(pixels, self.last(features, None), self.skip)


class _Convolution:
    """A convolution of 3 x 3 whose weights are bytes; takes bytes of `source`."""

    def __init__(self, weight: Tensor, bias: Tensor, source: Scale) -> None:
        self.source, self.bias = source, bias
        self.steps = weight.abs().amax((1, 2, 3)).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        self.zeros = torch.zeros_like(self.steps, dtype=torch.int32)
        rounded = (weight / self.steps.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.weight = torch.ops.onednn.qconv_prepack(rounded, self.steps, *source, ONE, ONE, ONE, 1, None)

    def __call__(self, hidden: Tensor, target: Scale | None, *, relu: bool = False) -> Tensor:
        """Return bytes of `target`, of None float32."""
        step, zero, dtype = (*target, torch.uint8) if target else (1.0, 0, torch.float32)
        given = (hidden, *self.source, self.weight, self.steps, self.zeros, self.bias, ONE, ONE, ONE, 1)
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            *given, step, zero, dtype, "relu" if relu else "none", [], ""
        )
        return result

    def added(self, hidden: Tensor, stream: Tensor, before: Scale, after: Scale) -> Tensor:
        """Return the sum with `stream`, bytes of `before`, as bytes of `after`; takes the memory of `stream`."""
        given = (hidden, *self.source, self.weight, self.steps, self.zeros, stream, self.bias, ONE, ONE, ONE, 1)
        result: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            *given, *after, torch.uint8, *before, "sum", 1.0, "none", [], ""
        )
        return result


def _bytes(values: Tensor) -> Tensor:
    """Round `values`, which are overwritten, to bytes."""
    return values.round_().clamp_(0, 255).to(torch.uint8)


def _scales(at: AtTimestep, abar: float) -> list[Scale]:
    """Return the scale of the pixels, then by turns of the stream and inside a block, last of the features."""
    pixels = functional.pixel_unshuffle(_drawn(abar), BLOCK)
    stream = functional.conv2d(pixels, *at.convolutions[0], padding=1)
    found = [_signed(pixels), _signed(stream)]
    for first, second in zip(at.convolutions[1::2], at.convolutions[2::2], strict=True):
        inside = functional.conv2d(stream, *first, padding=1).relu()
        stream = stream + functional.conv2d(inside, *second, padding=1)
        found += [_positive(inside), _signed(stream)]
    return [*found, _positive(torch.addcmul(at.shift, stream, at.gain).relu())]


def _signed(values: Tensor) -> Scale:
    return Scale(_reach(values) / 127, 128)


def _positive(values: Tensor) -> Scale:
    return Scale(_reach(values) / 255, 0)


def _reach(values: Tensor) -> float:
    sizes = values.abs().flatten()
    return max(float(sizes.topk(round(len(sizes) * (1 - INSIDE))).values[-1]), torch.finfo(values.dtype).tiny)


def _drawn(abar: float) -> Tensor:
    """Return noised images of saturated colours, smooth over an eighth of the side and more."""
    generator = torch.Generator().manual_seed(0)
    corners = [torch.rand(DRAWN, 3, side, side, generator=generator).round() * 2 - 1 for side in (1, 2, 4, 8)]
    images = torch.cat([functional.interpolate(one, size=SIDE, mode="bilinear") for one in corners])
    return abar**0.5 * images + (1 - abar) ** 0.5 * torch.randn(images.shape, generator=generator)
