"""URP: one universal random perturbation per class, bounded in L-inf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import noise, uniform
from eclipse_ray.poisons.interface import URP_T, LinfSettings, Scope, check_inputs, draw_ids


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
