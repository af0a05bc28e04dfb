"""Two networks that diffusers lacks; each takes and returns what `UNet2DModel` does.

`FixedHeadsUNet2DModel` is the U-Net of imported weights, whose attention layers share the number of heads, not
the width of a head. `ShuffledNetwork` is fast: residual convolutions on blocks of 2 x 2 image pixels (pixel
unshuffle, as in FFDNet).
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Literal, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional

# Marks the block types in config.json: plain UNet2DModel knows no such blocks and refuses the folder, instead of
# opening it with one head width for all layers and computing something else.
MARK = "FixedHeads"
# GroupNorm32 of the published code, whatever the number of channels.
NORM_GROUPS = 32


class FixedHeadsUNet2DModel(UNet2DModel):
    """A `UNet2DModel` with `attention_heads` heads in every attention layer, however many channels it has.

    Takes and returns what `UNet2DModel` does; block types are diffusers' names with "FixedHeads" before them.
    Raises ValueError for block types without that mark.
    """

    @register_to_config
    def __init__(
        self,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 256, 384, 512),
        layers_per_block: int = 3,
        down_block_types: Sequence[str] = (),
        up_block_types: Sequence[str] = (),
        resample: Literal["conv", "resnet"] = "conv",
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "scale_shift",
        attention_heads: int = 4,
        # The inherited forward looks these two up in the config.
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
    ) -> None:
        super().__init__(
            out_channels=out_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple(_unmarked(name) for name in down_block_types),
            up_block_types=tuple(_unmarked(name) for name in up_block_types),
            downsample_type=resample,
            upsample_type=resample,
            resnet_time_scale_shift=resnet_time_scale_shift,
            attention_head_dim=None,
            norm_num_groups=NORM_GROUPS,
            attn_norm_num_groups=NORM_GROUPS,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
        )
        # The line above registered the names without the mark.
        self.register_to_config(down_block_types=list(down_block_types), up_block_types=list(up_block_types))
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.heads = layer.sliceable_head_dim = attention_heads
                layer.scale = (layer.inner_dim // attention_heads) ** -0.5


# Settings of the parent that never vary here stay out of config.json.
FixedHeadsUNet2DModel.ignore_for_config = sorted(
    set(signature(UNet2DModel.__init__).parameters) - set(signature(FixedHeadsUNet2DModel.__init__).parameters)
)


def _unmarked(name: str) -> str:
    if not name.startswith(MARK):
        raise ValueError(f"block type {name}: expected a name that starts with {MARK}")
    return name.removeprefix(MARK)


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
        self.tile = 512
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
