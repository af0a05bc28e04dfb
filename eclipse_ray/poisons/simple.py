"""Poisons of a few lines: URP, one draw of noise per class; a colour shift per class; and OPS, a pixel per class.

URP and the shift are bounded in L-inf. OPS (the one-pixel shortcut, Wu et al., arXiv 2205.12141) changes one pixel
by any amount.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import noise, uniform
from eclipse_ray.poisons.interface import (
    SHIFT_T,
    URP_T,
    LabelledImages,
    LinfSettings,
    PoisonSettings,
    Scope,
    Session,
    State,
    draw_ids,
)

SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
"""The eight ways to shift red, green and blue up or down."""


class Urp(LinfSettings):
    """The settings of urp."""

    scope: Scope = Field("class", description="One draw per class, or one per image.")
    distribution: Literal["uniform", "gaussian"] = Field("uniform", description="How the draws are distributed.")


def urp_perturbation(data: LabelledImages, settings: Urp, seed: int) -> Tensor:
    """Return the perturbation of each image; see `ClosedForm`.

    One draw per class (default) or per image: uniform(-eps, eps) as in the public code, or N(0, eps) clipped
    to the bound as in the text of arXiv 2406.15093.
    """
    shape = tuple(data.images.shape[1:])
    bound = settings.budget(shape)[1]
    keys = draw_ids(data, settings.scope)
    distinct = list(dict.fromkeys(keys))
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


def shift_perturbation(data: LabelledImages, settings: Shift, seed: int) -> Tensor:
    """Return the perturbation of each image; see `ClosedForm`.

    Each channel of an image moves by +eps or -eps. The eight combinations of signs are shuffled by the seed and
    dealt to the classes in turn, so that two of the first eight classes never share one.
    """
    shape = data.images.shape
    order = uniform(seed, ["signs"], SHIFT_T, (len(SIGNS),))[0].argsort(stable=True)
    dealt = SIGNS[order][data.labels % len(SIGNS)]
    return (dealt * settings.budget(shape[1:])[1])[:, None, None].expand(shape).contiguous()


COLOURS = tuple(itertools.product((0, 1), repeat=3))
"""The eight colours on [0, 1] that a pixel may get: the corners of the RGB cube."""


class Ops(PoisonSettings):
    """The settings of ops, which changes one pixel of each image by any amount."""

    numbers: ClassVar[dict[str, dict[str, Any]]] = {"full": {}, "reduced": {}}

    scope: Literal["class"] = Field("class", description="One pixel and colour per class.")


def fit_ops(data: LabelledImages, _settings: Ops, _seed: int, session: Session) -> State:
    """Return each class's pixel, `place` int64 (C,) counted row by row, and its `colour` uint8 (C, 3).

    A class takes the pixel and colour with the highest mean of |colour - pixel| divided by its standard deviation.
    Both are over the images of the class and the channels: the colour is far from most images, by the same amount.
    A pair that an earlier class has taken is left out. A class without images gets one of the rest.
    """
    place = torch.zeros(data.num_classes, dtype=torch.int64)
    colour = torch.zeros(data.num_classes, 3, dtype=torch.uint8)
    taken: list[int] = []
    for label in range(data.num_classes):
        scores = _scores(data.images[data.labels == label])
        scores[taken] = -1.0
        best = int(scores.argmax())
        taken.append(best)
        pixel, which = divmod(best, len(COLOURS))
        place[label] = pixel
        colour[label] = 255 * torch.tensor(COLOURS[which], dtype=torch.uint8)
        session.report(label + 1, data.num_classes, "classes")
    return {"place": place, "colour": colour}


def _scores(images: Tensor) -> Tensor:
    """Return the score of each pair of pixel and colour, float64 (H * W * 8,), of uint8 images (N, H, W, 3)."""
    # Whole numbers up to 2^53: sums do not depend on the order of the images.
    values = images.flatten(1, 2).to(torch.int64)
    count = max(1, 3 * len(values))
    scores = []
    for colour in COLOURS:
        distance = (255 * torch.tensor(colour) - values).abs()
        mean = distance.sum(dim=(0, 2)).double() / count
        variance = distance.square().sum(dim=(0, 2)).double() / count - mean.square()
        # Half a level: a pixel that is equal in all images would divide by zero.
        scores.append(mean / variance.clamp(min=0.25).sqrt())
    return torch.stack(scores, dim=1).flatten()


def perturb_ops(data: LabelledImages, state: State, _settings: Ops, _seed: int, _device: torch.device) -> Tensor:
    """Return float32 (B, H, W, 3) on [0, 1] that sets one pixel of each image to the colour of its class."""
    rows = torch.arange(len(data.ids))
    change = torch.zeros(data.images.shape).flatten(1, 2)
    place, colour = state["place"][data.labels], state["colour"][data.labels].float()
    change[rows, place] = (colour - data.images.flatten(1, 2)[rows, place]) / 255
    return change.view(data.images.shape)
