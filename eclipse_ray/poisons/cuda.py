"""CUDA: convolution-based unlearnable datasets (Sadasivan et al., arXiv 2303.04278)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.poisons.interface import CUDA_T, LabelledImages, PoisonSettings, class_id

BLUR = 0.3
"""Largest tap of a filter beside the one that is 1."""
SIDE = 3
"""Taps along each side of a filter."""


class Cuda(PoisonSettings):
    """The settings of cuda, which convolves images and has no norm bound."""

    scope: Literal["class"] = Field("class", description="One filter per class.")


def cuda_perturbation(data: LabelledImages, _settings: Cuda, seed: int) -> Tensor:
    """Return the perturbation of each image, exact in 1/255; see `ClosedForm`. There is no norm bound.

    Each class has one 3x3 filter, the same for red, green and blue: taps U(0, 0.3), a random one 1. An image is
    convolved with its class's filter (zeros beyond the border), divided by its largest value and rounded to 8
    bits; a black image stays black.
    """
    images = data.images
    blurred = convolve(images.permute(0, 3, 1, 2).double() / 255, class_filters(seed, data.labels.tolist()))
    largest = blurred.amax(dim=(1, 2, 3), keepdim=True)
    stored = (blurred / torch.where(largest > 0, largest, 1) * 255).round()
    return ((stored.permute(0, 2, 3, 1) - images) / 255).float()


def class_filters(seed: int, labels: Sequence[int]) -> Tensor:
    """Return the filter of each label's class, float64 (B, 3, 3), keyed by (seed, class)."""
    keys = [class_id(label) for label in labels]
    taps = BLUR * uniform(seed, keys, CUDA_T, (SIDE * SIDE,))
    whole = (uniform(seed, keys, CUDA_T + 1, (1,)) * SIDE * SIDE).long()
    return taps.scatter(1, whole, 1.0).view(-1, SIDE, SIDE)


def convolve(images: Tensor, filters: Tensor) -> Tensor:
    """Return float images (B, 3, H, W), each correlated with its own filter (B, 3, 3), the size unchanged."""
    height, width = images.shape[2:]
    padded = F.pad(images, (SIDE // 2,) * 4)
    result = torch.zeros_like(images)
    # Tap by tap: a grouped convolution may round differently in another batch.
    for down in range(SIDE):
        for right in range(SIDE):
            weight = filters[:, down, right, None, None, None]
            result += weight * padded[:, :, down : down + height, right : right + width]
    return result
