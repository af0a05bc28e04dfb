"""A fast network: residual convolutions on blocks of 2 x 2 image pixels (pixel unshuffle, as in FFDNet)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional

# Side in pixels of the block of an image that is one pixel of the network.
BLOCK = 2
# Sines and cosines of the timestep, and the numbers that a layer makes of them.
WAVES, EMBEDDING = 32, 64

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class ShuffledNetwork(ModelMixin, ConfigMixin):
    """Residual blocks of one width at half the resolution; takes and returns what `UNet2DModel` does.

    `block_out_channels` has one entry, the width. There is no normalisation: at this size it would take as long as
    the convolutions, and without it each block begins as the identity.
    """

    @register_to_config
    def __init__(
        self, out_channels: int = 3, block_out_channels: Sequence[int] = (32,), layers_per_block: int = 3
    ) -> None:
        super().__init__()
        (width,) = block_out_channels
        self.size_multiple = BLOCK
        self.time = nn.Linear(WAVES, EMBEDDING)
        self.conv_in = nn.Conv2d(3 * BLOCK**2, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers_per_block))
        self.scale_out = _Scale(width)
        self.conv_out = _zeroed(nn.Conv2d(width, out_channels * BLOCK**2, 3, padding=1))
        # Of eps_pred, a large part is x_t times a number that the timestep decides.
        self.skip = _zeroed(nn.Linear(EMBEDDING, 3 * BLOCK**2))

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        """Return `.sample` (B, out_channels, H, W) of x_t (B, 3, H, W) with even sides, and timesteps (B,)."""
        waves = get_timestep_embedding(timestep, WAVES).to(sample.dtype)
        embedding = functional.silu(self.time(waves))
        pixels = functional.pixel_unshuffle(sample, BLOCK).contiguous(memory_format=torch.channels_last)
        hidden = self.conv_in(pixels)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        output = self.conv_out(functional.relu(self.scale_out(hidden, embedding)))
        eps_pred, mix = output[:, : pixels.shape[1]], output[:, pixels.shape[1] :]
        eps_pred = torch.addcmul(eps_pred, pixels, self.skip(embedding)[:, :, None, None])
        if mix.shape[1]:
            eps_pred = torch.cat([eps_pred, mix], dim=1)
        return UNet2DOutput(sample=functional.pixel_shuffle(eps_pred, BLOCK))


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


class _Scale(nn.Module):
    """A scale and a shift per channel that depend on the timestep; at first they change nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = _zeroed(nn.Linear(EMBEDDING, 2 * width))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.linear(embedding)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, hidden, 1 + scale)


def _zeroed(layer: Layer) -> Layer:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
