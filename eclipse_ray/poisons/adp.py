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
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.attacks import frozen
from eclipse_ray.compensation import compensate
from eclipse_ray.config import BATCH_PIXELS, TILE_OVERLAP, CompensationConfig, DenoiserConfig
from eclipse_ray.diffusion.network import Denoiser, build_unet
from eclipse_ray.diffusion.sampling import absorb, eliminate
from eclipse_ray.diffusion.tiling import tiled
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.em import Em, See, minimise_error
from eclipse_ray.poisons.interface import LabelledImages, Session, State
from eclipse_ray.poisons.surrogate import new_surrogate
from eclipse_ray.victims.training import placed


class Adp(Em):
    """The settings of adp. The paper names neither surrogate nor bound (docs/poisons.md)."""

    numbers: ClassVar[dict[str, dict[str, Any]]] = {
        "full": Em.numbers["full"] | {"perturb_batch_size": 128},
        "reduced": Em.numbers["reduced"] | {"rounds": 8},
        "paper": {"surrogate": "unet"},
        "paper reduced": {"unet_channels": (16, 32)},
        # What the defender does by default, coarse noise included.
        "strong": {"surrogate": "resnet18", "eot_draws": 4, "compensation_coarse_sigma": 0.08},
        "strong reduced": {"surrogate": "small", "eot_draws": 1},
    }

    variant: Literal["paper", "strong"] = Field("paper", description="Against compensation, or purification too.")
    scope: Literal["sample"] = Field("sample", description="One noise per image.")
    eot_draws: int = Field(1, ge=1, description="Draws of the defender that a gradient is averaged over.")
    unet_channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 128, 256), min_length=1, description="paper: channels of each level of the U-Net."
    )
    t_star: int | None = Field(
        None, ge=1, description="strong: depth of purification; null: what the denoiser recommends."
    )
    compensation_p: float = Field(0.4, ge=0, le=1, description="Probability of grayscale.")
    compensation_sigma: float = Field(0.05, ge=0, description="Deviation of fine noise, on [0, 1].")
    compensation_coarse_sigma: float = Field(0.0, ge=0, description="Deviation of coarse noise, on [0, 1].")

    @property
    def networks(self) -> tuple[str, ...]:
        """A U-Net for paper, else the victim's network."""
        return ("unet",) if self.variant == "paper" else super().networks


def fit_adp(data: LabelledImages, settings: Adp, seed: int, session: Session) -> State:
    """Fit noise and network together, as em does, to images as the defender's victim would see them.

    Raises as `check_attacked` does.
    """
    strong = settings.variant == "strong"
    denoiser = session.denoiser if strong else None
    if strong:
        check_attacked(settings, denoiser.t_max if denoiser else None)
    with nullcontext() if denoiser is None else frozen(denoiser):
        build = new_surrogate if strong else new_unet
        return minimise_error(
            data, settings, seed, session, build, defender(settings, denoiser), settings.eot_draws
        )


def check_attacked(settings: Adp, t_max: int | None) -> None:
    """Raise ConfigError if strong has no denoiser, or one (trained up to `t_max`) not as deep."""
    if t_max is None:
        raise ConfigError("poison.denoiser: adp strong attacks a trained denoiser; name its folder")
    if (settings.t_star or 1) > t_max:
        raise ConfigError(f"poison.t_star {settings.t_star}: this denoiser is trained up to {t_max}")


class UNetClassifier(nn.Module):
    """A denoiser's U-Net whose last layer is a convolution to the classes, averaged over the image."""

    def __init__(self, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        groups = math.gcd(DenoiserConfig().norm_num_groups, *channels)
        config = DenoiserConfig(
            network="unet2d", block_out_channels=channels, layers_per_block=1, norm_num_groups=groups
        )
        self.unet = build_unet(config)
        self.unet.conv_out = nn.Conv2d(channels[0], num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 3, H, W), normalised as for victims, at timestep 0."""
        # Victims see [-2, 2], a denoiser [-1, 1].
        output: Tensor = self.unet(x / 2, 0).sample
        return output.mean((2, 3))


def new_unet(settings: Adp, num_classes: int, seed: int, device: torch.device) -> nn.Module:
    """Return a fresh U-Net classifier with `unet_channels`."""
    return placed(lambda: UNetClassifier(settings.unet_channels, num_classes), seed, device)


def defender(settings: Adp, denoiser: Denoiser | None) -> See:
    """Return what happens to images before a victim sees them: C, or with a denoiser C after purification.

    Every call draws anew. Nothing is rounded, so gradients pass.
    """
    compensation = CompensationConfig(
        p=settings.compensation_p,
        sigma=settings.compensation_sigma,
        coarse_sigma=settings.compensation_coarse_sigma,
    )

    def see(images: Tensor, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**62, (1,), generator=generator))
        ids = [str(index) for index in range(len(images))]
        if denoiser is not None:
            images = purified(images, denoiser, settings.t_star or denoiser.t_star, seed, ids)
        return compensate(images, ids, compensation, seed)

    return see


def purified(images: Tensor, denoiser: Denoiser, t_star: int, seed: int, ids: Sequence[str]) -> Tensor:
    """Return images (B, 3, H, W in [0, 1]) with noise at depth t_star, denoised in one step, in the same range.

    Unlike `sampler.purify` it lets gradients through; draws are keyed by (seed, ids).
    """
    schedule = denoiser.alphas_cumprod
    network = tiled(denoiser, denoiser.tile, TILE_OVERLAP, denoiser.size_multiple, BATCH_PIXELS)
    x_t = absorb(2 * images - 1, schedule, t_star, seed, ids)
    return (eliminate(x_t, network, schedule, t_star, 1, seed, ids) + 1) / 2
