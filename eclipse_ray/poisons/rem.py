"""REM: robust error-minimising noise (Fu et al., arXiv 2203.14533).

Noise that a classifier learns instead of the images even if it trains adversarially: the loss is minimised under
an adversary of a smaller radius, which maximises it, and averaged over random crops and flips. Network and noise
are fitted together; the noise that is kept is then made anew for every image against the finished network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.attacks import Crops, crop_flip, draw_crops, frozen, keyed_crops
from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.poisons.interface import (
    REM_T,
    LabelledImages,
    Session,
    State,
    by_id,
    in_batches,
    to_float,
    to_images,
)
from eclipse_ray.poisons.surrogate import (
    SMALL,
    AdversarySettings,
    SurrogateSettings,
    Training,
    attack_from,
    batch_at,
    keyed_generator,
    load_surrogate,
    new_surrogate,
    rate_at,
    start_training,
    surrogate_state,
)
from eclipse_ray.victims.training import classify

ROUND = 20
"""Optimiser steps between two saved states: at full cost each takes seconds of a GPU."""

Unit = Callable[[int], Tensor]
"""From a slot to numbers in [0, 1] of the shape of a batch: slot 0 starts the noise, 1, 2, ... the adversary."""


class Rem(SurrogateSettings, AdversarySettings):
    """The settings of rem."""

    numbers: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {"surrogate_schedule": "milestones", "surrogate_milestones": (2000, 4000)}
        | {"steps": 10, "step_size_255": 1.6, "adversary_step_size_255": 0.8},
        "reduced": SMALL
        | {"surrogate_schedule": "milestones", "surrogate_milestones": (160, 320), "train_steps": 400}
        | {"steps": 4, "step_size_255": 3.0, "eot_draws": 1, "adversary_steps": 2, "adversary_step_size_255": 2.0},
    }

    scope: Literal["sample"] = Field("sample", description="One noise per image.")
    train_steps: int = Field(5000, ge=1, description="Optimiser steps.")
    crop_padding: int = Field(4, ge=0, description="Crops after padding by this many pixels.")
    eot_draws: int = Field(5, ge=1, description="Random crops and flips whose gradients a step adds up.")


def fit_rem(data: LabelledImages, settings: Rem, seed: int, session: Session) -> State:
    """Train the network that robust noise is made against, on noise made for every batch, and return it.

    A step makes noise for its batch, rounds it to 8 bits, crops and flips, lets the adversary attack, and trains.
    """
    data, steps = by_id(data), settings.train_steps
    training = start_training(new_surrogate(settings, data.num_classes, seed, session.device), settings)
    first = 0
    if (saved := session.load()) is not None:
        first = int(saved["training.step"])
        training.restore(saved)
    losses: list[Tensor] = []
    for step in range(first, steps):
        rows = batch_at(seed, step, len(data.ids), settings.surrogate_batch_size)
        images, labels = to_float(data.images[rows], session.device), data.labels[rows].to(session.device)
        losses.append(_train_step(training, images, labels, settings, seed, step))
        if (step + 1) % ROUND == 0 or step + 1 == steps:
            session.save({**training.state(), "training.step": torch.tensor(step + 1)})
            session.report(step + 1, steps, f"loss under attack {float(torch.stack(losses).mean()):.3f}")
            losses.clear()
    return surrogate_state(training.model, 0)


def perturb_rem(data: LabelledImages, state: State, settings: Rem, seed: int, device: torch.device) -> Tensor:
    """Return the noise, float32 (B, H, W, 3) on [0, 1], of any images; draws are keyed by (seed, image id)."""
    model = load_surrogate(state, 0, settings, data.num_classes, device)
    draws = settings.steps * settings.eot_draws
    made = []
    for part in in_batches(data, settings.perturb_batch_size):
        images = to_float(part.images, device)
        crops = keyed_crops(seed, part.ids, REM_T, draws, settings.crop_padding)
        unit = _keyed_unit(seed, part.ids, images)
        made.append(to_images(min_max_noise(model, images, part.labels.to(device), settings, crops, unit)))
    return torch.cat(made)


def min_max_noise(
    model: nn.Module, images: Tensor, labels: Tensor, settings: Rem, crops: Sequence[Crops], unit: Unit
) -> Tensor:
    """Return noise (B, 3, H, W) within eps_255 that lowers the cross-entropy which the adversary then raises.

    Each of `steps` sign steps sums, over `eot_draws` crops, the gradient at the point that the adversary found
    near the cropped image, taken back to the noise as if that point moved along with the crop. `crops` holds steps
    times eot_draws of them. The model is in evaluation mode and asks for no gradients of its weights.
    """
    bound, size = settings.eps_255 / 255, settings.step_size_255 / 255
    draws, padding = settings.eot_draws, settings.crop_padding
    delta = (2 * unit(0) - 1) * bound
    for step in range(settings.steps):
        total = torch.zeros_like(delta)
        for slot in range(step * draws, (step + 1) * draws):
            at = delta.requires_grad_(True)
            seen = crop_flip((images + at).clamp(0, 1), crops[slot], padding)
            still = seen.detach()
            worst = (still + attack_from(model, still, labels, settings, unit(1 + slot))).requires_grad_(True)
            loss = F.cross_entropy(classify(model, worst), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, worst)
            total += torch.autograd.grad(seen, at, gradient)[0]
        delta = (delta.detach() - size * total.sign()).clamp(-bound, bound)
    return delta


def _train_step(training: Training, images: Tensor, labels: Tensor, settings: Rem, seed: int, step: int) -> Tensor:
    draws, padding = settings.steps * settings.eot_draws, settings.crop_padding
    generator = keyed_generator(seed, "rem crops", step)
    crops = [draw_crops(len(images), padding, generator) for _ in range(draws + 1)]

    def unit(slot: int) -> Tensor:
        return torch.rand(images.shape, generator=keyed_generator(seed, "rem", step, slot)).to(images.device)

    with frozen(training.model):
        noise = min_max_noise(training.model, images, labels, settings, crops[:draws], unit)
        stored = (images + (noise * 255).round() / 255).clamp(0, 1)
        seen = crop_flip(stored, crops[draws], padding)
        attacked = seen + attack_from(training.model, seen, labels, settings, unit(1 + draws))
    rate = rate_at(settings, step, settings.train_steps)
    return training.step(attacked, labels, rate, settings.max_grad_norm)


def _keyed_unit(seed: int, ids: Sequence[str], images: Tensor) -> Unit:
    return lambda slot: uniform(seed, ids, REM_T + 1 + slot, tuple(images.shape[1:]), images.device).float()
