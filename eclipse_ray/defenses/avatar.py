"""AVATAR (Dolatabadi et al., arXiv 2303.08500): purification alone, with much noise and all clean data.

It noises an image to time 0.1 of a variance-preserving SDE, 43 grey levels for an image of full strength, seven
times ECLIPSE's 6.4. The row "AVATAR" of the ECLIPSE paper is another thing: its own sparse model at its own small
noise, which is its ablation A. Both are measured here, under different names.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.eclipse import needed_denoiser, purify_at
from eclipse_ray.defenses.interface import DefenseSettings, Material
from eclipse_ray.errors import ConfigError


class Avatar(DefenseSettings):
    """The settings of avatar."""

    avatar_noise_255: float = Field(43.0, gt=0, description="Noise in grey levels of a full-strength image.")
    avatar_steps: int = Field(100, ge=1, description="Reverse steps.")


def avatar(material: Material, config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), purified at noise `avatar_noise_255` in `avatar_steps` steps.

    How much clean data the denoiser saw is the caller's choice; the authors used all 50,000 images. Raises
    InputError without a denoiser and ConfigError for one that was not trained so deep.
    """
    own, denoiser = Avatar.of(config), needed_denoiser(material)
    t_star = depth_of(own.avatar_noise_255, denoiser.alphas_cumprod)
    if t_star > denoiser.t_max:
        raise ConfigError(
            f"the defense avatar noises by {own.avatar_noise_255:g} of 255, which is t_star {t_star}; this "
            f"denoiser was trained below {denoiser.t_max}: train one with denoiser.t_max {t_star} or more"
        )
    return purify_at(material, material.seed, t_star, min(own.avatar_steps, t_star), "ddpm")


def depth_of(noise_255: float, alphas_cumprod: Tensor) -> int:
    """Return the t_star of a schedule (T,) at which an image of full strength has noise nearest to `noise_255`.

    Noise and image are measured after undoing the shrinking by sqrt(abar), in 255 levels of the range [-1, 1].
    """
    abar = alphas_cumprod.double().cpu()
    levels = 127.5 * ((1 - abar) / abar).sqrt()
    return int(torch.argmin((levels - noise_255).abs())) + 1
