"""`ShuffledNetwork`, the default network: residual convolutions on blocks of 2 x 2 pixels, as in FFDNet.

It is made of torch alone: diffusers, which the other networks are built with, takes seconds to import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from eclipse_ray.config import TILES
from eclipse_ray.errors import InputError

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MODEL_FILE = "config.json"
# Side in pixels of the block of an image that is one pixel of the network.
BLOCK = 2
# Sines and cosines of the timestep, and the numbers that a layer makes of them.
WAVES, EMBEDDING = 32, 64

# Drawn images of each kind, their side, and the share of their activations that must not be clipped.
DRAWN, SIDE, INSIDE = 16, 32, 0.9999
ONE = [1, 1]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class ShuffledConfig:
    """What config.json says of the network, under the names that diffusers' networks have for it."""

    out_channels: int
    block_out_channels: Sequence[int]
    layers_per_block: int


class Output(NamedTuple):
    """What the network returns, as diffusers' networks do."""

    sample: Tensor


class AtTimestep(NamedTuple):
    """The network at one timestep, its scales and shifts inside a block made part of the convolutions.

    `convolutions` are weight and bias of the first and of both of each block; what comes out of them is multiplied
    by `gain` and `shift` is added, (1, width, 1, 1); then come ReLU, `last` and `skip`.
    """

    convolutions: list[tuple[Tensor, Tensor]]
    gain: Tensor
    shift: Tensor
    last: tuple[Tensor, Tensor]
    skip: Tensor


class ShuffledNetwork(nn.Module):
    """Residual blocks of one width at half the resolution; is called as `UNet2DModel` is.

    `block_out_channels` has one entry, the width. There is no normalisation: at this size it would take as long as
    the convolutions, and without it each block begins as the identity.
    """

    def __init__(self, config: ShuffledConfig) -> None:
        super().__init__()
        (width,) = config.block_out_channels
        self.config = config
        self.size_multiple = BLOCK
        self.tile = TILES["shuffled"]
        self.time = nn.Linear(WAVES, EMBEDDING)
        self.conv_in = nn.Conv2d(3 * BLOCK**2, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.layers_per_block))
        self.scale_out = _Scale(width)
        self.conv_out = _zeroed(nn.Conv2d(width, config.out_channels * BLOCK**2, 3, padding=1))
        # Of eps_pred, a large part is x_t times a number that the timestep decides.
        self.skip = _zeroed(nn.Linear(EMBEDDING, 3 * BLOCK**2))

    def forward(self, sample: Tensor, timestep: Tensor) -> Output:
        """Return `.sample` (B, out_channels, H, W) of x_t (B, 3, H, W) with even sides, and timesteps (B,)."""
        embedding = self.embed(timestep)
        pixels = functional.pixel_unshuffle(sample, BLOCK).contiguous(memory_format=torch.channels_last)
        hidden = self.conv_in(pixels)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        output = self.conv_out(functional.relu(self.scale_out(hidden, embedding)))
        return Output(sample=assembled(pixels, output, self.skip(embedding)))

    def at(self, timestep: float) -> AtTimestep:
        """Return the network as it is at one timestep."""
        embedding = self.embed(torch.tensor([timestep], device=self.time.weight.device))
        inside = [pair for block in self.blocks for pair in block.at(embedding)]  # type: ignore[operator]
        gain, shift = self.scale_out.of(embedding)
        convolutions = [_weights(self.conv_in), *inside]
        return AtTimestep(convolutions, gain, shift, _weights(self.conv_out), self.skip(embedding))

    def embed(self, timestep: Tensor) -> Tensor:
        """Return what the layers see of timesteps (B,), (B, EMBEDDING)."""
        embedding: Tensor = functional.silu(self.time(_waves(timestep).to(self.time.weight.dtype)))
        return embedding

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and the weights into a local folder, under the names that diffusers uses."""
        settings = {"_class_name": type(self).__name__, **asdict(self.config)}
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / MODEL_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, path / WEIGHTS_FILE, metadata={"format": "pt"})


def open_shuffled(folder: Path) -> ShuffledNetwork:
    """Return the network of a local folder. Raises InputError if the weights are not those of config.json.

    An error of the file system, of JSON or of safetensors is raised as it is.
    """
    found = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    # What diffusers wrote about itself begins with an underscore.
    config = ShuffledConfig(**{key: found[key] for key in found if not key.startswith("_")})
    weights = load_file(folder / WEIGHTS_FILE)
    # Without memory for its numbers: a damaged config.json may ask for any width.
    with torch.device("meta"):
        network = ShuffledNetwork(config)
    expected = network.state_dict()
    if strange := sorted(expected.keys() ^ weights.keys()):
        raise InputError(f"{folder / WEIGHTS_FILE}: {strange[0]} is missing or unknown to {MODEL_FILE}")
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            raise InputError(
                f"{folder / WEIGHTS_FILE}: {name} is {list(weights[name].shape)}, by {MODEL_FILE} "
                f"{list(value.shape)}; train again, or copy the folder again"
            )
    network.load_state_dict(weights, assign=True)
    return network.float()


def assembled(pixels: Tensor, output: Tensor, skip: Tensor) -> Tensor:
    """Return the output (B, out_channels, H, W), from that of the last convolution and `skip` times the pixels."""
    eps_pred, mix = output[:, : pixels.shape[1]], output[:, pixels.shape[1] :]
    eps_pred = torch.addcmul(eps_pred, pixels, skip[:, :, None, None])
    if mix.shape[1]:
        eps_pred = torch.cat([eps_pred, mix], dim=1)
    return functional.pixel_shuffle(eps_pred, BLOCK)


def _waves(timestep: Tensor) -> Tensor:
    """Return sines and cosines of timesteps (B,), float32 (B, WAVES); diffusers' get_timestep_embedding."""
    half = WAVES // 2
    places = torch.arange(half, dtype=torch.float32, device=timestep.device)
    # In this order, so that old weights see the same numbers to the last bit.
    phases = timestep[:, None].float() * (-math.log(10_000) * places / (half - 1)).exp()
    return torch.cat([phases.sin(), phases.cos()], dim=1)


class _Block(nn.Module):
    """Two convolutions, with scale and shift of the timestep between them, added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.scale = _Scale(width)
        self.conv2 = _zeroed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        added: Tensor = self.conv2(functional.relu(self.scale(self.conv1(hidden), embedding)))
        return hidden + added

    def at(self, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return weight and bias of both convolutions, the first with the scale and shift of (1, EMBEDDING)."""
        gain, shift = (one.flatten() for one in self.scale.of(embedding))
        weight, bias = _weights(self.conv1)
        return [(weight * gain[:, None, None, None], bias * gain + shift), _weights(self.conv2)]


class _Scale(nn.Module):
    """A scale and a shift per channel that depend on the timestep; at first they change nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = _zeroed(nn.Linear(EMBEDDING, 2 * width))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        gain, shift = self.of(embedding)
        return torch.addcmul(shift, hidden, gain)

    def of(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to multiply by and what to add, both (B, width, 1, 1)."""
        scale, shift = self.linear(embedding)[:, :, None, None].chunk(2, dim=1)
        return 1 + scale, shift


def _weights(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight, layer.bias


def _zeroed(layer: Layer) -> Layer:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Scale(NamedTuple):
    """A byte stands for (byte - zero) * step."""

    step: float
    zero: int


class Int8Network:
    """A `ShuffledNetwork` in integers of 8 bits, at one timestep, where the schedule has `abar`; has no gradients.

    All images of a step have the same timestep, so its scales and shifts become part of the convolutions. Then
    oneDNN, which torch contains, computes a convolution, its ReLU or its sum with the stream, and the rounding to
    8 bits in one pass. Weights are rounded per output channel, activations per layer. How far these reach is found
    with drawn images, and not with those to purify, so that the result of an image depends on no other image.
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
        pairs = zip(blocks[::2], blocks[1::2], strict=True)
        for (outer, inner), (before, after) in zip(pairs, pairwise(self.streams), strict=True):
            inside = outer(stream, inner.source, relu=True)
            stream = inner.added(inside, stream, before, after)
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
