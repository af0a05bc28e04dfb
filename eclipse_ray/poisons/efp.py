"""EFP: entangled features (Wen et al., "Is Adversarial Training Really a Silver Bullet ...", ICLR 2023).

Noise that takes an image's features, as an adversarially trained network sees them, away from the centroid of its
own class (`push`) or towards the nearest centroid of another (`pull`), so that classes overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.attacks import Objective, crop_flip, keyed_crops, pgd
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.errors import InputError
from eclipse_ray.poisons.interface import (
    EFP_T,
    LabelledImages,
    Session,
    State,
    by_id,
    in_batches,
    to_float,
    to_images,
)
from eclipse_ray.poisons.surrogate import (
    EVALUATION_BATCH,
    SMALL,
    AdversarySettings,
    TrainedSettings,
    features,
    load_surrogate,
    train_surrogate,
)


class Efp(TrainedSettings, AdversarySettings):
    """The settings of efp."""

    numbers: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {"surrogate_schedule": "milestones", "surrogate_milestones": (75, 90)}
        | {"surrogate_epochs": 100, "steps": 300, "step_size_255": 0.4},
        "reduced": SMALL
        | {"surrogate_schedule": "milestones", "surrogate_milestones": (15, 18)}
        | {"surrogate_epochs": 20, "adversary_steps": 3, "steps": 60, "step_size_255": 0.8},
    }

    variant: Literal["push", "pull"] = Field("push", description="Away from the own class, or towards another.")


@torch.no_grad()
def class_means(model: nn.Module, data: LabelledImages, device: torch.device) -> Tensor:
    """Return the mean features, float32 (num_classes, F) on the CPU, of the images of each class.

    The model is in evaluation mode. Raises InputError for a class without images.
    """
    counts = torch.bincount(data.labels, minlength=data.num_classes)
    if int(counts.min()) == 0:
        raise InputError(
            f"class {int(counts.argmin())} of {data.num_classes} has no images, so no mean feature; this poison "
            "needs images of every class"
        )
    data = by_id(data)
    values = torch.cat(
        [features(model, to_float(part, device)).cpu() for part in torch.split(data.images, EVALUATION_BATCH)]
    )
    sums = torch.zeros(data.num_classes, values.shape[1]).index_add_(0, data.labels, values)
    return sums / counts[:, None]


def fit_efp(data: LabelledImages, settings: Efp, seed: int, session: Session) -> State:
    """Train a network adversarially on clean images; return it and "centroids", its mean features (K, F)."""
    state = train_surrogate(data, settings, seed, session, adversary=settings)
    model = load_surrogate(state, 0, settings, data.num_classes, session.device)
    return {**state, "centroids": class_means(model, data, session.device)}


def perturb_efp(data: LabelledImages, state: State, settings: Efp, seed: int, device: torch.device) -> Tensor:
    """Return the noise, float32 (B, H, W, 3) on [0, 1], of any images; draws are keyed by (seed, image id).

    Sign steps from N(0, eps) clipped to the bound; every step sees another crop and flip.
    """
    model = load_surrogate(state, 0, settings, data.num_classes, device)
    centroids, bound = state["centroids"].to(device), settings.eps_255 / 255
    made = []
    for part in in_batches(data, settings.perturb_batch_size):
        images = to_float(part.images, device)
        start = (noise(seed, part.ids, EFP_T, tuple(images.shape[1:]), device) * bound).clamp(-bound, bound)
        objective = _cropped_loss(model, part.labels.to(device), centroids, settings, seed, part.ids)
        step_size = settings.step_size_255 / 255
        made.append(to_images(pgd(images, objective, bound, step_size, settings.steps, start=start)))
    return torch.cat(made)


def push_loss(values: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Return minus the mean squared distance of features (B, F) to the centroid of their own class, (B,)."""
    return -(values - centroids[labels]).square().mean(1)


def pull_loss(values: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Return the mean squared distance of features (B, F) to the nearest centroid of another class, (B,)."""
    distances = (values[:, None] - centroids[None]).square().mean(2)
    own = torch.nn.functional.one_hot(labels, len(centroids)).bool()
    return distances.masked_fill(own, torch.inf).amin(1)


def _cropped_loss(
    model: nn.Module, labels: Tensor, centroids: Tensor, settings: Efp, seed: int, ids: Sequence[str]
) -> Objective:
    padding = settings.crop_padding
    crops = keyed_crops(seed, ids, EFP_T + 1, settings.steps, padding)
    loss = pull_loss if settings.variant == "pull" else push_loss

    def objective(images: Tensor, step: int) -> Tensor:
        return loss(features(model, crop_flip(images, crops[step], padding)), labels, centroids)

    return objective
