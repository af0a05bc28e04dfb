"""What poisons share: settings and their norm bound, checked inputs, 8-bit storage, and what a fit works with.

A fit sorts its images by a hash of their ids, so that its result depends on the set and not on its order, and
finds an image's own noise again by that hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from eclipse_ray.diffusion.network import Denoiser
from eclipse_ray.diffusion.noise import check_labelled
from eclipse_ray.errors import ConfigError, InputError

# First timesteps reserved for the draws of each poison, far above any diffusion timestep and apart from
# those of compensation, so that no draw is ever shared. sep and adp need none.
URP_T = 2**30 + 2**16
LSP_T = 2**30 + 2 * 2**16
AR_T = 2**30 + 3 * 2**16
CUDA_T = 2**30 + 4 * 2**16
TAP_T = 2**30 + 5 * 2**16
REM_T = 2**30 + 6 * 2**16
EFP_T = 2**30 + 8 * 2**16
SHIFT_T = 2**30 + 10 * 2**16
MIXTURE_T = 2**30 + 11 * 2**16

Scope = Literal["sample", "class"]


class PoisonSettings(BaseModel):
    """The settings of a poison; the file of each poison derives its own. Defaults are the published numbers.

    `numbers` says what differs from the defaults: by cost, by scope, by variant, and by "variant cost". A later
    one of these wins over an earlier one, and a setting that was chosen wins over all. This class has no bound.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    numbers: ClassVar[dict[str, dict[str, Any]]] = {}

    scope: Scope = Field("sample", description="One draw per image, or one per class.")

    def budget(self, shape: Sequence[int]) -> tuple[str, float]:
        """Return ("linf", "l2" or "none", bound on [0, 1]) for images of `shape` (H, W, 3)."""
        return "none", math.inf


class LinfSettings(PoisonSettings):
    """The settings of a poison within an L-inf bound, by default that of arXiv 2406.15093."""

    eps_255: float = Field(8.0, ge=1, description="L-inf bound in 1/255; below 1 it would vanish in 8-bit images.")

    def budget(self, shape: Sequence[int]) -> tuple[str, float]:
        """Return ("linf", bound on [0, 1])."""
        return "linf", self.eps_255 / 255


def check_inputs(data: LabelledImages) -> None:
    """Raise InputError unless images, labels and ids form one labelled batch."""
    check_labelled(data.images, data.labels, data.ids)
    wrong = data.labels[(data.labels < 0) | (data.labels >= data.num_classes)]
    if len(wrong):
        raise InputError(f"label {int(wrong[0])} lies outside 0..{data.num_classes - 1}; relabel from 0")


def class_id(label: int) -> str:
    """Return the id that class-wise draws are keyed by."""
    return f"class-{label}"


def draw_ids(data: LabelledImages, scope: str) -> list[str]:
    """Return the key of each image's draw: its own id for scope "sample", its class for "class"."""
    return list(data.ids) if scope == "sample" else [class_id(label) for label in data.labels.tolist()]


def scale_to_l2(values: Tensor, settings: PoisonSettings) -> Tensor:
    """Return float64 `values` (B, H, W, 3), each scaled to the L2 bound of the settings, as float32."""
    bound = settings.budget(values.shape[1:])[1]
    # One image at a time and in numpy: torch may sum in another order for another batch or thread count.
    norms = [math.sqrt(float(np.square(row).sum())) for row in values.flatten(1).numpy()]
    factors = [bound / norm if norm > 0 else 0.0 for norm in norms]
    return (values * values.new_tensor(factors)[:, None, None, None]).float()


def store(images: Tensor, perturbation: Tensor, settings: PoisonSettings) -> Tensor:
    """Return `images`, uint8 (B, H, W, 3), plus `perturbation` (on [0, 1]), rounded and clamped to uint8.

    The bound is asserted on what is stored: L-inf holds exactly, L2 within sqrt(d)/510 for d values; cuda: none.
    Raises ConfigError for an L2 bound so small that rounding leaves nothing of an image's perturbation.
    """
    norm, bound = settings.budget(tuple(images.shape[1:]))
    change = (perturbation.double() * 255).round()
    if norm == "linf":
        # The slack only undoes float error in 255 * (eps_255 / 255).
        limit = math.floor(bound * 255 + 1e-9)
        change = change.clamp(-limit, limit)
    elif norm == "l2" and bool((perturbation.flatten(1).any(dim=1) & ~change.flatten(1).any(dim=1)).any()):
        raise ConfigError(f"poison.eps_255 {255 * bound:g}: nothing of it is left in an 8-bit image; raise it")
    stored = (images.double() + change).clamp(0, 255).to(torch.uint8)
    difference = (stored.double() - images.double()).flatten(1) / 255
    if len(difference) and norm == "linf":
        assert float(difference.abs().max()) <= bound + 1e-12, "L-inf bound broken in 8-bit storage"
    elif len(difference) and norm == "l2":
        slack = math.sqrt(difference.shape[1]) / 510
        assert float(difference.norm(dim=1).max()) <= bound + slack + 1e-6, "L2 bound broken in 8-bit storage"
    return stored


State = dict[str, Tensor]
"""CPU tensors by name, as safetensors stores them: networks ("surrogate.0.<key>"), noise, counters."""


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 (N, H, W, 3) in [0, 255], labels int64 (N,) in 0..num_classes - 1, and their ids."""

    images: Tensor
    labels: Tensor
    ids: Sequence[str]
    num_classes: int


@dataclass(frozen=True)
class Session:
    """What a long computation may ask of its surroundings.

    `report(done, total, note)` is for people. `load` returns what an interrupted run gave to `save` last, or None;
    a fit that goes on from there gives the same result as one that never stopped. `save` is called at most once a
    round or epoch, and may choose not to store every state it is given. `denoiser` is what adp strong attacks.
    """

    device: torch.device
    report: Callable[[int, int, str], None]
    load: Callable[[], State | None]
    save: Callable[[State], None]
    denoiser: Denoiser | None = None


@dataclass(frozen=True)
class ClosedForm:
    """A poison that perturbs any batch at once.

    `perturb` takes (checked images, at least one; settings; seed) and returns float32 (B, H, W, 3) on [0, 1].
    """

    settings: type[PoisonSettings]
    perturb: Callable[[LabelledImages, Any, int], Tensor]


@dataclass(frozen=True)
class Optimised:
    """A poison that is fitted to the whole dataset, and then perturbs any part of it.

    `fit` takes (all images, settings, seed, session) and returns the state that every part needs. `perturb` takes
    (any images of the fit, state, settings, seed, device) and returns float32 (B, H, W, 3) on [0, 1], on the CPU.
    """

    settings: type[PoisonSettings]
    fit: Callable[[LabelledImages, Any, int, Session], State]
    perturb: Callable[[LabelledImages, State, Any, int, torch.device], Tensor]


def quiet_session(device: torch.device | str = "cpu") -> Session:
    """Return a session that reports and keeps nothing."""
    return Session(torch.device(device), lambda _done, _total, _note: None, lambda: None, lambda _state: None)


def id_keys(ids: Sequence[str]) -> Tensor:
    """Return int64 (N,): 63 bits of a hash of each id."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return torch.tensor([int.from_bytes(value, "little") >> 1 for value in digests], dtype=torch.int64)


def by_id(data: LabelledImages) -> LabelledImages:
    """Return the images in the order of their `id_keys`. Raises InputError for an id that occurs twice."""
    keys, order = id_keys(data.ids).sort(stable=True)
    ids = [data.ids[index] for index in order.tolist()]
    for place in torch.nonzero(keys.diff() == 0).flatten().tolist():
        raise InputError(f"ids {ids[place]} and {ids[place + 1]} cannot be told apart; rename one")
    return LabelledImages(data.images[order], data.labels[order], ids, data.num_classes)


def rows_of(keys: Tensor, ids: Sequence[str]) -> Tensor:
    """Return the place, int64 (B,), of each id in sorted `keys`. Raises InputError for one that is not there."""
    wanted = id_keys(ids)
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    for index in torch.nonzero(keys[places] != wanted).flatten().tolist():
        raise InputError(f"image {ids[index]} was not there when the poison was fitted; fit it on all images")
    return places


def in_batches(data: LabelledImages, size: int) -> Iterator[LabelledImages]:
    """Yield the images `size` at a time, in order."""
    for first in range(0, len(data.ids), size):
        part = slice(first, first + size)
        yield LabelledImages(data.images[part], data.labels[part], data.ids[part], data.num_classes)


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """Return uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [0, 1] on `device`, in channels-last memory."""
    return images.to(device).permute(0, 3, 1, 2).float() / 255


def to_images(values: Tensor) -> Tensor:
    """Return float (B, 3, H, W) as contiguous float32 (B, H, W, 3) on the CPU."""
    return values.detach().permute(0, 2, 3, 1).float().cpu().contiguous()
