"""Lightweight corruption compensation (ECLIPSE, arXiv 2406.15093): random grayscale, then Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eclipse_ray.diffusion.noise import noise, uniform
from eclipse_ray.errors import InputError

GRAY_T = 2**30
"""Reserved timestep of the draw that decides about grayscale."""
NOISE_T = 2**30 + 1
"""Reserved timestep of the noise that is added after it."""

BAND_PIXELS = 2**20
"""Pixels that `bake` works on at once, as rows of the images: a photograph needs no whole float copies."""

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601 weights of red, green and blue."""


def augment(images: Tensor, p: float, sigma: float, generator: torch.Generator) -> Tensor:
    """Return `images`, float (B, 3, H, W) in [0, 1], compensated with draws taken from `generator`.

    Each image turns gray (ITU-R 601 luma on three channels) with probability `p`; then noise of standard
    deviation `sigma` is added and the result clamped to [0, 1] (arXiv 2406.15093, as its public code
    does for every image and epoch). `generator` must live on the device of `images`.
    """
    gray = torch.rand(len(images), generator=generator, device=images.device) < p
    drawn = torch.empty_like(images).normal_(generator=generator)
    return _compensate(images, gray, drawn, sigma)


def bake(images: Tensor, ids: Sequence[str], p: float, sigma: float, seed: int) -> Tensor:
    """Return `images`, uint8 (B, H, W, 3), compensated once and rounded to uint8.

    This is Algorithm 1 of arXiv 2406.15093. The draws of an image depend only on (`seed`, its id), so the
    result is the same in any order and batch. Raises InputError when `ids` do not match `images`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"expected uint8 images (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    if len(ids) != len(images):
        raise InputError(f"{len(images)} images came with {len(ids)} ids; give one id to each image")
    height, width = int(images.shape[1]), int(images.shape[2])
    gray = uniform(seed, ids, GRAY_T, (1,), images.device)[:, 0] < p
    drawn = noise(seed, ids, NOISE_T, (height, width, 3), images.device)
    result = torch.empty_like(images)
    rows = max(1, BAND_PIXELS // max(1, len(images) * width))
    for top in range(0, height, rows):
        band = slice(top, top + rows)
        x = images[:, band].permute(0, 3, 1, 2).float() / 255
        x = _compensate(x, gray, drawn[:, band].permute(0, 3, 1, 2), sigma)
        result[:, band] = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return result


def _compensate(images: Tensor, gray: Tensor, drawn: Tensor, sigma: float) -> Tensor:
    weights = images.new_tensor(LUMA)[:, None, None]
    luma = (images * weights).sum(dim=1, keepdim=True)
    images = torch.where(gray[:, None, None, None], luma, images)
    return (images + sigma * drawn).clamp(0, 1)
