"""MixUp (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899): two images, two labels.

As in their authors' code, one weight (and one rectangle) is drawn for a batch, whose images are mixed with a
permutation of themselves. The weight is Beta(mix_alpha, mix_alpha), uniform for the published 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eclipse_ray.config import DefenseConfig
from eclipse_ray.victims.training import Augmentation


def mixup(config: DefenseConfig) -> Augmentation:
    """Return the augmentation w x + (1 - w) x[permuted], of images and of targets alike."""

    def augment(
        images: Tensor, targets: Tensor, _model: nn.Module, generator: torch.Generator, _progress: float
    ) -> tuple[Tensor, Tensor]:
        weight = beta(config.mix_alpha, generator)
        other = _permutation(len(images), generator)
        return weight * images + (1 - weight) * images[other], weight * targets + (1 - weight) * targets[other]

    return augment


def cutmix(config: DefenseConfig) -> Augmentation:
    """Return the augmentation that pastes a rectangle of x[permuted] into x.

    The rectangle has the image's proportions and 1 - w of its area before it is clipped at the border; the target
    takes the other label with the share of pixels that were pasted.
    """

    def augment(
        images: Tensor, targets: Tensor, _model: nn.Module, generator: torch.Generator, _progress: float
    ) -> tuple[Tensor, Tensor]:
        side = math.sqrt(1 - beta(config.mix_alpha, generator))
        height, width = int(images.shape[2]), int(images.shape[3])
        rows, columns = _span(height, side, generator), _span(width, side, generator)
        other = _permutation(len(images), generator)
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[other][:, :, rows, columns]
        pasted = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        return mixed, (1 - pasted) * targets + pasted * targets[other]

    return augment


def beta(alpha: float, generator: torch.Generator) -> float:
    """Return one draw of Beta(alpha, alpha) from `generator`."""
    # torch.distributions.Beta takes no generator; the gamma variates beneath it do.
    shape = torch.full((2,), alpha, device=generator.device)
    first, second = torch._standard_gamma(shape, generator=generator).double().tolist()
    # Both underflow to 0 for a tiny alpha, whose draws lie at either end.
    return first / (first + second) if first + second > 0 else 0.5


def _permutation(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device)


def _span(length: int, side: float, generator: torch.Generator) -> slice:
    """Return the pixels of a side of `side` * `length` about a centre drawn from all pixels, clipped."""
    size = int(length * side)
    centre = int(torch.randint(0, length, (), generator=generator, device=generator.device))
    return slice(max(0, centre - size // 2), min(length, centre + size // 2))
