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
    offsets = torch.arange(WINDOW, dtype=torch.float32, device=images.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights = weights / weights.sum()
    total = 0.0
    for one, other in zip(torch.split(images, BATCH), torch.split(reference, BATCH), strict=True):
        total += float(_similarity(_planes(one), _planes(other), weights).sum())
    return total / len(images)


def _planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float()


def _similarity(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return the similarity (B) of float planes (B, 3, H, W) on [0, 255]."""
    count = len(x)
    means = _blur(torch.cat([x, y, x * x, y * y, x * y]), weights)
    mean_x, mean_y, square_x, square_y, product = torch.split(means, count)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variance = square_x - mean_x**2 + square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance + c2)).mean(dim=(1, 2, 3))


def _blur(planes: Tensor, weights: Tensor) -> Tensor:
    flat = planes.reshape(-1, 1, *planes.shape[2:])
    flat = F.conv2d(F.conv2d(flat, weights[None, None, None, :]), weights[None, None, :, None])
    return flat.reshape(*planes.shape[:2], *flat.shape[2:])


def _check(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4 or not len(images):
        raise InputError(
            f"images {tuple(images.shape)} and reference {tuple(reference.shape)} must be (N, H, W, 3), equal"
        )
