"""What optimised poisons share: a fit over the whole dataset, then the perturbation of any part of it.

A fit sorts its images by a hash of their ids, so that its result depends on the set and not on its order, and
finds an image's own noise again by that hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eclipse_ray.config import PoisonConfig
from eclipse_ray.diffusion.network import Denoiser
from eclipse_ray.errors import InputError

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


Fit = Callable[[LabelledImages, PoisonConfig, int, Session], State]
"""(all images, resolved config, seed, session) to the state that every part of the dataset needs."""
Perturb = Callable[[LabelledImages, State, PoisonConfig, int, torch.device], Tensor]
"""(any images of the fit, state, resolved config, seed, device) to float32 (B, H, W, 3) on [0, 1], on the CPU."""


@dataclass(frozen=True)
class Optimised:
    """The two halves of an optimised poison."""

    fit: Fit
    perturb: Perturb


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


def to_levels(values: Tensor) -> Tensor:
    """Return perturbations on [0, 1] rounded to int8 levels of 1/255, which is what storage keeps of them."""
    return (values * 255).round().clamp(-127, 127).to(torch.int8)
