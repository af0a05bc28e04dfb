"""A mixture: another closed-form poison for each image, as a collector meets it who gathers from many sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.poisons.interface import MIXTURE_T, ClosedForm, LabelledImages, PoisonSettings, store


class Mixture(PoisonSettings):
    """The settings of mixture, whose parts have the settings and bounds that are theirs by default."""

    scope: Literal["sample"] = Field("sample", description="One part per image; the parts have their own scopes.")
    parts: tuple[str, ...] = Field(
        ("ar", "lsp", "urp", "shift"), min_length=2, description="Closed-form poisons, each as likely as another."
    )


def mixed_perturbation(
    forms: Mapping[str, ClosedForm], data: LabelledImages, settings: Mixture, seed: int
) -> Tensor:
    """Return the perturbation of each image; see `ClosedForm`.

    Each image gets one of `settings.parts`, drawn by (seed, id), exactly as that poison of `forms` alone would
    store it.
    """
    change = torch.zeros(data.images.shape)
    drawn = (uniform(seed, data.ids, MIXTURE_T, (1,))[:, 0] * len(settings.parts)).long()
    for index, name in enumerate(settings.parts):
        rows = torch.nonzero(drawn == index).flatten()
        if len(rows):
            ids = [data.ids[row] for row in rows.tolist()]
            part = LabelledImages(data.images[rows], data.labels[rows], ids, data.num_classes)
            own = forms[name].settings()
            stored = store(part.images, forms[name].perturb(part, own, seed), own)
            change[rows] = (stored.float() - part.images) / 255
    return change
