"""Poisons of a few lines, bounded in L-inf: URP, one draw of noise per class, and a colour shift per class."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import noise, uniform
from eclipse_ray.poisons.interface import SHIFT_T, URP_T, LinfSettings, Scope, check_inputs, draw_ids

SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
"""The eight ways to shift red, green and blue up or down."""


class Urp(LinfSettings):
    """The settings of urp."""

    scope: Scope = Field("class", description="One draw per class, or one per image.")
    distribution: Literal["uniform", "gaussian"] = Field("uniform", description="How the draws are distributed.")


def urp_perturbation(
    images: Tensor, labels: Tensor, ids: Sequence[str], settings: Urp, seed: int, num_classes: int
) -> Tensor:
    """Return the perturbation, float32 (B, H, W, 3) on [0, 1], of uint8 `images` (B, H, W, 3).

    One draw per class (default) or per image: uniform(-eps, eps) as in the public code, or N(0, eps) clipped
    to the bound as in the text of arXiv 2406.15093. Raises InputError for an inconsistent batch.
    """
    values = check_inputs(images, labels, ids, num_classes)
    shape = tuple(images.shape[1:])
    bound = settings.budget(shape)[1]
    keys = draw_ids(values, ids, settings.scope)
    distinct = list(dict.fromkeys(keys))
    if not distinct:
        return torch.zeros(images.shape)
    if settings.distribution == "uniform":
        drawn = (2 * uniform(seed, distinct, URP_T, shape) - 1) * bound
    else:
        drawn = (noise(seed, distinct, URP_T, shape).double() * bound).clamp(-bound, bound)
    place = {key: index for index, key in enumerate(distinct)}
    return drawn.float()[[place[key] for key in keys]]


class Shift(LinfSettings):
    """The settings of shift, which moves every pixel of a class by the same amount per channel.

    It is the part of DUNE (ICML 2026) that its noise is added to.
    """

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
