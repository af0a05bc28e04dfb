"""ADP: error-minimising noise that knows ECLIPSE (arXiv 2406.15093, adaptive attack, and a stronger one).

`paper` trains a U-Net classifier, the denoiser's network with its last layer replaced, on corruption-compensated
images C(x + delta). `strong` trains a victim on C(P(x + delta)), with P the purification by the very denoiser that
the defender uses, and sends gradients back through noise, denoiser and compensation, averaged over draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eclipse_ray.compensation import compensate
from eclipse_ray.config import BATCH_PIXELS, TILE, TILE_OVERLAP, CompensationConfig, DenoiserConfig
from eclipse_ray.diffusion.model import Denoiser, build_unet
from eclipse_ray.diffusion.sampler import absorb, eliminate
from eclipse_ray.diffusion.tiling import tiled


class UNetClassifier(nn.Module):
    """A denoiser's U-Net whose last layer is a convolution to the classes, averaged over the image."""

    def __init__(self, config: DenoiserConfig, num_classes: int) -> None:
        super().__init__()
        self.unet = build_unet(config)
        self.unet.conv_out = nn.Conv2d(config.block_out_channels[0], num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 3, H, W) in [0, 1], seen at timestep 0."""
        output: Tensor = self.unet(2 * x - 1, 0).sample
        return output.mean((2, 3))


def purified(x: Tensor, denoiser: Denoiser, seed: int, ids: Sequence[str]) -> Tensor:
    """Return x (B, 3, H, W in [0, 1]) with noise at t_star, denoised in one step, in the same range.

    Unlike `sampler.purify` it lets gradients through and leaves out the rounding to 8 bits.
    """
    schedule, t_star = denoiser.alphas_cumprod, denoiser.t_star
    network = tiled(denoiser, TILE, TILE_OVERLAP, denoiser.size_multiple, BATCH_PIXELS)
    x_t = absorb(2 * x - 1, schedule, t_star, seed, ids)
    return (eliminate(x_t, network, schedule, t_star, 1, seed, ids) + 1) / 2


def defended(
    x: Tensor, denoiser: Denoiser | None, config: CompensationConfig, seed: int, ids: Sequence[str]
) -> Tensor:
    """Return C(x), or C(P(x)) with a denoiser, for x (B, 3, H, W) in [0, 1]; draws are keyed by (`seed`, ids)."""
    seen = x if denoiser is None else purified(x, denoiser, seed, ids)
    return compensate(seen, ids, config, seed)
