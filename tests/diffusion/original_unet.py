"""The published U-Net in plain torch, under its published tensor names: the oracle of the import tests."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Original:
    """Hyperparameters by which the published code is run."""

    image_size: int = 32
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 3
    attention_pixels: tuple[int, ...] = (16, 8)
    heads: int = 4
    scale_shift: bool = True
    learned_sigma: bool = True
    resblock_updown: bool = False


class Residual(nn.Module):
    def __init__(self, size: Original, inputs: int, outputs: int, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = size.scale_shift, resample
        embedding = outputs * (2 if size.scale_shift else 1)
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * size.channels, embedding))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(resampled(activation(norm(x)), self.resample))
        told = self.emb_layers(embedding)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + told)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(resampled(x, self.resample)) + h


def resampled(x: Tensor, how: str) -> Tensor:
    if how == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(x, 2) if how == "down" else x


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        batch, channels, length = flat.shape
        # Heads outermost; each head's rows are its queries, then its keys, then its values.
        q, k, v = self.qkv(self.norm(flat)).view(batch * self.heads, 3, channels // self.heads, length).unbind(1)
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(channels // self.heads), dim=-1)
        mixed = (v @ weights.transpose(1, 2)).reshape(batch, channels, length)
        return (flat + self.proj_out(mixed)).view_as(x)


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(resampled(x, "up"))


class OriginalUNet(nn.Module):
    """Takes x (B, 3, H, W) and timesteps as the network is shown them, t * 1000 / T."""

    def __init__(self, size: Original) -> None:
        super().__init__()
        self.size = size
        width, factor, skips = size.channels, 1, [size.channels]
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, width, 3, padding=1)])])
        for level, multiplier in enumerate(size.multipliers):
            for _ in range(size.blocks):
                self.input_blocks.append(self._stage(width, multiplier * size.channels, factor))
                width = multiplier * size.channels
                skips.append(width)
            if level < len(size.multipliers) - 1:
                down = Residual(size, width, width, "down") if size.resblock_updown else Down(width)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(width)
                factor *= 2
        middle = [Residual(size, width, width), SelfAttention(width, size.heads), Residual(size, width, width)]
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(size.multipliers))):
            for block in range(size.blocks + 1):
                stage = self._stage(width + skips.pop(), multiplier * size.channels, factor)
                width = multiplier * size.channels
                if level and block == size.blocks:
                    stage.append(Residual(size, width, width, "up") if size.resblock_updown else Up(width))
                    factor //= 2
                self.output_blocks.append(stage)
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 6 if size.learned_sigma else 3, 3, padding=1)
        )

    def _stage(self, inputs: int, outputs: int, factor: int) -> nn.ModuleList:
        stage = nn.ModuleList([Residual(self.size, inputs, outputs)])
        if self.size.image_size // factor in self.size.attention_pixels:
            stage.append(SelfAttention(outputs, self.size.heads))
        return stage

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        half = self.size.channels // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = shown.float()[:, None] * frequencies
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        kept = []
        for stage in self.input_blocks:
            x = run(stage, x, embedding)
            kept.append(x)
        x = run(self.middle_block, x, embedding)
        for stage in self.output_blocks:
            x = run(stage, torch.cat([x, kept.pop()], dim=1), embedding)
        return self.out(x)


def run(stage: nn.ModuleList, x: Tensor, embedding: Tensor) -> Tensor:
    for layer in stage:
        x = layer(x, embedding) if isinstance(layer, Residual) else layer(x)
    return x


def original_unet(size: Original, seed: int = 0) -> OriginalUNet:
    """Return the network in evaluation mode with no weight zero, one or equal to another."""
    torch.manual_seed(seed)
    network = OriginalUNet(size).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            # Deviations of one keep attention from near-ties, which would amplify rounding.
            fan_in = value[0].numel() if value.ndim > 1 else 16
            value.normal_(0, 1 / math.sqrt(fan_in))
            if value.ndim == 1 and name.endswith("weight"):
                value.add_(1)
    return network
