"""Numbers about perturbations: how strong, at which frequencies, and how well noise hides them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Kind = TypeVar("Kind", bound=np.generic)

AMPLIFY = 10
PAPER_NORM = 1.0
"""L2 norm, on images in [0, 1], of the AR perturbation that the paper attacks with (arXiv 2406.15093)."""


def difference(images: Pixels, reference: Pixels) -> Floats:
    """Return `images` minus `reference`, both uint8 of one shape, on the [-1, 1] scale of the denoiser."""
    return (images.astype(np.float64) - reference.astype(np.float64)) * (2 / 255)


def amplified(images: Pixels, reference: Pixels, factor: int = AMPLIFY) -> Pixels:
    """Return (images - reference) * factor around mid-gray, uint8 of the same shape."""
    change = images.astype(np.int32) - reference.astype(np.int32)
    return np.clip(128 + factor * change, 0, 255).astype(np.uint8)


def kl_nats(squared_norm: float, alphas_cumprod: Floats) -> Floats:
    """Return KL(noised poisoned image || noised clean one) in nats at depths 1 .. T.

    Both are Gaussians of variance 1 - abar whose means differ by sqrt(abar) delta, so it is
    abar |delta|^2 / (2 (1 - abar)), summed over all pixels and channels; `squared_norm` is |delta|^2 on [-1, 1].
    """
    return alphas_cumprod * squared_norm / (2 * (1 - alphas_cumprod))


def paper_squared_norm() -> float:
    """Return |delta|^2 on [-1, 1] of a perturbation of the paper's norm on [0, 1]."""
    return (2 * PAPER_NORM) ** 2


def part_left(after: Sequence[Floats], before: Sequence[Floats]) -> float:
    """Return the part of the perturbations `before` that is left in the residuals `after`, 1 for all of it.

    It is the coefficient of a least-squares fit of the residuals by the perturbations, over all images.
    """
    energy = sum(float(np.vdot(one, one)) for one in before)
    return sum(float(np.vdot(a, b)) for a, b in zip(after, before, strict=True)) / energy if energy else math.nan


def bands_left(after: Sequence[Floats], before: Sequence[Floats], frequency: float) -> tuple[float, float]:
    """Return `part_left` of the perturbations' frequencies below and above `frequency` cycles per pixel."""
    products, energies = np.zeros(2), np.zeros(2)
    for residual, change in zip(after, before, strict=True):
        high = (_radius(change.shape[:2]) >= frequency).astype(int)
        one, two = (np.fft.fft2(each, axes=(0, 1)) for each in (residual, change))
        products += np.bincount(high.ravel(), weights=(one * two.conj()).real.sum(2).ravel(), minlength=2)
        energies += np.bincount(high.ravel(), weights=(np.abs(two) ** 2).sum(2).ravel(), minlength=2)
    low, top = (float(p / e) if e else math.nan for p, e in zip(products, energies, strict=True))
    return low, top


def _radius(shape: Sequence[int]) -> Floats:
    radius: Floats = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])[None, :])
    return radius


def power_spectrum(changes: Sequence[Floats]) -> Floats:
    """Return the mean power (S, S) of (H, W, 3) changes, frequency 0 in the middle; S is the shortest side.

    Of larger images the central square is used. Divided by the number of pixels, so that the mean over all
    frequencies is the mean square of a pixel.
    """
    side = min(min(change.shape[:2]) for change in changes)
    total = np.zeros((side, side))
    for change in changes:
        planes = np.fft.fft2(central_square(change, side), axes=(0, 1))
        total += (np.abs(planes) ** 2).mean(axis=2) / side**2
    return np.fft.fftshift(total / len(changes))


def radial_mean(power: Floats) -> tuple[Floats, Floats]:
    """Return frequencies in cycles per pixel, up to 1/2, and the mean power of each ring of `power` (S, S)."""
    side = len(power)
    rings = np.rint(np.fft.fftshift(_radius(power.shape)) * side).astype(int)
    count = side // 2 + 1
    kept = rings < count
    sums = np.bincount(rings[kept], weights=power[kept], minlength=count)
    sizes = np.bincount(rings[kept], minlength=count)
    return np.arange(count) / side, sums / sizes


def share_below(power: Floats, frequency: float) -> float:
    """Return the part of the power (S, S) that lies below `frequency` cycles per pixel."""
    low = np.fft.fftshift(_radius(power.shape)) < frequency
    total = float(power.sum())
    return float(power[low].sum()) / total if total else math.nan


def central_square(image: NDArray[Kind], side: int) -> NDArray[Kind]:
    """Return the central (side, side) of an (H, W, C) image that is at least as large."""
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]
