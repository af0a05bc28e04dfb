"""MixUp (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899): two images, two labels.

As in their authors' code, one weight (and one rectangle) is drawn for a batch, whose images are mixed with a
permutation of themselves. The weight is Beta(mix_alpha, mix_alpha), uniform for the published 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eclipse_ray.config import DefenseConfig, PrivacyConfig
from eclipse_ray.defenses.interface import Material
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


LUMA_65536 = (19595, 38470, 7471)
"""ITU-R 601 weights of red, green and blue as Pillow rounds them, in 1/65536; they add up to one."""


def gray(material: Material, _config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), as ITU-R 601 luma on three channels, to the bit as Pillow does."""
    weighted = material.images.to(torch.int32) * torch.tensor(LUMA_65536, dtype=torch.int32)
    luma = (weighted.sum(dim=-1, keepdim=True) + 2**15) >> 16
    return luma.to(torch.uint8).expand(material.images.shape).contiguous()


def jpeg(material: Material, config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), stored as JPEG of quality `iss_jpeg_quality` and read again."""
    return material.jpeg(material.images, config.iss_jpeg_quality)


def privacy(config: DefenseConfig) -> PrivacyConfig:
    """Return what `train_victim` is given for a defense with `privacy`."""
    return PrivacyConfig(max_grad_norm=config.dp_max_grad_norm, noise_multiplier=config.dp_noise_multiplier)
