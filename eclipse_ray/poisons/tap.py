"""TAP: targeted adversarial poisons (Fowl et al., arXiv 2106.10807)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.attacks import Crops, Objective, crop_flip, keyed_crops, pgd
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.poisons.interface import TAP_T, LabelledImages, Session, State, in_batches, to_float, to_images
from eclipse_ray.poisons.surrogate import SMALL, TrainedSettings, load_surrogate, train_surrogate
from eclipse_ray.victims.training import classify

LINEAR = {"surrogate_schedule": "linear"}


class Tap(TrainedSettings):
    """The settings of tap."""

    numbers: ClassVar[dict[str, dict[str, Any]]] = {
        "full": LINEAR | {"surrogate_epochs": 40, "steps": 250, "step_size_255": 0.4},
        "reduced": SMALL | LINEAR | {"surrogate_epochs": 15, "steps": 40, "step_size_255": 1.0, "restarts": 1},
    }

    restarts: int = Field(8, ge=1, description="Starts, of which the one of lowest loss is kept.")
    target_shift: int = Field(1, ge=1, description="The target class is y + shift, modulo the number of classes.")


def fit_tap(data: LabelledImages, settings: Tap, seed: int, session: Session) -> State:
    """Train the surrogate on the clean images; the noise of an image needs nothing else of the others."""
    return train_surrogate(data, settings, seed, session)


def perturb_tap(data: LabelledImages, state: State, settings: Tap, seed: int, device: torch.device) -> Tensor:
    """Return float32 (B, H, W, 3) on [0, 1] that moves each image to class (y + target_shift) mod classes.

    `steps` sign steps down the cross-entropy to that class, through random crops and flips, from N(0, eps) clipped
    to the bound; of `restarts` such descents the image keeps the one with the lowest loss (uncropped). All
    draws are keyed by (seed, id). Keeping one restart a batch instead, by its mean loss, could only be weaker.
    """
    model = load_surrogate(state, 0, settings, data.num_classes, device)
    parts = in_batches(data, settings.perturb_batch_size)
    return torch.cat([_targeted(model, part, settings, seed, device) for part in parts])


def _targeted(model: nn.Module, data: LabelledImages, settings: Tap, seed: int, device: torch.device) -> Tensor:
    images, ids = to_float(data.images, device), data.ids
    target = ((data.labels + settings.target_shift) % data.num_classes).to(device)
    bound, padding, steps = settings.eps_255 / 255, settings.crop_padding, settings.steps
    best = torch.zeros_like(images)
    lowest = torch.full((len(ids),), torch.inf, device=device)

    def loss(values: Tensor) -> Tensor:
        return F.cross_entropy(classify(model, values), target, reduction="none")

    def through(crops: list[Crops]) -> Objective:
        return lambda values, step: loss(crop_flip(values, crops[step], padding))

    for restart in range(settings.restarts):
        slot = TAP_T + 2 * restart
        start = noise(seed, ids, slot, tuple(data.images.shape[1:])).permute(0, 3, 1, 2) * bound
        delta = pgd(
            images,
            through(keyed_crops(seed, ids, slot + 1, steps, padding)),
            bound,
            settings.step_size_255 / 255,
            steps,
            start=start.clamp(-bound, bound).to(device),
        )
        with torch.no_grad():
            reached = loss(images + delta)
        better = reached < lowest
        best = torch.where(better[:, None, None, None], delta, best)
        lowest = torch.where(better, reached, lowest)
    return to_images(best)
