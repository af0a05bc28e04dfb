"""How far images are from clean ones, PSNR and SSIM, and how much of a poison is left in them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from eclipse_ray.errors import InputError

WINDOW, SIGMA = 11, 1.5
"""Side and standard deviation, in pixels, of the Gaussian window of SSIM (Wang et al. 2004)."""
BATCH = 256
STRIDE, STRIP = 4, 256
"""Pixels between the windows of the SSIM of single images, and rows of an image that are measured at a time."""
EQUAL_PSNR = 100.0
"""The PSNR in dB of equal images in `changes`; a single changed pixel of a small image has less."""
LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601 weights of red, green and blue."""


def psnr(images: Tensor, reference: Tensor, *, peak: float = 255.0) -> float:
    """Return the PSNR in dB of the mean squared error over all of `images`, four dimensions; inf if equal.

    `peak` is the length of the range of values: 255 for uint8, 2 for [-1, 1]. Raises InputError when `reference`
    has another shape.
    """
    _check(images, reference)
    total = 0.0
    for one, other in zip(torch.split(images, BATCH), torch.split(reference, BATCH), strict=True):
        total += float((one.double() - other.double()).square().sum())
    return math.inf if total == 0 else 10 * math.log10(peak**2 * images.numel() / total)


def survival(defended: Tensor, defended_clean: Tensor, poisoned: Tensor, clean: Tensor) -> float | None:
    """Return rho = <P(x + delta) - P(x), delta> / |delta|^2 over all images x, the part of delta that survives P.

    All four are uint8 (N, H, W, 3): P(x + delta), P(x) with the same noise, x + delta and x. With several draws of
    P the first two are (D, N, H, W, 3). None if no image is poisoned; 0 where nothing is left, 1 where all is.
    """
    delta = poisoned.double() - clean.double()
    size = float(delta.square().sum())
    if size == 0:
        return None
    left = defended.double() - defended_clean.double()
    return float((left * delta).sum()) / (size * left.numel() / delta.numel())


def ssim(images: Tensor, reference: Tensor) -> float:
    """Return the mean structural similarity of uint8 `images` (N, H, W, 3) to `reference` of the same shape.

    Gaussian windows wholly inside the image, channel by channel, as published (Wang et al. 2004). Raises
    InputError for another shape or images smaller than a window.
    """
    _check(images, reference)
    if min(images.shape[1:3]) < WINDOW:
        raise InputError(f"SSIM needs images of at least {WINDOW} pixels a side, got {tuple(images.shape[1:3])}")
    weights = _window(images.device)
    total = 0.0
    for one, other in zip(torch.split(images, BATCH), torch.split(reference, BATCH), strict=True):
        means = _blur(_moments(_planes(one), _planes(other)), weights)
        total += float(_similarity(means).mean(dim=(1, 2, 3)).sum())
    return total / len(images)


def changes(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return the PSNR in dB and the SSIM of each of uint8 `images` (N, H, W, 3) to `reference`, (N) each.

    Made to cost little beside purification: PSNR is at most EQUAL_PSNR; SSIM is of the brightness, with windows
    at every fourth pixel, and NaN for images smaller than a window. Raises InputError for another shape.
    """
    _check(images, reference)
    weights, luma = _window(images.device), torch.tensor(LUMA, device=images.device)
    errors = torch.zeros(len(images), device=images.device)
    likeness, windows = torch.zeros_like(errors), 0
    for top in range(0, images.shape[1], STRIP):
        # The last windows of a strip reach into the next one.
        one, other = (each[:, top : top + STRIP + WINDOW - STRIDE].float() for each in (images, reference))
        errors += (one[:, :STRIP] - other[:, :STRIP]).square().sum(dim=(1, 2, 3))
        down, across = (_placed(weights, length) for length in one.shape[1:3])
        found = _similarity(down @ _moments(one @ luma, other @ luma) @ across.T)
        likeness += found.sum(dim=(1, 2))
        windows += found[0].numel()
    ratio = 10 * torch.log10(255.0**2 * images[0].numel() / errors)
    return ratio.clamp(max=EQUAL_PSNR), likeness / windows


def _window(device: torch.device) -> Tensor:
    offsets = torch.arange(WINDOW, dtype=torch.float32, device=device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    return weights / weights.sum()


def _placed(weights: Tensor, length: int) -> Tensor:
    """Return the window at every STRIDE-th place of a line of `length` pixels, one row per place."""
    starts = range(0, length - WINDOW + 1, STRIDE)
    placed = weights.new_zeros(len(starts), length)
    for row, start in enumerate(starts):
        placed[row, start : start + WINDOW] = weights
    return placed


def _planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float()


def _moments(x: Tensor, y: Tensor) -> Tensor:
    """Return what SSIM averages of two sets of float planes on [0, 255], a new first dimension of 5."""
    return torch.stack([x, y, x * x, y * y, x * y])


def _similarity(means: Tensor) -> Tensor:
    """Return the similarity in each window from the means of `_moments` there."""
    mean_x, mean_y, square_x, square_y, product = means
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variance = square_x - mean_x**2 + square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variance + c2)


def _blur(planes: Tensor, weights: Tensor) -> Tensor:
    flat = planes.reshape(-1, 1, *planes.shape[-2:])
    flat = F.conv2d(F.conv2d(flat, weights[None, None, None, :]), weights[None, None, :, None])
    return flat.reshape(*planes.shape[:-2], *flat.shape[2:])


def _check(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4 or not len(images):
        raise InputError(
            f"images {tuple(images.shape)} and reference {tuple(reference.shape)} must be (N, H, W, 3), equal"
        )
