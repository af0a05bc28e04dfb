"""EM: error-minimising noise (Huang et al., arXiv 2101.04898), one noise per image or one per class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.attacks import frozen, pgd
from eclipse_ray.poisons.interface import LabelledImages, Scope, Session, State, by_id, id_keys, rows_of, to_float
from eclipse_ray.poisons.surrogate import (
    SMALL,
    SurrogateSettings,
    Training,
    batch_at,
    error_rate,
    keyed_generator,
    new_surrogate,
    rate_at,
    start_training,
    surrogate_state,
)
from eclipse_ray.victims.training import classify

Build = Callable[[Any, int, int, torch.device], nn.Module]
"""(settings, classes, seed, device) to a fresh network."""
See = Callable[[Tensor, torch.Generator], Tensor]
"""(poisoned images (B, 3, H, W) in [0, 1], CPU generator) to what the network is shown, differentiably."""


class Em(SurrogateSettings):
    """The settings of em. Its published loop has no cap on rounds; `rounds` is ours."""

    numbers: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {"surrogate_batch_size": 512, "max_grad_norm": 5.0, "steps": 20, "step_size_255": 0.8},
        "reduced": SMALL
        | {"max_grad_norm": 5.0, "steps": 4, "step_size_255": 2.0, "round_batches": 20, "rounds": 24},
        "class": {"steps": 1, "step_size_255": 0.8, "subset": 0.2, "stop_error": 0.1},
    }

    scope: Scope = Field("sample", description="One noise per image, or one per class.")
    rounds: int = Field(200, ge=1, description="Most rounds of training and noise.")
    round_batches: int = Field(10, ge=1, description="Optimiser steps of a round.")
    stop_error: float = Field(0.01, ge=0, lt=1, description="Training error that ends the fit.")
    subset: float = Field(1.0, gt=0, le=1, description="Part of the images that a round perturbs.")


def minimise_error(
    data: LabelledImages,
    settings: Em,
    seed: int,
    session: Session,
    build: Build = new_surrogate,
    see: See | None = None,
    draws: int = 1,
) -> State:
    """Return noise that makes a network's training error small, found in rounds of two halves.

    A round is `round_batches` SGD steps on the poisoned images, then `steps` sign steps down the loss on the noise
    of every image (scope "class": of a random `subset`, whose noise is averaged over each class). Rounds end when
    the training error is at most `stop_error`, at the latest after `rounds`. Another network comes from `build`;
    `see` is what happens to images before the network; the noise follows the mean gradient of `draws` draws of it.
    The state holds "ids" and "perturbation", int8 levels (N, H, W, 3) in the order of `by_id` or (classes, H, W,
    3), network 0 and its last training "error".
    """
    data, device = by_id(data), session.device
    training = start_training(build(settings, data.num_classes, seed, device), settings)
    noises = data.num_classes if settings.scope == "class" else len(data.ids)
    noise = torch.zeros(noises, *data.images.shape[1:])
    rounds = _Rounds(data, settings, seed, device, see, draws, training, noise)
    if (saved := session.load()) is not None:
        rounds.restore(saved)
    last, stop = settings.rounds, settings.stop_error
    while rounds.done < last and rounds.error > stop:
        loss = rounds.train()
        rounds.perturb()
        rounds.error = error_rate(rounds.training.model, rounds.poisoned_batches())
        rounds.done += 1
        session.save(rounds.state())
        session.report(rounds.done, last, f"training error {100 * rounds.error:.1f} %, loss {loss:.3f}")
    return {
        "ids": id_keys(data.ids),
        # What 8-bit storage keeps of it.
        "perturbation": (rounds.noise * 255).round().clamp(-127, 127).to(torch.int8),
        "error": torch.tensor(rounds.error, dtype=torch.float64),
        **surrogate_state(rounds.training.model, 0),
    }


def perturb_em(data: LabelledImages, state: State, settings: Em, seed: int, device: torch.device) -> Tensor:
    """Return the fitted noise of each image or class, float32 (B, H, W, 3) on [0, 1]."""
    rows = data.labels if settings.scope == "class" else rows_of(state["ids"], data.ids)
    return state["perturbation"][rows].float() / 255


@dataclass
class _Rounds:
    """A fit between two rounds. Noise is float32 (N or classes, H, W, 3), on the CPU on every device."""

    data: LabelledImages
    settings: Em
    seed: int
    device: torch.device
    see: See | None
    draws: int
    training: Training
    noise: Tensor
    done: int = 0
    error: float = 1.0

    def state(self) -> State:
        counters = {"done": torch.tensor(self.done), "error": torch.tensor(self.error, dtype=torch.float64)}
        return {**self.training.state(), **counters, "noise": self.noise.clone()}

    def restore(self, state: State) -> None:
        self.training.restore(state)
        self.noise = state["noise"].clone()
        self.done, self.error = int(state["done"]), float(state["error"])

    def train(self) -> float:
        """Take the round's SGD steps, going on through the epoch where the last round stopped; return the loss."""
        settings, steps = self.settings, self.settings.round_batches
        count, size = len(self.data.ids), settings.surrogate_batch_size
        total = torch.zeros((), device=self.device)
        for step in range(self.done * steps, (self.done + 1) * steps):
            generator = keyed_generator(self.seed, "train", step)
            images, labels = self.poisoned(batch_at(self.seed, step, count, size))
            shown = self.see(images, generator) if self.see else images
            rate = rate_at(settings, step, settings.rounds * steps)
            total += self.training.step(shown, labels, rate, settings.max_grad_norm)
        return float(total) / steps

    def perturb(self) -> None:
        """Bring the noise down the loss, of all images or of the subset of this round."""
        with frozen(self.training.model):
            changes = ((rows, self._descend(rows, index)) for index, rows in enumerate(self._noise_rows()))
            if self.settings.scope == "class":
                self._average(changes)
                return
            for rows, changed in changes:
                self.noise[rows] = changed

    def _average(self, changes: Iterator[tuple[Tensor, Tensor]]) -> None:
        sums, counts = torch.zeros_like(self.noise), torch.zeros(len(self.noise))
        for rows, changed in changes:
            sums.index_add_(0, self.data.labels[rows], changed)
            counts += torch.bincount(self.data.labels[rows], minlength=len(counts))
        seen = counts > 0
        self.noise[seen] = sums[seen] / counts[seen, None, None, None]

    def poisoned(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images `rows` with their noise, (B, 3, H, W) in [0, 1], and their labels."""
        images = to_float(self.data.images[rows], self.device)
        return (images + self._noise_of(rows)).clamp(0, 1), self.data.labels[rows].to(self.device)

    def poisoned_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all poisoned images as the network is shown them, with the draws of this round."""
        for index, rows in enumerate(self._chunks(torch.arange(len(self.data.ids)))):
            images, labels = self.poisoned(rows)
            generator = keyed_generator(self.seed, "error", self.done, index)
            yield (self.see(images, generator) if self.see else images), labels

    def _descend(self, rows: Tensor, index: int) -> Tensor:
        labels = self.data.labels[rows].to(self.device)
        generator = keyed_generator(self.seed, "noise", self.done, index)

        def loss(images: Tensor, _step: int) -> Tensor:
            shown = [self.see(images, generator) if self.see else images for _ in range(self.draws)]
            values = [F.cross_entropy(classify(self.training.model, x), labels, reduction="none") for x in shown]
            return torch.stack(values).mean(0)

        bound, size = self.settings.eps_255 / 255, self.settings.step_size_255 / 255
        images = to_float(self.data.images[rows], self.device)
        delta = pgd(images, loss, bound, size, self.settings.steps, start=self._noise_of(rows))
        return delta.permute(0, 2, 3, 1).cpu()

    def _noise_of(self, rows: Tensor) -> Tensor:
        places = self.data.labels[rows] if self.settings.scope == "class" else rows
        return self.noise[places].to(self.device).permute(0, 3, 1, 2)

    def _noise_rows(self) -> list[Tensor]:
        count = len(self.data.ids)
        wanted = max(1, round(self.settings.subset * count))
        if wanted == count:
            return self._chunks(torch.arange(count))
        drawn = torch.randperm(count, generator=keyed_generator(self.seed, "subset", self.done))
        return self._chunks(drawn[:wanted])

    def _chunks(self, rows: Tensor) -> list[Tensor]:
        return list(torch.split(rows, self.settings.perturb_batch_size))
