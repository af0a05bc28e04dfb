"""Lightweight corruption compensation (ECLIPSE, arXiv 2406.15093), and coarse noise against coarse poisons.

Four corruptions of a training image, in this order: noise on a coarse grid, a shift of each colour channel, random
grayscale, fine noise. The last two are the paper's. The others are ours: a smooth random field of colour hides the
low-frequency poisons that neither denoising nor grayscale removes, and a shift hides those that shift the colours
of a class (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eclipse_ray.config import CompensationConfig
from eclipse_ray.diffusion.noise import check_batch, noise, uniform
from eclipse_ray.quality import LUMA

GRAY_T = 2**30
"""Reserved timestep of the draw that decides about grayscale."""
NOISE_T = 2**30 + 1
"""Reserved timestep of the fine noise."""
COARSE_T = 2**30 + 2
"""Reserved timestep of the coarse noise."""
COLOUR_T = 2**30 + 3
"""Reserved timestep of the shifts of the colour channels."""

BAND_PIXELS = 2**20
"""Pixels that `bake` works on at once, as rows of the images: a photograph needs no whole float copies."""


def augment(images: Tensor, config: CompensationConfig, generator: torch.Generator) -> Tensor:
    """Return `images`, float (B, 3, H, W) in [0, 1], compensated with draws taken from `generator`.

    A smooth field of standard deviation `coarse_sigma` at its grid points and a shift of each channel of standard
    deviation `colour_sigma` are added; the image turns gray (ITU-R 601 luma on three channels) with probability
    `p`; noise of standard deviation `sigma` is added and the result clamped to [0, 1] (arXiv 2406.15093, as its
    public code does for every image and epoch). `generator` must live on the device of `images`.
    """
    count, device = len(images), images.device
    gray = torch.rand(count, generator=generator, device=device) < config.p
    drawn = torch.empty_like(images).normal_(generator=generator)
    coarse = None
    if config.coarse_sigma:
        points = torch.randn(count, 3, config.coarse_grid, config.coarse_grid, generator=generator, device=device)
        coarse = _field(points, config, images.shape)
    if config.colour_sigma:
        shift = config.colour_sigma * torch.randn(count, 3, 1, 1, generator=generator, device=device)
        coarse = _both(coarse, shift, images.shape)
    return _compensate(images, coarse, gray, drawn, config.sigma)


def bake(images: Tensor, ids: Sequence[str], config: CompensationConfig, seed: int) -> Tensor:
    """Return `images`, uint8 (B, H, W, 3), compensated once and rounded to uint8.

    With coarse_sigma = colour_sigma = 0 this is Algorithm 1 of arXiv 2406.15093. The draws of an image depend only
    on (`seed`, its id), so the result is the same in any order and batch. Raises InputError when `ids` do not
    match `images`.
    """
    check_batch(images, ids)
    height, width = int(images.shape[1]), int(images.shape[2])
    gray, drawn, coarse = _keyed_draws(
        torch.Size((len(images), 3, height, width)), ids, config, seed, images.device
    )
    result = torch.empty_like(images)
    rows = max(1, BAND_PIXELS // max(1, len(images) * width))
    for top in range(0, height, rows):
        band = slice(top, top + rows)
        x = images[:, band].permute(0, 3, 1, 2).float() / 255
        here = None if coarse is None else coarse[:, :, band]
        x = _compensate(x, here, gray, drawn[:, :, band], config.sigma)
        result[:, band] = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return result


def compensate(images: Tensor, ids: Sequence[str], config: CompensationConfig, seed: int) -> Tensor:
    """Return `images`, float (B, 3, H, W) in [0, 1], compensated with draws keyed by (`seed`, image id).

    The draws are those of `bake`; nothing is rounded and gradients pass, for attacks that see through it.
    """
    gray, drawn, coarse = _keyed_draws(images.shape, ids, config, seed, images.device)
    return _compensate(images, coarse, gray, drawn, config.sigma)


def _keyed_draws(
    shape: torch.Size, ids: Sequence[str], config: CompensationConfig, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return which images (B,) turn gray, fine noise and coarse noise, both of `shape` (B, 3, H, W)."""
    gray = uniform(seed, ids, GRAY_T, (1,), device)[:, 0] < config.p
    drawn = noise(seed, ids, NOISE_T, (int(shape[2]), int(shape[3]), 3), device).permute(0, 3, 1, 2)
    coarse, grid = None, config.coarse_grid
    if config.coarse_sigma:
        coarse = _field(noise(seed, ids, COARSE_T, (3, grid, grid), device), config, shape)
    if config.colour_sigma:
        coarse = _both(coarse, config.colour_sigma * noise(seed, ids, COLOUR_T, (3, 1, 1), device), shape)
    return gray, drawn, coarse


def _both(coarse: Tensor | None, shift: Tensor, shape: torch.Size) -> Tensor:
    return shift.expand(shape) if coarse is None else coarse + shift


def _field(points: Tensor, config: CompensationConfig, shape: torch.Size) -> Tensor:
    """Spread grid points (B, 3, grid, grid) over images of `shape`, bilinearly, whatever their size."""
    size = (int(shape[2]), int(shape[3]))
    smooth = torch.nn.functional.interpolate(points, size=size, mode="bilinear", align_corners=False)
    return config.coarse_sigma * smooth


def _compensate(images: Tensor, coarse: Tensor | None, gray: Tensor, drawn: Tensor, sigma: float) -> Tensor:
    if coarse is not None:
        images = images + coarse
    weights = images.new_tensor(LUMA)[:, None, None]
    luma = (images * weights).sum(dim=1, keepdim=True)
    images = torch.where(gray[:, None, None, None], luma, images)
    return (images + sigma * drawn).clamp(0, 1)
