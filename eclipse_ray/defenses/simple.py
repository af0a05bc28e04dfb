"""Defenses of a few lines: Cutout, MixUp and CutMix by kornia, gray and JPEG images; and the wrapper of kornia.

kornia draws from torch's global generators alone (neither Python's nor NumPy's), so a seed that is drawn from ours
makes it repeatable. The global state is put back afterwards. kornia needs torch and kornia_rs, and no torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.config import DefenseConfig, PrivacyConfig
from eclipse_ray.defenses.interface import DefenseSettings, Material
from eclipse_ray.errors import ConfigError
from eclipse_ray.victims.training import Augmentation

LUMA_65536 = (19595, 38470, 7471)
"""ITU-R 601 weights of red, green and blue as Pillow rounds them, in 1/65536; they add up to one."""


def augmentations(defense: str) -> ModuleType:
    """Return kornia.augmentation. Raises ConfigError, naming the defense that needs it, if it is not installed."""
    try:
        import kornia.augmentation
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the defense {defense} needs kornia ({error}); install it with: pip install 'eclipse-ray[defenses]'"
        ) from None
    return kornia.augmentation


def seeded(module: Callable[[Tensor], Any], images: Tensor, generator: torch.Generator) -> Any:
    """Return `module(images)` with all of its draws decided by `generator`, which moves on by one draw.

    Images are float (B, 3, H, W) in [0, 1] on the generator's device. No other random numbers move.
    """
    seed = int(torch.randint(0, 2**63 - 1, (), generator=generator, device=generator.device))
    cuda = images.device.type == "cuda"
    with torch.random.fork_rng(devices=[images.device] if cuda else []), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(images.device):
                torch.cuda.manual_seed(seed)
        return module(images)


class Cutout(DefenseSettings):
    """The settings of cutout."""

    cutout_size: int = Field(16, ge=1, description="Side of the black square, in pixels.")


def cutout(config: DefenseConfig) -> Augmentation:
    """Return the augmentation that sets a square of `cutout_size` pixels inside each image to 0."""
    library, size = augmentations("cutout"), Cutout.of(config).cutout_size

    def augment(
        images: Tensor, targets: Tensor, _model: nn.Module, generator: torch.Generator, _progress: float
    ) -> tuple[Tensor, Tensor]:
        part = min(1.0, size**2 / (images.shape[2] * images.shape[3]))
        erase = library.RandomErasing(scale=(part, part), ratio=(1.0, 1.0), value=0.0, p=1.0)
        return seeded(erase, images, generator), targets

    return augment


def mixup(_config: DefenseConfig) -> Augmentation:
    """Return the augmentation w x[permuted] + (1 - w) x, of images and targets alike, with one w per batch."""
    return _mixed(augmentations("mixup").RandomMixUpV2(same_on_batch=True, data_keys=["input", "class"]))


def cutmix(_config: DefenseConfig) -> Augmentation:
    """Return the augmentation that pastes a rectangle of x[permuted] into x, the same rectangle for a whole batch.

    The rectangle has the proportions of the image and lies inside it. The target takes the other label with the
    share of pixels that were pasted.
    """
    module = augmentations("cutmix").RandomCutMixV2(
        same_on_batch=True, data_keys=["input", "class"], use_correct_lambda=True
    )
    return _mixed(module, own_first=True)


def _mixed(module: nn.Module, *, own_first: bool = False) -> Augmentation:
    """Return a module of kornia that mixes pairs as an augmentation of images and soft targets.

    kornia mixes numbers of classes. It is given places in the batch instead, and so says which two targets are
    mixed and with which weight: that of the other image, or that of the own one with `own_first`.
    """

    def augment(
        images: Tensor, targets: Tensor, _model: nn.Module, generator: torch.Generator, _progress: float
    ) -> tuple[Tensor, Tensor]:
        places = torch.arange(len(images), device=images.device)
        mixed, pairs = seeded(lambda batch: module(batch, places), images, generator)
        own, other, weight = pairs.reshape(-1, 3).unbind(1)
        share = (1 - weight if own_first else weight)[:, None]
        return mixed, (1 - share) * targets[own.long()] + share * targets[other.long()]

    return augment


def gray(material: Material, _config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), as ITU-R 601 luma on three channels, to the bit as Pillow does."""
    weighted = material.images.to(torch.int32) * torch.tensor(LUMA_65536, dtype=torch.int32)
    luma = (weighted.sum(dim=-1, keepdim=True) + 2**15) >> 16
    return luma.to(torch.uint8).expand(material.images.shape).contiguous()


class IssJ(DefenseSettings):
    """The settings of iss-j."""

    iss_jpeg_quality: int = Field(10, ge=1, le=100, description="Pillow's quality of JPEG.")


def jpeg(material: Material, config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), stored as JPEG of quality `iss_jpeg_quality` and read again."""
    return material.jpeg(material.images, IssJ.of(config).iss_jpeg_quality)


class DpSgd(DefenseSettings):
    """The settings of dp-sgd."""

    dp_max_grad_norm: float = Field(1.0, gt=0, description="The gradient of each image is cut to this norm.")
    dp_noise_multiplier: float = Field(0.01, ge=0, description="Deviation of the noise, in units of that norm.")


def privacy(config: DefenseConfig) -> PrivacyConfig:
    """Return what `train_victim` is given for a defense with `privacy`."""
    own = DpSgd.of(config)
    return PrivacyConfig(max_grad_norm=own.dp_max_grad_norm, noise_multiplier=own.dp_noise_multiplier)
