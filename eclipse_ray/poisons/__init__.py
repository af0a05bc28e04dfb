"""Availability poisons: norm-bounded perturbations that a classifier learns instead of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from eclipse_ray.config import PoisonConfig
from eclipse_ray.poisons.ar import ar_perturbation
from eclipse_ray.poisons.budget import budget, store
from eclipse_ray.poisons.lsp import lsp_perturbation
from eclipse_ray.poisons.urp import urp_perturbation

Poison = Callable[[Tensor, Tensor, Sequence[str], PoisonConfig, int, int], Tensor]

POISONS: dict[str, Poison] = {"urp": urp_perturbation, "lsp": lsp_perturbation, "ar": ar_perturbation}
"""Poisons by the name of `poison.name`; see `perturb` for the common signature."""

__all__ = ["POISONS", "Poison", "budget", "perturb", "poison_images"]


def perturb(
    images: Tensor, labels: Tensor, ids: Sequence[str], config: PoisonConfig, seed: int, num_classes: int
) -> Tensor:
    """Return the perturbation, float32 (B, H, W, 3) on [0, 1], of uint8 `images` (B, H, W, 3).

    Every draw is keyed by (`seed`, image id or class), so that it does not depend on order or batch.
    `labels` are integers (B,) in 0..num_classes - 1. Raises InputError for an inconsistent batch and
    ConfigError for settings that cannot work at this image size.
    """
    return POISONS[config.name](images, labels, ids, config, seed, num_classes)


def poison_images(
    images: Tensor, labels: Tensor, ids: Sequence[str], config: PoisonConfig, seed: int, num_classes: int
) -> Tensor:
    """Return poisoned uint8 images (B, H, W, 3): the perturbation added, rounded, clamped, its norm checked.

    After 8-bit storage an L-inf bound holds exactly and an L2 bound within sqrt(d)/510.
    Raises as `perturb` does.
    """
    return store(images, perturb(images, labels, ids, config, seed, num_classes), config)
