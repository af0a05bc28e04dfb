"""A mixture: another closed-form poison for each image, as a collector meets it who gathers from many sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.interface import MIXTURE_T, ClosedForm, PoisonSettings, check_inputs, store


class Mixture(PoisonSettings):
    """The settings of mixture, whose parts have the settings and bounds that are theirs by default."""

    parts: tuple[str, ...] = Field(
        ("ar", "lsp", "urp", "shift"), min_length=2, description="Closed-form poisons, each as likely as another."
    )


def mixed_perturbation(
    forms: Mapping[str, ClosedForm],
    images: Tensor,
    labels: Tensor,
    ids: Sequence[str],
    settings: Mixture,
    seed: int,
    num_classes: int,
) -> Tensor:
    """Return the perturbation, float32 (B, H, W, 3) on [0, 1], of uint8 `images` (B, H, W, 3).

    Each image gets one of `settings.parts`, drawn by (seed, id), exactly as that poison of `forms` alone would
    store it. Raises ConfigError for a part that is no closed-form poison, InputError for an inconsistent batch.
    """
    for name in settings.parts:
        if name not in forms:
            raise ConfigError(f"poison.parts: {name} is no closed-form poison; choose from {', '.join(forms)}")
    check_inputs(images, labels, ids, num_classes)
    change = torch.zeros(images.shape)
    if not ids:
        return change
    drawn = (uniform(seed, ids, MIXTURE_T, (1,))[:, 0] * len(settings.parts)).long()
    for index, name in enumerate(settings.parts):
        rows = torch.nonzero(drawn == index).flatten()
        part, own = images[rows], forms[name].settings()
        names = [ids[row] for row in rows.tolist()]
        made = forms[name].perturb(part, labels[rows], names, own, seed, num_classes)
        change[rows] = (store(part, made, own).float() - part) / 255
    return change
