"""The U-Net of improved-diffusion and guided-diffusion, told from its tensors and rebuilt as a `UNet2DModel`.

Both codes share one layout: `input_blocks` (a convolution, then every level's blocks, a downsampler between
levels), `middle_block`, `output_blocks` (levels upwards, one block more each, the last holding the upsampler).
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor

from eclipse_ray.config import ScheduleName, digest
from eclipse_ray.diffusion.checkpoint import CARD_FILE, DENOISER_FILES, Card, read_card, save_denoiser
from eclipse_ray.diffusion.network import Denoiser, parameter_count
from eclipse_ray.diffusion.process import (
    IMAGE_CHANNELS,
    cosine_alphas_cumprod,
    linear_alphas_cumprod,
    linear_betas,
    noise_std,
)
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.results import ImportResult

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


# Layers of a residual block and of an attention layer: the original's name, diffusers' name.
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = (("norm", "group_norm"), ("qkv", "to_q"), ("qkv", "to_k"), ("qkv", "to_v"), ("proj_out", "to_out.0"))
OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class Architecture:
    """What the tensors tell of a published U-Net; level 0 has the full image size."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[int, ...]
    learned_range: bool
    resnet_time_scale_shift: Literal["default", "scale_shift"]
    resample: Literal["conv", "resnet"]


def read_architecture(state: Mapping[str, Tensor], file: str | Path) -> Architecture:
    """Return the architecture of a state dict. Raises InputError if it is none that UNet2DModel can compute."""
    inputs, out_channels = _channels(state, file, "input_blocks.0.0", 1), _channels(state, file, "out.2", 0)
    if "label_emb.weight" in state:
        raise InputError(f"{file}: the network was trained with class labels, expected one without (no label_emb)")
    if inputs != IMAGE_CHANNELS or out_channels not in (IMAGE_CHANNELS, 2 * IMAGE_CHANNELS):
        raise InputError(
            f"{file}: the network takes {inputs} channels and returns {out_channels}, expected {IMAGE_CHANNELS} "
            f"and {IMAGE_CHANNELS} or {2 * IMAGE_CHANNELS}: an unconditional network of RGB images"
        )
    levels, layers = _levels(state, file)
    firsts = [f"input_blocks.{1 + level * (layers + 1)}" for level in range(levels)]
    channels = tuple(_channels(state, file, f"{first}.0.out_layers.3", 0) for first in firsts)
    if any(not width or width % NORM_GROUPS for width in channels):
        raise InputError(f"{file}: channels {list(channels)} of the levels, expected multiples of {NORM_GROUPS}")
    scaled = _channels(state, file, f"{firsts[0]}.0.emb_layers.1", 0) == 2 * channels[0]
    resnets = f"input_blocks.{layers + 1}.0.in_layers.0.weight" in state
    return Architecture(
        block_out_channels=channels,
        layers_per_block=layers,
        attention_levels=tuple(level for level in range(levels) if f"{firsts[level]}.1.qkv.weight" in state),
        learned_range=out_channels == 2 * IMAGE_CHANNELS,
        resnet_time_scale_shift="scale_shift" if scaled else "default",
        resample="resnet" if resnets else "conv",
    )


def convert(state: Mapping[str, Tensor], architecture: Architecture, heads: int, file: str | Path) -> UNet2DModel:
    """Return the network of a state dict, float32 on the CPU; its forward pass equals the original's.

    It is a FixedHeadsUNet2DModel if its attention layers differ in head width. Raises ConfigError for a number of
    heads that does not divide their channels, InputError for missing, left over or misshapen tensors.
    """
    with torch.device("meta"):
        unet = build(architecture, heads)
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    # Which residual blocks need a 1x1 shortcut is for the network to say: names that it lacks are dropped.
    sources = {new: old for new, old in _names(architecture) if new in shapes}
    needed = set(sources.values())
    _refuse(file, "lacks", sorted(needed - state.keys()))
    _refuse(file, "holds the unknown", [name for name in state if name not in needed])
    wrong = [old for new, old in sources.items() if tuple(state[old].shape) != _shape_of(old, shapes[new])]
    _refuse(file, "disagrees with its other tensors on the shape of", list(dict.fromkeys(wrong)))
    weights = {new: _weight(state[old], old, new, heads).reshape(shapes[new]) for new, old in sources.items()}
    unet.load_state_dict(weights, assign=True)
    return unet


def build(architecture: Architecture, heads: int) -> UNet2DModel:
    """Return an untrained network of this architecture with `heads` heads in every attention layer."""
    channels, attended = architecture.block_out_channels, architecture.attention_levels
    widths = [channels[level] for level in attended] + [channels[-1]]
    if heads < 1 or any(width % heads for width in widths):
        raise ConfigError(
            f"--heads {heads}: must divide {sorted(set(widths))}, the channels of the attention layers"
        )
    plain = architecture.resample == "conv"
    attends = [level in attended for level in range(len(channels))]
    down, up = ("DownBlock2D", "UpBlock2D") if plain else ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down_types = ["AttnDownBlock2D" if attend else down for attend in attends]
    up_types = ["AttnUpBlock2D" if attend else up for attend in reversed(attends)]
    out_channels = IMAGE_CHANNELS * (2 if architecture.learned_range else 1)
    if len(set(widths)) > 1:
        return FixedHeadsUNet2DModel(
            out_channels=out_channels,
            block_out_channels=list(channels),
            layers_per_block=architecture.layers_per_block,
            down_block_types=[MARK + name for name in down_types],
            up_block_types=[MARK + name for name in up_types],
            resample=architecture.resample,
            resnet_time_scale_shift=architecture.resnet_time_scale_shift,
            attention_heads=heads,
        )
    return UNet2DModel(
        out_channels=out_channels,
        block_out_channels=channels,
        layers_per_block=architecture.layers_per_block,
        down_block_types=tuple(down_types),
        up_block_types=tuple(up_types),
        downsample_type=architecture.resample,
        upsample_type=architecture.resample,
        resnet_time_scale_shift=architecture.resnet_time_scale_shift,
        attention_head_dim=widths[0] // heads,
        norm_num_groups=NORM_GROUPS,
        # Without it the middle attention of a scale-shift network would have no normalisation.
        attn_norm_num_groups=NORM_GROUPS,
    )


def first_few(names: list[str]) -> str:
    """Return the first names and how many more there are, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _levels(state: Mapping[str, Tensor], file: str | Path) -> tuple[int, int]:
    """Return (levels, residual blocks of a level), told from where the upsamplers lie."""
    inputs, outputs = _indices(state, "input_blocks"), _indices(state, "output_blocks")
    ups = [index for index in outputs if any(name in state for name in _upsampler_names(index))]
    levels = len(ups) + 1
    blocks = len(outputs) // levels
    if (
        blocks < 2
        or outputs != list(range(levels * blocks))
        or inputs != list(range(levels * blocks))
        or ups != [level * blocks - 1 for level in range(1, levels)]
    ):
        raise InputError(
            f"{file}: {len(inputs)} input blocks, {len(outputs)} output blocks and {len(ups)} upsamplers make no "
            "U-Net with equally many blocks a level and learned resampling, the only kind that can be imported"
        )
    return levels, blocks - 1


def _upsampler_names(index: int) -> Iterator[str]:
    for place in (1, 2):
        yield f"output_blocks.{index}.{place}.conv.weight"
        yield f"output_blocks.{index}.{place}.in_layers.0.weight"


def _indices(state: Mapping[str, Tensor], group: str) -> list[int]:
    pieces = (name.split(".") for name in state if name.startswith(f"{group}."))
    return sorted({int(piece[1]) for piece in pieces if piece[1].isascii() and piece[1].isdigit()})


def _channels(state: Mapping[str, Tensor], file: str | Path, layer: str, axis: int) -> int:
    weight = state.get(f"{layer}.weight")
    if weight is None or weight.ndim < 2:
        raise InputError(
            f"{file}: not a U-Net of improved-diffusion or guided-diffusion: {layer}.weight is missing or damaged"
        )
    return int(weight.shape[axis])


def _names(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Yield (diffusers' name, the original's) of every tensor, and of shortcuts that some blocks lack."""
    layers = [*OUTSIDE.items(), *_middle(), *_sides(architecture)]
    for old, new in layers:
        for leaf in ("weight", "bias"):
            yield f"{new}.{leaf}", f"{old}.{leaf}"


def _middle() -> Iterator[tuple[str, str]]:
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")


def _sides(architecture: Architecture) -> Iterator[tuple[str, str]]:
    levels, layers = len(architecture.block_out_channels), architecture.layers_per_block
    learned = architecture.resample == "conv"
    for level in range(levels):
        attends, up = level in architecture.attention_levels, levels - 1 - level
        for layer in range(layers):
            old, new = f"input_blocks.{1 + level * (layers + 1) + layer}", f"down_blocks.{level}"
            yield from _block(old, new, layer, attends)
        for layer in range(layers + 1):
            old, new = f"output_blocks.{up * (layers + 1) + layer}", f"up_blocks.{up}"
            yield from _block(old, new, layer, attends)
        if level < levels - 1:
            old, new = f"input_blocks.{(level + 1) * (layers + 1)}.0", f"down_blocks.{level}.downsamplers.0"
            yield from [(f"{old}.op", f"{new}.conv")] if learned else _resnet(old, new)
        if level > 0:
            place = 2 if attends else 1
            old = f"output_blocks.{(up + 1) * (layers + 1) - 1}.{place}"
            new = f"up_blocks.{up}.upsamplers.0"
            yield from [(f"{old}.conv", f"{new}.conv")] if learned else _resnet(old, new)


def _block(old: str, new: str, layer: int, attends: bool) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{old}.0", f"{new}.resnets.{layer}")
    if attends:
        yield from _attention(f"{old}.1", f"{new}.attentions.{layer}")


def _resnet(old: str, new: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{old}.{inner}", f"{new}.{ours}") for inner, ours in RESNET.items())


def _attention(old: str, new: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{old}.{inner}", f"{new}.{ours}") for inner, ours in ATTENTION)


def _shape_of(old: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that the original's tensor must have for ours to have `shape`."""
    rows = 3 * shape[0] if ".qkv." in old else shape[0]
    # The original's attention is made of convolutions of one tap.
    taps = (1,) if old.endswith((".qkv.weight", ".proj_out.weight")) else ()
    return (rows, *shape[1:], *taps)


def _weight(value: Tensor, old: str, new: str, heads: int) -> Tensor:
    """Return our tensor; of the original's qkv, which has heads outside and q, k, v within each, our part."""
    if ".qkv." not in old:
        return value
    which = ("to_q", "to_k", "to_v").index(new.split(".")[-2])
    return value.reshape(heads, 3, -1, *value.shape[1:])[:, which].contiguous()


def _refuse(file: str | Path, verb: str, names: list[str]) -> None:
    """Raise InputError if there are names."""
    if names:
        raise InputError(f"{file}: not a complete U-Net of the published kind: it {verb} {first_few(names)}")


# The published code shows its network t * 1000 / T.
SHOWN_TIMESTEPS = 1000
# The paper's depth (arXiv 2406.15093, section 5): index 99 of the cosine schedule with T = 4000.
PAPER_TIMESTEPS, PAPER_DEPTH = 4000, 100
# What torch.load raises for files that are damaged, made of something else, or hold more than tensors.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    BadZipFile,
    struct.error,
)


def import_checkpoint(
    file: str | Path, *, out: str | Path, heads: int = 4, timesteps: int = 4000, schedule: ScheduleName = "cosine"
) -> ImportResult:
    """Write the U-Net of a local `file` (such as ema_0.9999_250000.pt) as the local denoiser folder `out`.

    Its forward pass equals the original's with timesteps rescaled to t * 1000 / T. The same call returns at once
    if `out` is finished. Raises InputError for a file that is not such a U-Net, ConfigError for heads, timesteps
    or a schedule that cannot be, or an `out` that holds another denoiser.
    """
    alphas_cumprod = _alphas_cumprod(timesteps, schedule)
    if "://" in str(out) or os.path.isfile(out):
        raise ConfigError(f"{out}: expected a local folder for the denoiser; copy it elsewhere afterwards")
    fingerprint = digest({"sha256": _sha256(file), "heads": heads, "T": timesteps, "schedule": schedule})
    if not _is_finished(Path(out), fingerprint):
        state = read_state(file)
        architecture = read_architecture(state, file)
        unet = convert(state, architecture, heads, file)
        t_star = recommended_depth(alphas_cumprod)
        denoiser = Denoiser(
            unet,
            alphas_cumprod,
            t_max=timesteps,
            t_star=t_star,
            num_inference_steps=t_star,
            timestep_scale=SHOWN_TIMESTEPS / timesteps,
        )
        card = _card(denoiser, architecture, file, heads, schedule, fingerprint)
        try:
            save_denoiser(out, denoiser.eval(), card, schedule)
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written ({error}); name another folder with --out") from None
    return _result(out)


def read_state(file: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name; nothing in the file is ever executed.

    Raises InputError unless the file is a flat dict of floating-point tensors.
    """
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    except _UNREADABLE:
        raise InputError(
            f"{file}: damaged, or holds more than tensors, so nothing in it was executed; expected a state dict "
            "saved by improved-diffusion or guided-diffusion, such as ema_0.9999_250000.pt"
        ) from None
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(f"{file}: holds a {type(loaded).__name__}, expected a dict of tensors by name")
    strange = [str(name) for name, value in loaded.items() if not _is_weight(name, value)]
    if strange:
        raise InputError(
            f"{file}: expected a flat dict of floating-point tensors by name, but {first_few(strange)} is no such "
            "tensor; if the weights lie below one entry, save that entry alone with torch.save"
        )
    return {name: value.float() for name, value in loaded.items()}


def recommended_depth(alphas_cumprod: Tensor) -> int:
    """Return the t_star in 1..T whose noise is nearest to the paper's, 0.0499 on [-1, 1]."""
    target = noise_std(cosine_alphas_cumprod(PAPER_TIMESTEPS), PAPER_DEPTH - 1)
    return int(torch.argmin(((1 - alphas_cumprod).sqrt() - target).abs())) + 1


def iterations_in(file: str | Path) -> int:
    """Return the number that ends a file name such as ema_0.9999_250000.pt or model250000.pt, else 0."""
    found = re.search(r"(?<![\d.])\d+$", Path(file).stem)
    return int(found.group()) if found else 0


def _alphas_cumprod(timesteps: int, schedule: ScheduleName) -> Tensor:
    # Below 21 steps the linear schedule would begin with more noise than signal.
    if timesteps < 21:
        raise ConfigError(f"--timesteps {timesteps}: expected T of the training, for example 4000 or 1000")
    if schedule == "cosine":
        return cosine_alphas_cumprod(timesteps)
    if schedule == "linear":
        return linear_alphas_cumprod(timesteps, *linear_betas(timesteps))
    raise ConfigError(f"--schedule {schedule}: expected cosine or linear")


def _is_weight(name: object, value: object) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain and isinstance(value, Tensor) and value.is_floating_point()


def _sha256(file: str | Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None


def _is_finished(out: Path, fingerprint: str) -> bool:
    """Return whether `out` holds this very import; raise ConfigError if it holds something else."""
    try:
        foreign = sorted({entry.name for entry in out.iterdir()} - set(DENOISER_FILES)) if out.exists() else []
    except OSError as error:
        raise ConfigError(f"{out}: cannot be read ({error.strerror}); name another folder with --out") from None
    if foreign:
        raise ConfigError(f"{out}: holds other files, such as {foreign[0]}; name a new folder with --out")
    if not (out / CARD_FILE).exists():
        return False
    if read_card(out).fingerprint != fingerprint:
        raise ConfigError(
            f"{out}: holds another denoiser, or this one imported with other options; name a new folder with --out"
        )
    return True


def _card(
    denoiser: Denoiser,
    architecture: Architecture,
    file: str | Path,
    heads: int,
    schedule: ScheduleName,
    fingerprint: str,
) -> Card:
    return Card(
        t_max=denoiser.t_max,
        t_star=denoiser.t_star,
        num_inference_steps=denoiser.num_inference_steps,
        sampler=denoiser.sampler,
        timestep_scale=denoiser.timestep_scale,
        iterations=iterations_in(file),
        sparse_images=0,
        sparse_hashes=[],
        fingerprint=fingerprint,
        settings={
            **asdict(architecture),
            "attention_heads": heads,
            "num_train_timesteps": denoiser.num_train_timesteps,
            "schedule": schedule,
            "parameters": parameter_count(denoiser.unet),
            "imported_from": Path(file).name,
        },
    )


def _result(out: str | Path) -> ImportResult:
    card = read_card(out)
    return ImportResult(
        denoiser=str(out),
        parameters=card.settings["parameters"],
        block_out_channels=list(card.settings["block_out_channels"]),
        attention_levels=list(card.settings["attention_levels"]),
        learned_range=card.settings["learned_range"],
        iterations=card.iterations,
        t_star=card.t_star,
    )
