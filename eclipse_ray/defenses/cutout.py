"""Cutout (DeVries and Taylor, arXiv 1708.04552): one black square in every training image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eclipse_ray.config import DefenseConfig
from eclipse_ray.victims.training import Augmentation


def cutout(config: DefenseConfig) -> Augmentation:
    """Return the augmentation that sets a square of `cutout_size` pixels of each image to 0.

    Its centre is drawn from all pixels, so that near the border a part of the square falls outside, as published.
    """
    size = config.cutout_size

    def augment(
        images: Tensor, targets: Tensor, _model: nn.Module, generator: torch.Generator, _progress: float
    ) -> tuple[Tensor, Tensor]:
        rows = _inside(len(images), int(images.shape[2]), size, generator)
        columns = _inside(len(images), int(images.shape[3]), size, generator)
        hole = rows[:, None, :, None] & columns[:, None, None, :]
        return images.masked_fill(hole, 0.0), targets

    return augment


def _inside(count: int, length: int, size: int, generator: torch.Generator) -> Tensor:
    """Return bool (count, length): the pixels from centre - size // 2 on, `size` of them, for drawn centres."""
    device = generator.device
    first = torch.randint(0, length, (count, 1), generator=generator, device=device) - size // 2
    places = torch.arange(length, device=device)
    return (places >= first) & (places < first + size)
