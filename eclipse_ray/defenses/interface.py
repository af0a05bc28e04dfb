"""What a rival defense is: a transform of the stored images, an augmentation, a training procedure, or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from eclipse_ray.config import CompensationConfig, Config, DefenseConfig, PurifyConfig, validated
from eclipse_ray.diffusion.network import Denoiser
from eclipse_ray.diffusion.noise import check_labelled
from eclipse_ray.victims.training import Augmentation


class DefenseSettings(BaseModel):
    """The settings of a defense; the file of each defense derives its own. Defaults are the published numbers."""

    model_config = ConfigDict(extra="ignore", frozen=True, validate_default=True, allow_inf_nan=False)

    @classmethod
    def of(cls, config: DefenseConfig) -> Self:
        """Return this defense's part of the section `defense`. Raises ConfigError for a value out of range."""
        return validated(cls, config.model_extra or {}, "defense")


@dataclass(frozen=True)
class Material:
    """What a defense may use: the poisoned set, and the denoiser fitted on the sparse clean set.

    `images` are uint8 (N, H, W, 3) on the CPU, `labels` int64 (N,) from 0, `ids` one name for each image.
    `denoiser` is used as it is: on its device, with its precision. `purify` and
    `compensation` are the run's own sections. `seed` keys every draw that ends in an image. `jpeg` stores uint8
    (N, H, W, 3) as JPEG of a quality of 1..100 and reads it again; it comes from outside, where Pillow is known.
    """

    images: Tensor
    labels: Tensor
    ids: Sequence[str]
    num_classes: int
    denoiser: Denoiser | None
    purify: PurifyConfig
    compensation: CompensationConfig
    seed: int
    device: torch.device
    jpeg: Callable[[Tensor, int], Tensor]

    def __post_init__(self) -> None:
        """Raise InputError unless images, labels and ids form one labelled set."""
        check_labelled(self.images, self.labels, self.ids)


Transform = Callable[[Material, DefenseConfig], Tensor]
"""The training images to store instead: uint8 (N, H, W, 3), or (D, N, H, W, 3) of which each epoch draws one."""


@dataclass(frozen=True)
class Defense:
    """One defense or several combined; a part that is None or False is left out.

    `augmentation` works on the victim's batches, after crop, flip and compensation. `compensation` is what the
    victim's loader adds. `privacy` trains by DP-SGD. `dilution` appends the labelled sparse clean set.
    `settings` declares the settings of its own.
    """

    transform: Transform | None = None
    augmentation: Callable[[DefenseConfig], Augmentation] | None = None
    compensation: Callable[[Config], CompensationConfig] | None = None
    privacy: bool = False
    dilution: bool = False
    settings: type[DefenseSettings] | None = None


def apply_transform(transform: Transform, material: Material, images: Tensor, config: DefenseConfig) -> Tensor:
    """Return `transform` of `images`, uint8 (N, H, W, 3), or of each of several draws (D, N, H, W, 3) of them."""
    if images.ndim == 5:
        return torch.stack([transform(replace(material, images=draw), config) for draw in images])
    return transform(replace(material, images=images), config)
