"""ECLIPSE (arXiv 2406.15093) and its parts, A purification, B random grayscale, C fine noise; and AVATAR.

Purification changes the stored images; B and C are drawn anew for every image and epoch by the victim's loader, or
`baked` once. Coarse noise is ours, not the paper's: it belongs to `eclipse`, and none of the ablations has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray import compensation
from eclipse_ray.config import CompensationConfig, Config, DefenseConfig
from eclipse_ray.defenses.interface import DefenseSettings, Material
from eclipse_ray.diffusion.network import Denoiser
from eclipse_ray.diffusion.sampling import Trained, purify_images
from eclipse_ray.errors import ConfigError, InputError


def purify(material: Material, _config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), purified as the section `purify` says: A, diffusion alone.

    Noise is keyed by (seed, id, t). Raises InputError without a denoiser, ConfigError for a depth it was not
    trained at.
    """
    settings, denoiser = material.purify, needed_denoiser(material)
    pieces = [
        purify_images(
            material.images[part],
            denoiser,
            t_star=settings.t_star,
            num_inference_steps=settings.num_inference_steps,
            sampler=settings.sampler,
            seed=material.seed,
            ids=[material.ids[index] for index in part],
            tile=settings.tile,
            tile_overlap=settings.tile_overlap,
            batch_pixels=settings.batch_pixels,
        )
        for part in _batches(material)
    ]
    return torch.cat(pieces)


def purify_and_bake(material: Material, config: DefenseConfig) -> Tensor:
    """Return the images purified and then compensated once, as Algorithm 1 of the paper. Raises as `purify`."""
    purified = purify(material, config)
    pieces = [
        compensation.bake(purified[part], [material.ids[i] for i in part], material.compensation, material.seed)
        for part in _batches(material)
    ]
    return torch.cat(pieces)


class Draws(DefenseSettings):
    """The settings of eclipse-draws."""

    draws: int = Field(4, ge=1, description="Independent purifications of each image.")


def purify_draws(material: Material, config: DefenseConfig) -> Tensor:
    """Return `draws` independent purifications of each image, uint8 (draws, N, H, W, 3). Raises as `purify`."""
    draws = range(Draws.of(config).draws)
    return torch.stack([purify(replace(material, seed=draw_seed(material.seed, draw)), config) for draw in draws])


def draw_seed(seed: int, draw: int) -> int:
    """Return the seed of one of several purifications; the first is `seed` itself, so draw 0 is what A gives."""
    if draw == 0:
        return seed
    digest = hashlib.blake2b(f"draw {draw} of {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def needed_denoiser(material: Material) -> Denoiser:
    """Return the denoiser of `material`. Raises InputError if there is none."""
    if material.denoiser is None:
        raise InputError("this defense purifies and needs a denoiser; name one with purify.denoiser")
    return material.denoiser


def compensate(
    *, gray: bool = True, noise: bool = True, coarse: bool = False
) -> Callable[[Config], CompensationConfig]:
    """Return what the loader adds: the settings of `compensation` with the parts that are False at 0."""

    def settings(config: Config) -> CompensationConfig:
        chosen = config.compensation
        return CompensationConfig(
            mode="augment",
            p=chosen.p if gray else 0.0,
            sigma=chosen.sigma if noise else 0.0,
            coarse_sigma=chosen.coarse_sigma if coarse else 0.0,
            coarse_grid=chosen.coarse_grid,
            colour_sigma=chosen.colour_sigma if coarse else 0.0,
        )

    return settings


def _batches(material: Material) -> list[list[int]]:
    """Return the places of the images in batches that hold to purify.batch_size and purify.batch_pixels."""
    count, height, width = (int(length) for length in material.images.shape[:3])
    size = max(1, min(material.purify.batch_size, material.purify.batch_pixels // (height * width)))
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


# AVATAR (Dolatabadi et al., arXiv 2303.08500): purification alone, with much noise and all clean data.
#
# It noises an image to time 0.1 of a variance-preserving SDE, 43 grey levels for an image of full strength, seven
# times ECLIPSE's 6.4. The row "AVATAR" of the ECLIPSE paper is another thing: its own sparse model at its own
# small noise, which is its ablation A. Both are measured here, under different names.


class Avatar(DefenseSettings):
    """The settings of avatar."""

    avatar_noise_255: float = Field(43.0, gt=0, description="Noise in grey levels of a full-strength image.")
    avatar_steps: int = Field(100, ge=1, description="Reverse steps.")


def avatar(material: Material, config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), purified at noise `avatar_noise_255` in `avatar_steps` steps.

    How much clean data the denoiser saw is the caller's choice; the authors used all 50,000 images. Raises
    InputError without a denoiser and ConfigError for one that was not trained so deep.
    """
    own = Avatar.of(config)
    t_star = avatar_depth(own, needed_denoiser(material))
    steps = min(own.avatar_steps, t_star)
    deep = material.purify.model_copy(update={"t_star": t_star, "num_inference_steps": steps, "sampler": "ddpm"})
    return purify(replace(material, purify=deep), config)


def avatar_depth(settings: Avatar, denoiser: Trained) -> int:
    """Return the t_star of `avatar_noise_255`. Raises ConfigError if the denoiser was not trained so deep."""
    t_star = depth_of(settings.avatar_noise_255, denoiser.alphas_cumprod)
    if t_star > denoiser.t_max:
        raise ConfigError(
            f"the defense avatar noises by {settings.avatar_noise_255:g} of 255, which is t_star {t_star}; this "
            f"denoiser is trained below {denoiser.t_max}: train one with denoiser.t_max {t_star} or more"
        )
    return t_star


def depth_of(noise_255: float, alphas_cumprod: Tensor) -> int:
    """Return the t_star of a schedule (T,) at which an image of full strength has noise nearest to `noise_255`.

    Noise and image are measured after undoing the shrinking by sqrt(abar), in 255 levels of the range [-1, 1].
    """
    abar = alphas_cumprod.double().cpu()
    levels = 127.5 * ((1 - abar) / abar).sqrt()
    return int(torch.argmin((levels - noise_255).abs())) + 1
