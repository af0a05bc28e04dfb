"""What of an image changes when it is mirrored, in several views; and what needs no mirror.

A view maps images to rows whose sign turns when the image is mirrored left to right. Where an image and its
mirror image are equally likely, as in photographs, such a row is as likely as its negative: the audit's null.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eclipse_ray.quality import LUMA

GRID = 8
"""Cells along each side in which low frequencies are looked at; sides are multiples of it."""
LAGS = 2
"""Largest distance, in pixels along each axis, over which the residual is correlated."""
BANDS = 6
"""Rings of radial frequency from 0 to half a cycle per pixel."""
CELL = 4
"""Frequencies along each axis that the convolution view averages."""
CHUNK = 256
"""Images looked at together: bounds the memory of intermediate values."""
FEW = 16
"""Images whose patches are laid out together."""
PATCHES = 8
"""Patches of an image that filters are made of."""
STRIDE = 2
"""Pixels between two places where a filter looks."""


@dataclass(frozen=True)
class Images:
    """A sample: uint8 `images` (N, 3, S, S), int64 `labels` (N) or None, what a denoiser made of them or None.

    S is a multiple of GRID. `denoised` must be mirrored when `images` are; see `auditing.Denoised`.
    """

    images: Tensor
    labels: Tensor | None
    denoised: Tensor | None = None

    def take(self, rows: Tensor) -> Images:
        """Return the images of these rows."""
        labels = None if self.labels is None else self.labels[rows]
        denoised = None if self.denoised is None else self.denoised[rows]
        return Images(self.images[rows], labels, denoised)

    def residual(self, rows: slice) -> Tensor:
        """Return the residual of some images, float32 (n, 3, S, S) in 1/255: what smoothing takes away."""
        images = self.images[rows].float()
        smooth = _blur(images) if self.denoised is None else self.denoised[rows].float()
        return images - smooth


def rows_of(sample: Images, view: Callable[[Images, slice], Tensor]) -> Tensor:
    """Return a view of all images, float32 (N, features), one chunk after another."""
    starts = range(0, len(sample.images), CHUNK)
    return torch.cat([view(sample, slice(start, start + CHUNK)) for start in starts])


def pattern(sample: Images, rows: slice) -> Tensor:
    """Return the odd part of the residual, left half, (n, 3 * S * S / 2)."""
    return _odd(sample.residual(rows)).flatten(1)


def coarse(sample: Images, rows: slice) -> Tensor:
    """Return the odd part of the image's means on a GRID x GRID grid."""
    return _odd(F.adaptive_avg_pool2d(sample.images[rows].float(), GRID)).flatten(1)


def colour(sample: Images, rows: slice) -> Tensor:
    """Return the odd part of what grayscale takes from the residual: red and blue less luma."""
    residual = sample.residual(rows)
    luma = (residual * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return _odd((residual - luma)[:, ::2]).flatten(1)


def autocorrelation(sample: Images, rows: slice) -> Tensor:
    """Return how correlations of neighbouring residuals, within and across channels, differ from the mirror's."""
    residual = sample.residual(rows)
    side = residual.shape[-1]
    inner = slice(LAGS, side - LAGS)
    core = residual[:, :, inner, inner].flatten(2)
    scale = core.square().sum(2)
    scale = (scale[:, :, None] * scale[:, None, :]).sqrt() + 1.0

    def correlation(down: int, right: int) -> Tensor:
        moved = residual[:, :, LAGS + down : side - LAGS + down, LAGS + right : side - LAGS + right]
        return torch.bmm(core, moved.flatten(2).transpose(1, 2)) / scale

    odd = []
    for right in range(1, LAGS + 1):
        level = correlation(0, right)
        odd.append((level - correlation(0, -right)).flatten(1))
        odd += [(correlation(down, right) - correlation(down, -right)).flatten(1) for down in range(1, LAGS + 1)]
    return torch.cat(odd, 1)


def convolution(sample: Images, rows: slice) -> Tensor:
    """Return how the logarithm of the image's power spectrum differs from the mirror's, in cells of CELL x CELL.

    What is added to an image hardly changes the strong part of its spectrum; a filter changes all of it.
    """
    luma = (sample.images[rows].float() * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1)
    side = luma.shape[-1]
    power = _power(torch.stack([luma, luma.flip(-1)], 1))
    power = torch.fft.fftshift(power, dim=2)[..., : side // 2]
    logs = F.avg_pool2d(power, CELL).clamp_min(1e-2).log()
    return (logs[:, 0] - logs[:, 1]).flatten(1)


VIEWS: dict[str, Callable[[Images, slice], Tensor]] = {
    "predictability": pattern,
    "coarse": coarse,
    "colour": colour,
    "autocorrelation": autocorrelation,
    "convolution": convolution,
}
"""Views whose sign turns with the mirror, by the name of the score that looks at them."""


def bands(sample: Images, rows: slice) -> Tensor:
    """Return the logarithm of the residual's energy in BANDS rings of radial frequency, (n, BANDS)."""
    side = sample.images.shape[-1]
    power = _power(sample.residual(rows)).sum(1)
    ring = (_radius(side) * 2 * BANDS).long().clamp_max(BANDS - 1)
    weights = F.one_hot(ring.flatten(), BANDS).float()
    weights /= weights.sum(0)
    return (power.flatten(1) @ weights).clamp_min(1e-3).log()


def low_and_all(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Return (low, all) energy that two independent estimates of class means (C, 3, S, S) have in common.

    Low is a radial frequency of up to 1/8 cycle per pixel. What is noise in one of them cancels on average.
    """
    shared = (torch.fft.rfft2(one) * torch.fft.rfft2(other).conj()).real
    side = one.shape[-1]
    # Of frequencies of a real image that come twice, rfft2 keeps one.
    weight = torch.full((side // 2 + 1,), 2.0)
    weight[0] = weight[-1] = 1.0
    shared = (shared * weight).sum((0, 1))
    return float(shared[_radius(side) <= 1 / 8].sum()), float(shared.sum())


def random_filters(sample: Images, count: int, generator: torch.Generator, side: int = 5) -> Tensor:
    """Return `count` filters (count, 3, side, side): whitened random patches of the residual."""
    chosen = torch.randint(0, len(sample.images), (max(500, count),), generator=generator)
    residual = rows_of(sample.take(chosen), Images.residual)
    patches = []
    for _ in range(PATCHES):
        top, left = torch.randint(0, residual.shape[-1] - side + 1, (2,), generator=generator).tolist()
        patches.append(residual[:, :, top : top + side, left : left + side].flatten(1))
    mixed = torch.cat(patches)[torch.randperm(PATCHES * len(chosen), generator=generator)]
    mixed -= mixed.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(mixed.T @ mixed / len(mixed))
    whiten = vectors @ torch.diag((values.clamp_min(0) + 10.0).rsqrt()) @ vectors.T
    filters = mixed[:count] @ whiten
    filters = filters / filters.norm(dim=1, keepdim=True).clamp_min(1e-6) @ whiten
    return filters.view(count, 3, side, side)


def responses(residual: Tensor, filters: Tensor) -> Tensor:
    """Return what filters find in residuals (n, 3, S, S), both signs, in each quarter: (n, 8 * filters)."""
    side = filters.shape[-1]
    places = (residual.shape[-1] - side) // STRIDE + 1
    # A product of matrices, a few images at a time: convolutions of three channels are slow on a CPU.
    found = torch.cat(
        [filters.flatten(1) @ F.unfold(part, side, stride=STRIDE) for part in torch.split(residual, FEW)]
    )
    found = found.view(len(residual), len(filters), places, places)
    both = torch.cat([F.relu(found - 0.5), F.relu(-found - 0.5)], 1)
    return F.adaptive_avg_pool2d(both, 2).flatten(1)


def _odd(maps: Tensor) -> Tensor:
    odd = (maps - maps.flip(-1)) / 2
    return odd[..., : maps.shape[-1] // 2]


def _blur(images: Tensor) -> Tensor:
    taps = torch.exp(-0.5 * torch.arange(-2.0, 3.0).square())
    taps = (taps / taps.sum()).repeat(3, 1)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    across = F.conv2d(padded, taps.view(3, 1, 1, 5), groups=3)
    return F.conv2d(across, taps.view(3, 1, 5, 1), groups=3)


def _power(maps: Tensor) -> Tensor:
    window = torch.hann_window(maps.shape[-1], periodic=False)
    centred = maps - maps.mean((-2, -1), keepdim=True)
    return torch.fft.rfft2(centred * window[:, None] * window).abs().square()


def _radius(side: int) -> Tensor:
    down, right = torch.fft.fftfreq(side), torch.fft.rfftfreq(side)
    return (down[:, None].square() + right.square()).sqrt()
