"""Availability poisons: perturbations that a classifier learns instead of the images.

Closed-form poisons (`POISONS`) perturb any batch at once. Optimised ones (`OPTIMISED`) are first fitted to the
whole dataset; the state this gives then perturbs any part of it. A poison is one file (the small ones share
`simple`), with its settings beside the code, and one line in one of these two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eclipse_ray.config import PoisonConfig, meant, validated
from eclipse_ray.errors import ConfigError, unknown
from eclipse_ray.poisons.adp import Adp, fit_adp
from eclipse_ray.poisons.ar import Ar, ar_perturbation
from eclipse_ray.poisons.cuda import Cuda, cuda_perturbation
from eclipse_ray.poisons.efp import Efp, fit_efp, perturb_efp
from eclipse_ray.poisons.em import Em, minimise_error, perturb_em
from eclipse_ray.poisons.interface import (
    ClosedForm,
    LabelledImages,
    Optimised,
    PoisonSettings,
    Session,
    State,
    check_inputs,
    store,
)
from eclipse_ray.poisons.lsp import Lsp, lsp_perturbation
from eclipse_ray.poisons.mixture import Mixture, mixed_perturbation
from eclipse_ray.poisons.rem import Rem, fit_rem, perturb_rem
from eclipse_ray.poisons.sep import Sep, fit_sep, perturb_sep
from eclipse_ray.poisons.simple import Ops, Shift, Urp, fit_ops, perturb_ops, shift_perturbation, urp_perturbation
from eclipse_ray.poisons.tap import Tap, fit_tap, perturb_tap

SINGLE: dict[str, ClosedForm] = {
    "urp": ClosedForm(Urp, urp_perturbation),
    "lsp": ClosedForm(Lsp, lsp_perturbation),
    "ar": ClosedForm(Ar, ar_perturbation),
    "ar-published": ClosedForm(Ar, partial(ar_perturbation, published=True)),
    "cuda": ClosedForm(Cuda, cuda_perturbation),
    "shift": ClosedForm(Shift, shift_perturbation),
}
"""Closed-form poisons that a mixture may consist of."""

POISONS: dict[str, ClosedForm] = SINGLE | {"mixture": ClosedForm(Mixture, partial(mixed_perturbation, SINGLE))}
"""Closed-form poisons by the name of `poison.name`."""

OPTIMISED: dict[str, Optimised] = {
    "ops": Optimised(Ops, fit_ops, perturb_ops),
    "em": Optimised(Em, minimise_error, perturb_em),
    "tap": Optimised(Tap, fit_tap, perturb_tap),
    "rem": Optimised(Rem, fit_rem, perturb_rem),
    "sep": Optimised(Sep, fit_sep, perturb_sep),
    "efp": Optimised(Efp, fit_efp, perturb_efp),
    "adp": Optimised(Adp, fit_adp, perturb_em),
}
"""Optimised poisons by the name of `poison.name`."""


def poison_settings() -> dict[str, type[PoisonSettings]]:
    """Return the class of every poison's settings by its name; `settings_of` gives its numbers at either cost."""
    return {name: one.settings for name, one in (POISONS | OPTIMISED).items()}


def settings_of(config: PoisonConfig) -> PoisonSettings:
    """Return the settings of the poison that `config` names: the numbers of its cost, and what was chosen.

    Raises ConfigError for an unknown poison, and for a setting that this poison does not have or that is out of
    range. A null stands for the number of the cost.
    """
    model = _named(config.name)
    chosen = config.own()
    _refuse_unknown(chosen, model.model_fields, f"{config.name} has no such setting")
    found = validated(model, {**_numbers(model, config.cost, chosen), **chosen}, "poison")
    for name in found.parts if isinstance(found, Mixture) else ():
        if name not in SINGLE:
            raise ConfigError(f"poison.parts: {name} is no closed-form poison; choose from {', '.join(SINGLE)}")
    return found


def resolved_poison(config: PoisonConfig) -> PoisonConfig:
    """Return `config` with every setting of its poison written out.

    Raises as `settings_of` does, and for a denoiser that the poison does not attack.
    """
    own = settings_of(config).model_dump(mode="json")
    if config.denoiser and not attacks_denoiser(config):
        raise ConfigError("poison.denoiser: only adp with poison.variant=strong attacks a denoiser; leave it out")
    shared = config.model_dump(mode="json", include={"name", "cost", *PoisonConfig.OF_A_RUN})
    return PoisonConfig.model_validate({**shared, **own})


def attacks_denoiser(config: PoisonConfig) -> bool:
    """Return whether a poison is made against a denoiser, which must be there first."""
    return config.name == "adp" and config.variant == "strong"


def check_poison(config: PoisonConfig) -> None:
    """Refuse a setting that no poison has, and values out of range for the named one where it has all of them.

    Settings may be there for a poison that is named later, on the command line or in a matrix. Raises ConfigError.
    """
    named, chosen = _named(config.name).model_fields, config.own()
    if chosen.keys() <= named.keys():
        settings_of(config)
        return
    known = dict.fromkeys(key for model in poison_settings().values() for key in model.model_fields)
    _refuse_unknown(chosen, known, "no poison has such a setting")


def _refuse_unknown(chosen: Collection[str], known: Collection[str], sentence: str) -> None:
    wrong = [key for key in chosen if key not in known]
    if wrong:
        like = [*known, "name", "cost", *PoisonConfig.OF_A_RUN]
        close = dict.fromkeys(one for key in wrong for one in meant("poison.", key, like))
        said = ", ".join(f"poison.{key}" for key in wrong)
        named = ", ".join(close or [f"poison.{one}" for one in known])
        raise ConfigError(f"{said}: {sentence}; {'did you mean' if close else 'there are'} {named}")


def cost_of(config: PoisonConfig) -> str:
    """Return the cost of a poison whose numbers depend on it, else ""."""
    return config.cost if _named(config.name).numbers.get("reduced") else ""


def variant_of(config: PoisonConfig) -> str:
    """Return the form of a poison that has several: its variant, em's scope, or "" where there is only one."""
    settings = settings_of(config)
    return settings.scope if config.name == "em" else str(getattr(settings, "variant", ""))


def budget(config: PoisonConfig, shape: Sequence[int]) -> tuple[str, float]:
    """Return ("linf", "l2" or "none", bound on [0, 1]) of a poison for images of `shape` (H, W, 3)."""
    return settings_of(config).budget(shape)


def _named(name: str) -> type[PoisonSettings]:
    known = poison_settings()
    if name not in known:
        raise ConfigError(f"poison.name: {name} {unknown(name, known)}")
    return known[name]


def _numbers(model: type[PoisonSettings], cost: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """Return what `model.numbers` says of a cost and of the chosen or default scope and variant."""
    scope, variant = (
        str(chosen.get(key, model.model_fields[key].default)) if key in model.model_fields else ""
        for key in ("scope", "variant")
    )
    found: dict[str, Any] = {}
    for form in (cost, scope, variant, f"{variant} {cost}"):
        found |= model.numbers.get(form, {})
    return found


def perturb(
    images: Tensor, labels: Tensor, ids: Sequence[str], config: PoisonConfig, seed: int, num_classes: int
) -> Tensor:
    """Return the perturbation, float32 (B, H, W, 3) on [0, 1], of uint8 `images` (B, H, W, 3).

    For closed-form poisons. Every draw is keyed by (`seed`, image id or class), so that it does not depend on
    order or batch. `labels` are integers (B,) in 0..num_classes - 1. Raises InputError for an inconsistent batch,
    ConfigError for an optimised poison and for settings that cannot work at this image size.
    """
    settings = settings_of(config)
    if config.name not in POISONS:
        raise ConfigError(f"poison {config.name} depends on all images at once: fit_poison comes first")
    # As an index, a tensor of bytes is a mask.
    data = LabelledImages(images, labels.long(), ids, num_classes)
    check_inputs(data)
    return POISONS[config.name].perturb(data, settings, seed) if len(ids) else torch.zeros(images.shape)


def poison_images(
    images: Tensor, labels: Tensor, ids: Sequence[str], config: PoisonConfig, seed: int, num_classes: int
) -> Tensor:
    """Return poisoned uint8 images (B, H, W, 3): the perturbation added, rounded, clamped, its norm checked.

    After 8-bit storage an L-inf bound holds exactly and an L2 bound within sqrt(d)/510; cuda has none.
    Raises as `perturb` does.
    """
    return store(images, perturb(images, labels, ids, config, seed, num_classes), settings_of(config))


def fit_poison(data: LabelledImages, config: PoisonConfig, seed: int, session: Session) -> State:
    """Fit an optimised poison to the whole dataset and return its state, CPU tensors by name.

    Raises ConfigError for a closed-form poison and as `settings_of` does, InputError for an inconsistent dataset.
    """
    check_inputs(data)
    return optimised(config).fit(data, settings_of(config), seed, session)


def poison_fitted(
    data: LabelledImages, state: State, config: PoisonConfig, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return any part of a fitted dataset poisoned, uint8 (B, H, W, 3), its norm checked after 8-bit storage."""
    check_inputs(data)
    if not len(data.ids):
        return data.images.clone()
    method, settings = optimised(config), settings_of(config)
    return store(data.images, method.perturb(data, state, settings, seed, torch.device(device)), settings)


def optimised(config: PoisonConfig) -> Optimised:
    """Return an optimised poison. Raises ConfigError for a name that is none."""
    _named(config.name)
    if config.name not in OPTIMISED:
        known = ", ".join(OPTIMISED)
        raise ConfigError(f"poison {config.name} is not optimised over a dataset; {known} are")
    return OPTIMISED[config.name]
