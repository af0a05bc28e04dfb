"""Availability poisons: perturbations that a classifier learns instead of the images.

Closed-form poisons (`POISONS`) perturb any batch at once. Optimised ones (`OPTIMISED`) are first fitted to the
whole dataset; the state this gives then perturbs any part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eclipse_ray.config import PoisonConfig
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.adp import fit_adp, perturb_adp
from eclipse_ray.poisons.ar import ar_perturbation
from eclipse_ray.poisons.budget import budget, check_inputs, store
from eclipse_ray.poisons.costs import resolved_poison
from eclipse_ray.poisons.cuda import cuda_perturbation
from eclipse_ray.poisons.efp import fit_efp, perturb_efp
from eclipse_ray.poisons.em import fit_em, perturb_em
from eclipse_ray.poisons.lsp import lsp_perturbation
from eclipse_ray.poisons.optimised import LabelledImages, Optimised, Session, State, quiet_session
from eclipse_ray.poisons.rem import fit_rem, perturb_rem
from eclipse_ray.poisons.sep import fit_sep, perturb_sep
from eclipse_ray.poisons.tap import fit_tap, perturb_tap
from eclipse_ray.poisons.urp import urp_perturbation

Poison = Callable[[Tensor, Tensor, Sequence[str], PoisonConfig, int, int], Tensor]

POISONS: dict[str, Poison] = {
    "urp": urp_perturbation,
    "lsp": lsp_perturbation,
    "ar": ar_perturbation,
    "cuda": cuda_perturbation,
}
"""Closed-form poisons by the name of `poison.name`; see `perturb` for the common signature."""

OPTIMISED: dict[str, Optimised] = {
    "em": Optimised(fit_em, perturb_em),
    "tap": Optimised(fit_tap, perturb_tap),
    "rem": Optimised(fit_rem, perturb_rem),
    "sep": Optimised(fit_sep, perturb_sep),
    "efp": Optimised(fit_efp, perturb_efp),
    "adp": Optimised(fit_adp, perturb_adp),
}
"""Optimised poisons by the name of `poison.name`: fit to the whole dataset, then perturb any part of it."""

__all__ = [
    "OPTIMISED",
    "POISONS",
    "LabelledImages",
    "Optimised",
    "Poison",
    "Session",
    "State",
    "budget",
    "fit_poison",
    "perturb",
    "poison_fitted",
    "poison_images",
    "poison_together",
    "quiet_session",
    "resolved_poison",
]


def perturb(
    images: Tensor, labels: Tensor, ids: Sequence[str], config: PoisonConfig, seed: int, num_classes: int
) -> Tensor:
    """Return the perturbation, float32 (B, H, W, 3) on [0, 1], of uint8 `images` (B, H, W, 3).

    For closed-form poisons. Every draw is keyed by (`seed`, image id or class), so that it does not depend on
    order or batch. `labels` are integers (B,) in 0..num_classes - 1. Raises InputError for an inconsistent batch,
    ConfigError for an optimised poison and for settings that cannot work at this image size.
    """
    if config.name not in POISONS:
        raise ConfigError(f"poison {config.name} depends on all images at once: fit_poison comes first")
    return POISONS[config.name](images, labels, ids, config, seed, num_classes)


def poison_images(
    images: Tensor, labels: Tensor, ids: Sequence[str], config: PoisonConfig, seed: int, num_classes: int
) -> Tensor:
    """Return poisoned uint8 images (B, H, W, 3): the perturbation added, rounded, clamped, its norm checked.

    After 8-bit storage an L-inf bound holds exactly and an L2 bound within sqrt(d)/510; cuda has none.
    Raises as `perturb` does.
    """
    return store(images, perturb(images, labels, ids, config, seed, num_classes), config)


def fit_poison(data: LabelledImages, config: PoisonConfig, seed: int, session: Session) -> State:
    """Fit an optimised poison to the whole dataset and return its state, CPU tensors by name.

    Numbers that `config` leaves open are those of its cost. Raises ConfigError for a closed-form poison,
    InputError for an inconsistent dataset.
    """
    check_inputs(data.images, data.labels, data.ids, data.num_classes)
    return optimised(config).fit(data, resolved_poison(config), seed, session)


def poison_fitted(
    data: LabelledImages, state: State, config: PoisonConfig, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return any part of a fitted dataset poisoned, uint8 (B, H, W, 3), its norm checked after 8-bit storage."""
    check_inputs(data.images, data.labels, data.ids, data.num_classes)
    if not len(data.ids):
        return data.images.clone()
    method, resolved = optimised(config), resolved_poison(config)
    return store(data.images, method.perturb(data, state, resolved, seed, torch.device(device)), resolved)


def poison_together(data: LabelledImages, config: PoisonConfig, seed: int, session: Session) -> Tensor:
    """Return all images poisoned by a poison of either kind, uint8 (N, H, W, 3)."""
    if config.name in POISONS:
        return poison_images(data.images, data.labels, data.ids, config, seed, data.num_classes)
    return poison_fitted(data, fit_poison(data, config, seed, session), config, seed, session.device)


def optimised(config: PoisonConfig) -> Optimised:
    """Return the two halves of an optimised poison. Raises ConfigError for a name that is none."""
    if config.name not in OPTIMISED:
        known = ", ".join(OPTIMISED)
        raise ConfigError(f"poison {config.name} is not optimised over a dataset; {known} are")
    return OPTIMISED[config.name]
