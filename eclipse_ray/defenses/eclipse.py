"""ECLIPSE (arXiv 2406.15093) and its parts: A purification, B random grayscale, C fine noise.

Purification changes the stored images; B and C are drawn anew for every image and epoch by the victim's loader, or
`baked` once. Coarse noise is ours, not the paper's: it belongs to `eclipse`, and none of the ablations has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray import compensation
from eclipse_ray.config import CompensationConfig, Config, DefenseConfig, Sampler
from eclipse_ray.defenses.interface import DefenseSettings, Material
from eclipse_ray.diffusion.network import Denoiser
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.errors import InputError


def purify(material: Material, _config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), purified as the section `purify` says: A, diffusion alone.

    Raises InputError without a denoiser, ConfigError for a depth it was not trained at.
    """
    return purify_at(material, material.seed)


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
    return torch.stack([purify_at(material, draw_seed(material.seed, draw)) for draw in draws])


def draw_seed(seed: int, draw: int) -> int:
    """Return the seed of one of several purifications; the first is `seed` itself, so draw 0 is what A gives."""
    if draw == 0:
        return seed
    digest = hashlib.blake2b(f"draw {draw} of {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def purify_at(
    material: Material,
    seed: int,
    t_star: int | None = None,
    num_inference_steps: int | None = None,
    sampler: Sampler | None = None,
) -> Tensor:
    """Return the images purified with noise keyed by (`seed`, id, t); None is what the section `purify` says."""
    settings, denoiser = material.purify, needed_denoiser(material)
    pieces = [
        purify_images(
            material.images[part],
            denoiser,
            t_star=t_star or settings.t_star,
            num_inference_steps=num_inference_steps or settings.num_inference_steps,
            sampler=sampler or settings.sampler,
            seed=seed,
            ids=[material.ids[index] for index in part],
            tile=settings.tile,
            tile_overlap=settings.tile_overlap,
            batch_pixels=settings.batch_pixels,
        )
        for part in _batches(material)
    ]
    return torch.cat(pieces)


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
        )

    return settings


def _batches(material: Material) -> list[list[int]]:
    """Return the places of the images in batches that hold to purify.batch_size and purify.batch_pixels."""
    count, height, width = (int(length) for length in material.images.shape[:3])
    size = max(1, min(material.purify.batch_size, material.purify.batch_pixels // (height * width)))
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
