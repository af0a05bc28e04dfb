"""Orthogonal projection (Sandoval-Segura et al., arXiv 2305.19254): what a linear model learns is taken away.

A bias-free linear classifier is fitted to the poisoned images; the images are projected onto the orthogonal
complement of its weight rows. The public script trains its victim with strong augmentation besides, which is a
defense of its own: `op` has both, `op-projection` and `op-augmentation` one each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.interface import DefenseSettings, Material
from eclipse_ray.defenses.simple import augmentations, cutmix, seeded
from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.errors import InputError
from eclipse_ray.poisons.interface import class_id
from eclipse_ray.victims.training import Augmentation

WEIGHT_T = 2**30 + 16 * 2**16
"""Reserved timestep of the linear model's first weights, beyond those of every poison."""
ORDER_T = WEIGHT_T + 1
"""Reserved timestep of the order in which it sees the images."""


class Op(DefenseSettings):
    """The settings of op, op-projection and op-augmentation."""

    op_epochs: int = Field(20, ge=1, description="Epochs of the linear model.")
    op_learning_rate: float = Field(0.1, gt=0, description="Of the linear model.")
    op_batch_size: int = Field(1024, ge=1, description="Of the linear model.")
    op_rotation: float = Field(10.0, ge=0, description="Most degrees of rotation.")
    op_shear: float = Field(10.0, ge=0, description="Most degrees of shear.")
    op_scale: float = Field(0.2, ge=0, lt=1, description="Most change of scale.")
    op_jitter: float = Field(0.2, ge=0, le=1, description="Most change of brightness, contrast and saturation.")
    op_cutmix_p: float = Field(0.5, ge=0, le=1, description="Probability of CutMix for a batch.")


def project(material: Material, config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), without their part in the linear model's rows, clamped and rounded.

    Raises InputError if there are not more values in an image than classes.
    """
    if math.prod(material.images.shape[1:]) <= material.num_classes:
        raise InputError(f"{material.num_classes} linear rows leave nothing of {tuple(material.images.shape[1:])}")
    own = Op.of(config)
    weights = fit_linear(material, own)
    basis = torch.linalg.qr(F.normalize(weights.double(), dim=1).T).Q
    pieces = [remove(chunk, basis) for chunk in torch.split(material.images, own.op_batch_size)]
    return torch.cat([(piece * 255).round().clamp(0, 255).to(torch.uint8) for piece in pieces])


def remove(images: Tensor, basis: Tensor) -> Tensor:
    """Return uint8 `images` (B, H, W, 3) on [0, 1], less their part in the columns of `basis`, float64 (H W 3, K).

    The columns are orthonormal. The result is float64 on the CPU, not clamped.
    """
    flat = images.to(basis.device).flatten(1).double() / 255
    return (flat - (flat @ basis) @ basis.T).view(images.shape).cpu()


def fit_linear(material: Material, settings: Op) -> Tensor:
    """Return the rows, float32 (K, H W 3), of a linear classifier of images on [0, 1], on material.device.

    Plain SGD, learning rate divided by 10 after half and after three quarters of the epochs, as in the public
    code. The first weights and the order of the images, the same in every epoch, are keyed by the seed.
    """
    images, device = material.images.flatten(1), material.device
    width = images.shape[1]
    classes = [class_id(label) for label in range(material.num_classes)]
    first = (2 * uniform(material.seed, classes, WEIGHT_T, (width,)) - 1) / math.sqrt(width)
    weights = first.float().to(device).requires_grad_(True)
    order = uniform(material.seed, material.ids, ORDER_T, (1,))[:, 0].argsort()
    optimizer = torch.optim.SGD([weights], lr=settings.op_learning_rate)
    milestones = [max(1, settings.op_epochs // 2), max(1, settings.op_epochs * 3 // 4)]
    for epoch in range(settings.op_epochs):
        falls = sum(epoch >= milestone for milestone in milestones)
        optimizer.param_groups[0]["lr"] = settings.op_learning_rate * 0.1**falls
        for rows in torch.split(order, settings.op_batch_size):
            batch, target = images[rows].to(device).float() / 255, material.labels[rows].to(device)
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(batch @ weights.T, target))
            optimizer.step()
    return weights.detach()


def strong_augmentation(config: DefenseConfig) -> Augmentation:
    """Return what the public script bundles: rotation, shear and scale, colour jitter, CutMix half of the time.

    By kornia. There it comes before crop and flip, here after them. Raises ConfigError if kornia is not installed.
    """
    library, own = augmentations("op"), Op.of(config)
    module: nn.Module = library.AugmentationSequential(
        library.RandomRotation(own.op_rotation, resample="nearest", p=1.0),
        library.RandomAffine(
            0.0, shear=own.op_shear, scale=(1 - own.op_scale, 1 + own.op_scale), resample="nearest", p=1.0
        ),
        library.ColorJitter(own.op_jitter, own.op_jitter, own.op_jitter, 0.0, p=1.0),
    )
    mix = cutmix(config)

    def augment(
        images: Tensor, targets: Tensor, model: nn.Module, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, Tensor]:
        changed = seeded(module.to(images.device), images, generator).clamp(0, 1)
        if float(torch.rand((), generator=generator, device=generator.device)) < own.op_cutmix_p:
            changed, targets = mix(changed, targets, model, generator, progress)
        return changed, targets

    return augment
