"""ADP: error-minimising noise that knows ECLIPSE (arXiv 2406.15093, adaptive attack, and a stronger one).

`paper` fits noise and a U-Net classifier, the denoiser's network with its last layer replaced, to corruption-
compensated images C(x + delta). `strong` fits noise and a victim to C(P(x + delta)), with P the purification by
the very denoiser that the defender uses, and sends gradients back through noise, denoiser and compensation,
averaged over draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from eclipse_ray.attacks import frozen
from eclipse_ray.compensation import compensate
from eclipse_ray.config import BATCH_PIXELS, TILE, TILE_OVERLAP, CompensationConfig, DenoiserConfig, PoisonConfig
from eclipse_ray.diffusion.network import Denoiser, build_unet
from eclipse_ray.diffusion.sampling import absorb, eliminate
from eclipse_ray.diffusion.tiling import tiled
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.em import See, minimise_error, perturb_em
from eclipse_ray.poisons.optimised import LabelledImages, Session, State
from eclipse_ray.poisons.surrogate import needed, new_surrogate
from eclipse_ray.victims.training import placed

perturb_adp = perturb_em
"""The fitted noise of each image, looked up by its id."""


def fit_adp(data: LabelledImages, config: PoisonConfig, seed: int, session: Session) -> State:
    """Fit noise and network together, as em does, to images as the defender's victim would see them.

    Raises ConfigError for strong without a denoiser and for a surrogate that the variant has no use for.
    """
    strong = config.variant == "strong"
    if strong == (config.surrogate == "unet"):
        choices = "small or resnet18, the victim's network" if strong else "unet"
        raise ConfigError(f"poison.surrogate {config.surrogate}: adp {config.variant} wants {choices}")
    if strong and session.denoiser is None:
        raise ConfigError("poison.denoiser: adp strong attacks a trained denoiser; name its folder")
    denoiser = session.denoiser if strong else None
    if denoiser is not None and (config.t_star or 1) > denoiser.t_max:
        raise ConfigError(f"poison.t_star {config.t_star}: this denoiser was trained up to {denoiser.t_max}")
    with nullcontext() if denoiser is None else frozen(denoiser):
        build = new_surrogate if strong else new_unet
        return minimise_error(data, config, seed, session, build, defender(config, denoiser))


class UNetClassifier(nn.Module):
    """A denoiser's U-Net whose last layer is a convolution to the classes, averaged over the image."""

    def __init__(self, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        groups = math.gcd(DenoiserConfig().norm_num_groups, *channels)
        self.unet = build_unet(DenoiserConfig(block_out_channels=channels, norm_num_groups=groups))
        self.unet.conv_out = nn.Conv2d(channels[0], num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 3, H, W), normalised as for victims, at timestep 0."""
        # Victims see [-2, 2], a denoiser [-1, 1].
        output: Tensor = self.unet(x / 2, 0).sample
        return output.mean((2, 3))


def new_unet(config: PoisonConfig, num_classes: int, seed: int, device: torch.device) -> nn.Module:
    """Return a fresh U-Net classifier with the channels of a resolved config."""
    return placed(lambda: UNetClassifier(needed(config.unet_channels), num_classes), seed, device)


def defender(config: PoisonConfig, denoiser: Denoiser | None) -> See:
    """Return what happens to images before a victim sees them: C, or with a denoiser C after purification.

    Every call draws anew. Nothing is rounded, so gradients pass.
    """
    compensation = CompensationConfig(
        p=needed(config.compensation_p),
        sigma=needed(config.compensation_sigma),
        coarse_sigma=needed(config.compensation_coarse_sigma),
    )

    def see(images: Tensor, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (1,), generator=generator))
        ids = [str(index) for index in range(len(images))]
        if denoiser is not None:
            images = purified(images, denoiser, config.t_star or denoiser.t_star, seed, ids)
        return compensate(images, ids, compensation, seed)

    return see


def purified(images: Tensor, denoiser: Denoiser, t_star: int, seed: int, ids: Sequence[str]) -> Tensor:
    """Return images (B, 3, H, W in [0, 1]) with noise at depth t_star, denoised in one step, in the same range.

    Unlike `sampler.purify` it lets gradients through; draws are keyed by (seed, ids).
    """
    schedule = denoiser.alphas_cumprod
    network = tiled(denoiser, TILE, TILE_OVERLAP, denoiser.size_multiple, BATCH_PIXELS)
    x_t = absorb(2 * images - 1, schedule, t_star, seed, ids)
    return (eliminate(x_t, network, schedule, t_star, 1, seed, ids) + 1) / 2
