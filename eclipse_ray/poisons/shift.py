"""A class-wise colour shift: the part of DUNE (ICML 2026) that its noise is added to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.poisons.interface import SHIFT_T, LinfSettings, check_inputs

SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
"""The eight ways to shift red, green and blue up or down."""


class Shift(LinfSettings):
    """The settings of shift, which moves every pixel of a class by the same amount per channel."""

    scope: Literal["class"] = Field("class", description="One shift per class.")


def shift_perturbation(
    images: Tensor, labels: Tensor, ids: Sequence[str], settings: Shift, seed: int, num_classes: int
) -> Tensor:
    """Return the perturbation, float32 (B, H, W, 3) on [0, 1], of uint8 `images` (B, H, W, 3).

    Each channel of an image moves by +eps or -eps. The eight combinations of signs are shuffled by the seed and
    dealt to the classes in turn, so that two of the first eight classes never share one. Raises InputError for an
    inconsistent batch.
    """
    values = check_inputs(images, labels, ids, num_classes)
    order = uniform(seed, ["signs"], SHIFT_T, (len(SIGNS),))[0].argsort(stable=True)
    dealt = SIGNS[order][torch.tensor(values, dtype=torch.int64) % len(SIGNS)]
    return (dealt * settings.budget(images.shape[1:])[1])[:, None, None].expand(images.shape).contiguous()
