"""SEP: self-ensemble protection (Chen et al., arXiv 2211.12005).

Targeted noise made against the checkpoints of one training run, whose gradients are nearly orthogonal to each
other. `plain` lowers the cross-entropy of a wrong class; `fa_vr` moves the features to that class's mean (feature
alignment) along variance-reduced gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.efp import class_means
from eclipse_ray.poisons.interface import LabelledImages, Session, State, in_batches, to_float, to_images
from eclipse_ray.poisons.surrogate import (
    SMALL,
    TrainedSettings,
    features,
    keyed_generator,
    load_surrogate,
    train_surrogate,
)
from eclipse_ray.victims.training import classify

Loss = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to the value to lower, summed over images so that none sees its batch."""


class Sep(TrainedSettings):
    """The settings of sep."""

    numbers: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {"surrogate_schedule": "milestones", "surrogate_milestones": (75, 90)}
        | {"surrogate_epochs": 120, "steps": 30, "step_size_255": 1.0},
        "reduced": SMALL
        | {"surrogate_schedule": "milestones", "surrogate_milestones": (15, 18)}
        | {"surrogate_epochs": 24, "steps": 12, "step_size_255": 2.0}
        | {"checkpoints": 6, "inner_draws": 4},
        "fa_vr": {"checkpoints": 15},
        "fa_vr reduced": {"checkpoints": 4},
    }

    variant: Literal["plain", "fa_vr"] = Field(
        "plain", description="plain: cross-entropy; fa_vr: features, less variance."
    )
    target_shift: int | None = Field(
        None, ge=1, description="The target class is y + shift, modulo the number of classes; null: half of them."
    )
    checkpoints: int = Field(30, ge=1, description="Networks taken from one training run.")
    inner_draws: int = Field(15, ge=1, description="fa_vr: checkpoints visited in a step.")


def fit_sep(data: LabelledImages, settings: Sep, seed: int, session: Session) -> State:
    """Train on clean images once and return `checkpoints` networks of that run, evenly spread over it.

    For fa_vr the state also holds "means", float32 (checkpoints, K, F): each network's mean features of a class.
    """
    targets(data.labels, settings, data.num_classes)
    state = train_surrogate(data, settings, seed, session, checkpoints=settings.checkpoints)
    if settings.variant == "fa_vr":
        networks = range(settings.checkpoints)
        models = (load_surrogate(state, index, settings, data.num_classes, session.device) for index in networks)
        state["means"] = torch.stack([class_means(model, data, session.device) for model in models])
    return state


def perturb_sep(data: LabelledImages, state: State, settings: Sep, seed: int, device: torch.device) -> Tensor:
    """Return the noise, float32 (B, H, W, 3) on [0, 1], of any images.

    Nothing is drawn but the order in which fa_vr visits networks, which is the same for every image.
    """
    models = [
        load_surrogate(state, index, settings, data.num_classes, device) for index in range(settings.checkpoints)
    ]
    made = []
    for part in in_batches(data, settings.perturb_batch_size):
        images, aim = to_float(part.images, device), targets(part.labels, settings, data.num_classes).to(device)
        if settings.variant == "fa_vr":
            losses = [
                _alignment(model, mean.to(device)[aim]) for model, mean in zip(models, state["means"], strict=True)
            ]
            noise = variance_reduced_noise(images, losses, settings, visits(settings, seed))
        else:
            noise = ensemble_noise(images, [_cross_entropy(model, aim) for model in models], settings)
        made.append(to_images(noise))
    return torch.cat(made)


def targets(labels: Tensor, settings: Sep, num_classes: int) -> Tensor:
    """Return the class each image is moved to: `target_shift` further on, or half the number of classes.

    Raises ConfigError for a shift that leads back to the image's own class.
    """
    shift = settings.target_shift or max(1, num_classes // 2)
    if shift % num_classes == 0:
        raise ConfigError(
            f"poison.target_shift {shift} leads back to the own class of {num_classes}; choose another"
        )
    return (labels + shift) % num_classes


def ensemble_noise(images: Tensor, losses: Sequence[Loss], settings: Sep) -> Tensor:
    """Return noise (B, 3, H, W): sign steps from zero against the mean gradient of all losses."""
    moved = images
    for _ in range(settings.steps):
        moved = _step(images, moved, mean_gradient(losses, moved), settings)
    return moved - images


def variance_reduced_noise(
    images: Tensor, losses: Sequence[Loss], settings: Sep, visited: Sequence[Sequence[int]]
) -> Tensor:
    """Return noise (B, 3, H, W) by sign steps against variance-reduced gradients.

    `visited` names the losses of each step's inner steps. An inner step adds to a sum the gradient at a scout
    point, less what that loss's gradient at the outer point differs from the mean there, and moves the scout
    against the sum's sign. The step itself then follows the sign of the whole sum.
    """
    moved = images
    for row in visited:
        outer = [gradient_of(loss, moved) for loss in losses]
        mean = torch.stack(outer).mean(0)
        scout, total = moved, torch.zeros_like(images)
        for index in row:
            total = total + gradient_of(losses[index], scout) - (outer[index] - mean)
            scout = _step(images, scout, total, settings)
        moved = _step(images, moved, total, settings)
    return moved - images


def visits(settings: Sep, seed: int) -> list[list[int]]:
    """Return the networks that each inner step of each step visits, (steps, inner_draws), drawn from the seed."""
    shape = (settings.steps, settings.inner_draws)
    drawn = torch.randint(settings.checkpoints, shape, generator=keyed_generator(seed, "sep visits"))
    rows: list[list[int]] = drawn.tolist()
    return rows


def mean_gradient(losses: Sequence[Loss], images: Tensor) -> Tensor:
    """Return the mean over the losses of their gradients at `images`, one network's graph in memory at a time."""
    total = torch.zeros_like(images)
    for loss in losses:
        total += gradient_of(loss, images)
    return total / len(losses)


def gradient_of(loss: Loss, images: Tensor) -> Tensor:
    """Return the gradient of `loss` at `images`, of their shape."""
    at = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(at), at)
    return gradient


def _step(images: Tensor, moved: Tensor, gradient: Tensor, settings: Sep) -> Tensor:
    bound, size = settings.eps_255 / 255, settings.step_size_255 / 255
    return (images + (moved - size * gradient.sign() - images).clamp(-bound, bound)).clamp(0, 1)


def _cross_entropy(model: nn.Module, aim: Tensor) -> Loss:
    return lambda images: F.cross_entropy(classify(model, images), aim, reduction="sum")


def _alignment(model: nn.Module, mean: Tensor) -> Loss:
    return lambda images: (features(model, images) - mean).square().mean(1).sum()
