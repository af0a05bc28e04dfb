"""The U-Net of imported weights whose attention layers share the number of heads, not the width of a head."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Literal

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

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
