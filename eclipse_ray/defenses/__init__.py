"""Rival defenses and our own, by name, and their combinations (docs/defenses.md says where each comes from)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import Generator, Tensor, nn

from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses import iss
from eclipse_ray.defenses.aa import ueraser, ueraser_max
from eclipse_ray.defenses.at import adversarial_training
from eclipse_ray.defenses.avatar import avatar
from eclipse_ray.defenses.cutout import cutout
from eclipse_ray.defenses.eclipse import compensate, purify, purify_and_bake, purify_draws
from eclipse_ray.defenses.interface import Defense, Material, Transform, apply_transform
from eclipse_ray.defenses.mixing import cutmix, mixup
from eclipse_ray.defenses.op import project, strong_augmentation
from eclipse_ray.errors import ConfigError
from eclipse_ray.victims.training import Augmentation

__all__ = ["DEFENSES", "Defense", "Material", "Transform", "combine"]

DEFENSES: dict[str, Defense] = {
    "none": Defense(),
    "eclipse": Defense(transform=purify, compensation=compensate(coarse=True)),
    "eclipse-baked": Defense(transform=purify_and_bake),
    "eclipse-published": Defense(transform=purify, compensation=compensate()),
    "eclipse-draws": Defense(transform=purify_draws, compensation=compensate(coarse=True)),
    "eclipse-a": Defense(transform=purify),
    "eclipse-b": Defense(compensation=compensate(noise=False)),
    "eclipse-c": Defense(compensation=compensate(gray=False)),
    "eclipse-ab": Defense(transform=purify, compensation=compensate(noise=False)),
    "eclipse-ac": Defense(transform=purify, compensation=compensate(gray=False)),
    "eclipse-bc": Defense(compensation=compensate()),
    "cutout": Defense(augmentation=cutout),
    "mixup": Defense(augmentation=mixup),
    "cutmix": Defense(augmentation=cutmix),
    "dp-sgd": Defense(privacy=True),
    "iss-g": Defense(transform=iss.gray),
    "iss-j": Defense(transform=iss.jpeg),
    "aa": Defense(augmentation=ueraser),
    "aa-max": Defense(augmentation=ueraser_max),
    "op": Defense(transform=project, augmentation=strong_augmentation),
    "op-projection": Defense(transform=project),
    "op-augmentation": Defense(augmentation=strong_augmentation),
    "avatar-sparse": Defense(transform=purify),
    "avatar": Defense(transform=avatar),
    "at": Defense(augmentation=adversarial_training),
    "dilution": Defense(dilution=True),
}
"""Every defense by name; `combine` also takes several, joined by "+"."""

PURIFICATIONS: tuple[Transform, ...] = (purify, purify_and_bake, purify_draws, avatar)
"""Transforms that draw noise keyed by (seed, id, t): a second one would use the same numbers again."""


def combine(name: str) -> Defense:
    """Return the defense `name`, or several as one: "eclipse+aa".

    Transforms apply from left to right, then augmentations of a batch from left to right; the other parts add up.
    Raises ConfigError for an unknown name, a defense named twice, two purifications, two compensations, and dp-sgd
    with adversarial training, whose gradients it would have to clip too.
    """
    names = name.split("+")
    parts = [_find(part) for part in names]
    if len(parts) == 1:
        return parts[0]
    _check(name, names, parts)
    transforms = [part.transform for part in parts if part.transform]
    builders = [part.augmentation for part in parts if part.augmentation]
    return Defense(
        transform=partial(_transform_all, tuple(transforms)) if transforms else None,
        augmentation=partial(_augment_all, tuple(builders)) if builders else None,
        compensation=next((part.compensation for part in parts if part.compensation), None),
        privacy=any(part.privacy for part in parts),
        dilution=any(part.dilution for part in parts),
    )


def _find(name: str) -> Defense:
    if name in DEFENSES:
        return DEFENSES[name]
    close = difflib.get_close_matches(name, DEFENSES, n=1, cutoff=0.0)
    raise ConfigError(f"the defense {name!r} is unknown; did you mean {close[0]}? There are: {', '.join(DEFENSES)}")


def _check(name: str, names: list[str], parts: list[Defense]) -> None:
    """Refuse combinations whose parts undo each other or cannot run together."""
    reasons = {
        "a defense is named twice": len(set(names)) < len(names),
        "two of them purify": sum(part.transform in PURIFICATIONS for part in parts) > 1,
        "two of them compensate": sum(
            part.compensation is not None or part.transform is purify_and_bake for part in parts
        )
        > 1,
        "two of them train with privacy": sum(part.privacy for part in parts) > 1,
        "dp-sgd clips the gradients of images one by one, and at needs gradients of its own": any(
            part.privacy for part in parts
        )
        and any(part.augmentation is adversarial_training for part in parts),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"the defense {name} cannot be combined: {reason}; leave one out")


def _transform_all(transforms: tuple[Transform, ...], material: Material, config: DefenseConfig) -> Tensor:
    images = material.images
    for transform in transforms:
        images = apply_transform(transform, material, images, config)
    return images


def _augment_all(builders: tuple[Callable[[DefenseConfig], Augmentation], ...], config: DefenseConfig) -> Augmentation:
    """Return the augmentations that `builders` make, as one."""
    chain = [build(config) for build in builders]

    def augment(
        images: Tensor, targets: Tensor, model: nn.Module, generator: Generator, progress: float
    ) -> tuple[Tensor, Tensor]:
        for augmentation in chain:
            images, targets = augmentation(images, targets, model, generator, progress)
        return images, targets

    return augment
