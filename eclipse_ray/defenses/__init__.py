"""Rival defenses and our own, by name, and their combinations (docs/defenses.md says where each comes from)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pydantic import create_model
from torch import Generator, Tensor, nn

from eclipse_ray.config import DefenseConfig, validated
from eclipse_ray.defenses import simple as iss
from eclipse_ray.defenses.adversarial import Aa, At, adversarial_training, ueraser, ueraser_max
from eclipse_ray.defenses.eclipse import Avatar, Draws, avatar, compensate, purify, purify_and_bake, purify_draws
from eclipse_ray.defenses.interface import Defense, DefenseSettings, Material, Transform, apply_transform
from eclipse_ray.defenses.op import Op, project, strong_augmentation
from eclipse_ray.defenses.simple import Cutout, DpSgd, IssJ, cutmix, cutout, mixup
from eclipse_ray.errors import ConfigError, unknown
from eclipse_ray.victims.training import Augmentation

DEFENSES: dict[str, Defense] = {
    "none": Defense(),
    "eclipse": Defense(transform=purify, compensation=compensate(coarse=True)),
    "eclipse-baked": Defense(transform=purify_and_bake),
    "eclipse-published": Defense(transform=purify, compensation=compensate()),
    "eclipse-draws": Defense(transform=purify_draws, compensation=compensate(coarse=True), settings=Draws),
    "eclipse-a": Defense(transform=purify),
    "eclipse-b": Defense(compensation=compensate(noise=False)),
    "eclipse-c": Defense(compensation=compensate(gray=False)),
    "eclipse-ab": Defense(transform=purify, compensation=compensate(noise=False)),
    "eclipse-ac": Defense(transform=purify, compensation=compensate(gray=False)),
    "eclipse-bc": Defense(compensation=compensate()),
    "cutout": Defense(augmentation=cutout, settings=Cutout),
    "mixup": Defense(augmentation=mixup),
    "cutmix": Defense(augmentation=cutmix),
    "dp-sgd": Defense(privacy=True, settings=DpSgd),
    "iss-g": Defense(transform=iss.gray),
    "iss-j": Defense(transform=iss.jpeg, settings=IssJ),
    "aa": Defense(augmentation=ueraser, settings=Aa),
    "aa-max": Defense(augmentation=ueraser_max, settings=Aa),
    "op": Defense(transform=project, augmentation=strong_augmentation, settings=Op),
    "op-projection": Defense(transform=project, settings=Op),
    "op-augmentation": Defense(augmentation=strong_augmentation, settings=Op),
    "avatar-sparse": Defense(transform=purify),
    "avatar": Defense(transform=avatar, settings=Avatar),
    "at": Defense(augmentation=adversarial_training, settings=At),
    "dilution": Defense(dilution=True),
}
"""Every defense by name; `combine` also takes several, joined by "+"."""

PURIFICATIONS: tuple[Transform, ...] = (purify, purify_and_bake, purify_draws, avatar)
"""Transforms that draw noise keyed by (seed, id, t): a second one would use the same numbers again."""

CHOOSING = (ueraser, ueraser_max)
"""Augmentations of which one alone can have the last word."""


def defense_settings() -> dict[str, type[DefenseSettings]]:
    """Return the settings of every defense that has some, by its name; variants of a defense share a class."""
    return {name: one.settings for name, one in DEFENSES.items() if one.settings is not None}


# The fields of the last base come first, and settings are written in the order of DEFENSES.
_BASES = tuple(reversed(dict.fromkeys(defense_settings().values())))
_Every = create_model("_Every", __base__=_BASES, __cls_kwargs__={"extra": "forbid"})


def resolved_defense(config: DefenseConfig) -> DefenseConfig:
    """Return `config` with every setting of every defense written out.

    Raises ConfigError for a setting that no defense has, naming the nearest, and for a value out of range.
    """
    every = validated(_Every, config.model_extra or {}, "defense")
    return DefenseConfig.model_validate(every.model_dump(mode="json"))


def combine(name: str) -> Defense:
    """Return the defense `name`, or several as one: "eclipse+aa".

    Transforms apply from left to right, then augmentations of a batch from left to right; the other parts add up.
    Raises ConfigError for an unknown name, a defense named twice, and two that do the same: purify, compensate,
    train with privacy, choose among augmentations, or share a part.
    """
    names = name.split("+")
    parts = [_find(part) for part in names]
    if len(parts) == 1:
        return parts[0]
    if len(set(names)) < len(names):
        raise ConfigError(f"the defense {name} names one twice; leave one out")
    _check(name, parts)
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
    raise ConfigError(f"the defense {name!r} {unknown(name, DEFENSES)}")


def _check(name: str, parts: list[Defense]) -> None:
    """Refuse combinations in which one part undoes or repeats another."""
    transforms = [part.transform for part in parts if part.transform]
    augmentations = [part.augmentation for part in parts if part.augmentation]
    compensates = [part for part in parts if part.compensation or part.transform is purify_and_bake]
    reasons = {
        "two of them purify": sum(transform in PURIFICATIONS for transform in transforms) > 1,
        "two of them compensate": len(compensates) > 1,
        "two of them train with privacy": sum(part.privacy for part in parts) > 1,
        "two of them keep the worst of several draws": sum(one in CHOOSING for one in augmentations) > 1,
        "two of them share a part": len(set(transforms)) < len(transforms)
        or len(set(augmentations)) < len(augmentations),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"the defense {name} cannot be combined: {reason}; leave one out")


def _transform_all(transforms: tuple[Transform, ...], material: Material, config: DefenseConfig) -> Tensor:
    images = material.images
    for transform in transforms:
        images = apply_transform(transform, material, images, config)
    return images


def _augment_all(
    builders: tuple[Callable[[DefenseConfig], Augmentation], ...], config: DefenseConfig
) -> Augmentation:
    """Return the augmentations that `builders` make, as one."""
    chain = [build(config) for build in builders]

    def augment(
        images: Tensor, targets: Tensor, model: nn.Module, generator: Generator, progress: float
    ) -> tuple[Tensor, Tensor]:
        for augmentation in chain:
            images, targets = augmentation(images, targets, model, generator, progress)
        return images, targets

    return augment
