"""REM: robust error-minimising noise (Fu et al., arXiv 2203.14533).

Noise that a classifier learns instead of the images even if it trains adversarially: the loss is minimised under
an adversary of a smaller radius, which maximises it, and averaged over random crops and flips. Network and noise
are fitted together; the noise that is kept is then made anew for every image against the finished network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eclipse_ray.attacks import Crops, crop_flip, draw_crops, frozen, keyed_crops
from eclipse_ray.config import PoisonConfig
from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.poisons.budget import REM_T
from eclipse_ray.poisons.optimised import (
    LabelledImages,
    Session,
    State,
    by_id,
    in_batches,
    to_float,
    to_images,
)
from eclipse_ray.poisons.surrogate import (
    Training,
    attack_from,
    batch_at,
    keyed_generator,
    load_surrogate,
    needed,
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


def fit_rem(data: LabelledImages, config: PoisonConfig, seed: int, session: Session) -> State:
    """Train the network that robust noise is made against, on noise made for every batch, and return it.

    A step makes noise for its batch, rounds it to 8 bits, crops and flips, lets the adversary attack, and trains.
    """
    data, steps = by_id(data), needed(config.train_steps)
    training = start_training(new_surrogate(config, data.num_classes, seed, session.device), config)
    first = 0
    if (saved := session.load()) is not None:
        first = int(saved["training.step"])
        training.restore(saved)
    losses: list[Tensor] = []
    for step in range(first, steps):
        rows = batch_at(seed, step, len(data.ids), needed(config.surrogate_batch_size))
        losses.append(_train_step(training, data, rows, config, seed, step, session.device))
        if (step + 1) % ROUND == 0 or step + 1 == steps:
            session.save({**training.state(), "training.step": torch.tensor(step + 1)})
            session.report(step + 1, steps, f"loss under attack {float(torch.stack(losses).mean()):.3f}")
            losses.clear()
    return surrogate_state(training.model, 0)


def perturb_rem(
    data: LabelledImages, state: State, config: PoisonConfig, seed: int, device: torch.device
) -> Tensor:
    """Return the noise, float32 (B, H, W, 3) on [0, 1], of any images; draws are keyed by (seed, image id)."""
    model = load_surrogate(state, 0, config, data.num_classes, device)
    draws = needed(config.steps) * needed(config.eot_draws)
    made = []
    for part in in_batches(data, needed(config.perturb_batch_size)):
        images = to_float(part.images, device)
        crops = keyed_crops(seed, part.ids, REM_T, draws, needed(config.crop_padding))
        unit = _keyed_unit(seed, part.ids, images)
        made.append(to_images(min_max_noise(model, images, part.labels.to(device), config, crops, unit)))
    return torch.cat(made)


def adversary(model: nn.Module, images: Tensor, labels: Tensor, config: PoisonConfig, unit: Tensor) -> Tensor:
    """Return images (B, 3, H, W in [0, 1]) moved within adversary_eps_255 to raise the cross-entropy (sign-PGD).

    `unit`, of the same shape and range, places the start in the adversary's box. The model is in evaluation mode.
    """
    return images + attack_from(model, images, labels, config, unit)


def min_max_noise(
    model: nn.Module, images: Tensor, labels: Tensor, config: PoisonConfig, crops: Sequence[Crops], unit: Unit
) -> Tensor:
    """Return noise (B, 3, H, W) within eps_255 that lowers the cross-entropy which the adversary then raises.

    Each of `steps` sign steps sums, over `eot_draws` crops, the gradient at the point that the adversary found
    near the cropped image, taken back to the noise as if that point moved along with the crop. `crops` holds steps
    times eot_draws of them. The model is in evaluation mode and asks for no gradients of its weights.
    """
    bound, size = needed(config.eps_255) / 255, needed(config.step_size_255) / 255
    draws, padding = needed(config.eot_draws), needed(config.crop_padding)
    delta = (2 * unit(0) - 1) * bound
    for step in range(needed(config.steps)):
        total = torch.zeros_like(delta)
        for slot in range(step * draws, (step + 1) * draws):
            at = delta.requires_grad_(True)
            seen = crop_flip((images + at).clamp(0, 1), crops[slot], padding)
            worst = adversary(model, seen.detach(), labels, config, unit(1 + slot)).requires_grad_(True)
            loss = F.cross_entropy(classify(model, worst), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, worst)
            total += torch.autograd.grad(seen, at, gradient)[0]
        delta = (delta.detach() - size * total.sign()).clamp(-bound, bound)
    return delta


def _train_step(
    training: Training,
    data: LabelledImages,
    rows: Tensor,
    config: PoisonConfig,
    seed: int,
    step: int,
    device: torch.device,
) -> Tensor:
    images, labels = to_float(data.images[rows], device), data.labels[rows].to(device)
    draws, padding = needed(config.steps) * needed(config.eot_draws), needed(config.crop_padding)
    generator = keyed_generator(seed, "rem crops", step)
    crops = [draw_crops(len(rows), padding, generator) for _ in range(draws + 1)]

    def unit(slot: int) -> Tensor:
        return torch.rand(images.shape, generator=keyed_generator(seed, "rem", step, slot)).to(device)

    with frozen(training.model):
        noise = min_max_noise(training.model, images, labels, config, crops[:draws], unit)
        stored = (images + (noise * 255).round() / 255).clamp(0, 1)
        attacked = adversary(
            training.model, crop_flip(stored, crops[draws], padding), labels, config, unit(1 + draws)
        )
    rate = rate_at(config, step, needed(config.train_steps))
    return training.step(attacked, labels, rate, needed(config.max_grad_norm))


def _keyed_unit(seed: int, ids: Sequence[str], images: Tensor) -> Unit:
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    return lambda slot: uniform(seed, ids, REM_T + 1 + slot, shape, images.device).float()
