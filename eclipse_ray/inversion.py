"""Inverted poison: what a poisoned set taught a network, put onto trusted images whose clean version is known.

A surrogate that is trained on a poisoned set learns the shortcut. A trusted image that is moved until the
surrogate sees a random class has features of the poison. From such pairs a denoiser learns to remove them. No
label of the trusted images is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eclipse_ray.attacks import pgd
from eclipse_ray.diffusion.training import worker_slice
from eclipse_ray.poisons.interface import LabelledImages, Session, State
from eclipse_ray.poisons.surrogate import SMALL, TrainedSettings, keyed_generator, load_surrogate, train_surrogate
from eclipse_ray.victims.training import classify

# None of these is a setting.
SURROGATES = 2
"""Networks, which take turns. Two cores or GPUs fit them in the time of one."""
SURROGATE_STEPS = 1000
"""Most optimiser steps of a surrogate. Shortcuts are learned early, so a larger set needs no more."""
STEPS = 5
"""Sign steps of an inversion."""
STEP = 0.4
"""Size of a step, as a part of the bound: two and a half steps reach it."""
LOWEST_255, HIGHEST_255 = 8.0, 20.0
"""The L-inf bound of each batch is drawn between these, in 1/255.

Larger than that of most poisons: under the noise, what is small would cost the denoiser next to nothing to keep.
"""
UNTOUCHED = 4
"""One image in this many is not moved, so that clean images are not changed."""
METHOD: dict[str, Any] = {
    "version": 3,
    "surrogates": SURROGATES,
    "surrogate_steps": SURROGATE_STEPS,
    "steps": STEPS,
    "step": STEP,
    "eps_255": [LOWEST_255, HIGHEST_255],
    "untouched": 1 / UNTOUCHED,
}
"""What fingerprints and keys contain; `version` is increased when the code changes the result."""


def surrogate_settings(images: int, iterations: int) -> TrainedSettings:
    """Return how a surrogate is trained on `images` images, in no more than the denoiser's `iterations` steps."""
    size = int(SMALL["surrogate_batch_size"])
    epochs = max(1, min(SURROGATE_STEPS, iterations) * size // max(images, size))
    return TrainedSettings(
        **SMALL,
        surrogate_schedule="linear",
        surrogate_epochs=epochs,
        steps=STEPS,
        step_size_255=STEP * HIGHEST_255,
    )


def fit_surrogate(suspicious: LabelledImages, iterations: int, seed: int, session: Session) -> State:
    """Return the weights of one surrogate trained on the suspicious images, as network 0 of the state."""
    settings = surrogate_settings(len(suspicious.ids), iterations)
    return train_surrogate(suspicious, settings, seed, session)


def open_surrogate(state: State, num_classes: int, device: torch.device) -> nn.Module:
    """Return the network of `fit_surrogate`, in evaluation mode and without gradients of its weights."""
    return load_surrogate(state, 0, surrogate_settings(1, 1), num_classes, device)


def invert(surrogate: nn.Module, images: Tensor, targets: Tensor, bound: float | Tensor) -> Tensor:
    """Return the perturbation (B, 3, H, W) within L-inf `bound` that makes the surrogate see `targets` (B,).

    `images` are (B, 3, H, W) in [0, 1], and so is their sum with the perturbation. `bound` is one number, or
    (B, 1, 1, 1). The surrogate is as `open_surrogate` returns it.
    """

    def loss(moved: Tensor, _step: int) -> Tensor:
        return F.cross_entropy(classify(surrogate, moved), targets, reduction="none")

    return pgd(images, loss, bound, STEP * bound, STEPS)


@dataclass(frozen=True)
class Inversion:
    """Perturbs the batches of a training of the denoiser.

    Surrogates, bounds and classes are drawn for the whole batch from (seed, iteration), and each worker takes its
    slice, so the perturbations do not depend on the number of workers.
    """

    surrogates: Sequence[nn.Module]
    num_classes: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __call__(self, batches: Sequence[Tensor], first: int) -> list[Tensor]:
        """Return the perturbations of this worker's slices, each (B, 3, H, W) in [-1, 1]; see UNTOUCHED.

        They are those of the iterations from `first` on. Several at a time cost little more than one, and are the
        same.
        """
        mine = worker_slice(self.batch_size, self.rank, self.world_size)
        moved = torch.arange(self.batch_size)[mine] % UNTOUCHED != 0
        deltas = [torch.zeros_like(x0) for x0 in batches]
        if not bool(moved.any()):
            return deltas
        draws = [self._draw(first + number, mine, moved) for number in range(len(batches))]
        moved = moved.to(batches[0].device)
        # The surrogates take turns: with two, each second batch is of the same one.
        every = len(self.surrogates)
        for start in range(min(every, len(batches))):
            images = torch.cat([(x0[moved] + 1) / 2 for x0 in batches[start::every]])
            targets = torch.cat([target for target, _ in draws[start::every]]).to(images.device)
            bounds = torch.cat([bound for _, bound in draws[start::every]]).to(images.device)
            found = 2 * invert(self.surrogates[(first + start) % every], images, targets, bounds)
            for delta, part in zip(deltas[start::every], found.chunk(len(deltas[start::every])), strict=True):
                delta[moved] = part
        return deltas

    def _draw(self, iteration: int, mine: slice, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes (M,) and the bound (M, 1, 1, 1) of the M images that this worker moves."""
        generator = keyed_generator(self.seed, "inversion", iteration)
        part = torch.rand((), generator=generator)
        bound = (LOWEST_255 + part * (HIGHEST_255 - LOWEST_255)) / 255
        targets = torch.randint(self.num_classes, (self.batch_size,), generator=generator)[mine][moved]
        return targets, bound.expand(len(targets), 1, 1, 1)
