"""The networks that optimised poisons are made with: their training, which resumes exactly, and sign-PGD.

Whatever is random in a fit is drawn on the CPU by a generator keyed by (seed, purpose, epoch, batch), so nothing
of a generator has to be saved and every device draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from eclipse_ray.attacks import crop_flip, draw_crops, frozen, pgd
from eclipse_ray.poisons.interface import (
    LabelledImages,
    LinfSettings,
    PoisonSettings,
    Session,
    State,
    by_id,
    to_float,
)
from eclipse_ray.victims import VICTIMS
from eclipse_ray.victims.training import classify, placed

MOMENTUM = 0.9
"""Of every surrogate's SGD, as published by all."""
EVALUATION_BATCH = 500


class SurrogateSettings(LinfSettings):
    """The settings of a poison that is made with a surrogate network and sign steps."""

    eps_255: float = Field(
        8.0, ge=1, le=127, description="L-inf bound in 1/255; fitted noise is stored as 8-bit levels."
    )
    surrogate: Literal["small", "resnet18", "unet"] = Field("resnet18", description="Network; unet: adp only.")
    surrogate_batch_size: int = Field(128, ge=2, description="Images of one optimiser step.")
    surrogate_learning_rate: float = Field(0.1, gt=0, description="At the start of the training.")
    surrogate_schedule: Literal["constant", "linear", "milestones"] = Field(
        "constant", description="linear falls to 0 over the training; milestones divide by 10."
    )
    surrogate_milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="In epochs; rem: in optimiser steps."
    )
    surrogate_weight_decay: float = Field(5e-4, ge=0, description="Of the surrogate's SGD.")
    max_grad_norm: float = Field(0.0, ge=0, description="Longer gradients are cut to this norm; 0: none are cut.")
    steps: int = Field(ge=1, description="Sign steps when noise is made once.")
    step_size_255: float = Field(gt=0, description="Size of such a step in 1/255.")
    perturb_batch_size: int = Field(512, ge=1, description="Images of one pass when noise is made.")

    @property
    def networks(self) -> tuple[str, ...]:
        """Which surrogates this poison can have."""
        return ("small", "resnet18")

    @model_validator(mode="after")
    def _fits(self) -> SurrogateSettings:
        if self.surrogate not in self.networks:
            raise ValueError(f"surrogate {self.surrogate}: this poison wants {' or '.join(self.networks)}")
        return self


class TrainedSettings(SurrogateSettings):
    """The settings of a poison whose surrogate is trained before any noise is made."""

    scope: Literal["sample"] = Field("sample", description="One noise per image.")
    surrogate_epochs: int = Field(ge=1, description="Epochs of the training before the noise.")
    surrogate_augment: bool = Field(True, description="Crop and flip while the surrogate trains.")
    crop_padding: int = Field(4, ge=0, description="Crops after padding by this many pixels.")


class AdversarySettings(PoisonSettings):
    """The settings of a poison that attacks the images while its surrogate trains."""

    adversary_eps_255: float = Field(4.0, gt=0, description="L-inf radius of the adversary in 1/255.")
    adversary_steps: int = Field(10, ge=1, description="Sign steps of the adversary.")
    adversary_step_size_255: float = Field(2.0, gt=0, description="Size of such a step in 1/255.")


SMALL: dict[str, Any] = {"surrogate": "small", "surrogate_batch_size": 128, "perturb_batch_size": 128}
"""What every surrogate has at reduced cost: 10,000 images of 32 px on two CPU cores."""


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the last linear layer of `model` sees, (B, F), of images (B, 3, H, W) in [0, 1]."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        classify(model, images)
    finally:
        handle.remove()
    return seen[-1]


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator whose stream depends on `key` alone."""
    text = "/".join(str(part) for part in key)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()))


def new_surrogate(settings: SurrogateSettings, num_classes: int, seed: int, device: torch.device) -> nn.Module:
    """Return a fresh network; its weights are the same on every device."""
    return placed(lambda: VICTIMS[settings.surrogate](num_classes), seed, device)


def load_surrogate(
    state: State, index: int, settings: SurrogateSettings, num_classes: int, device: torch.device
) -> nn.Module:
    """Return network `index` of a state, in evaluation mode and without gradients of its weights."""
    model = new_surrogate(settings, num_classes, 0, device)
    model.load_state_dict(under(state, f"surrogate.{index}."))
    return model.eval().requires_grad_(False)


def surrogate_state(model: nn.Module, index: int) -> State:
    """Return the weights and running statistics of `model` as the entries of network `index`."""
    return {f"surrogate.{index}.{key}": _kept(value) for key, value in model.state_dict().items()}


def under(state: State, prefix: str) -> State:
    """Return the entries below `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _kept(value: Tensor) -> Tensor:
    # A copy: training goes on in the original. Contiguous, as safetensors wants it.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


@dataclass
class Training:
    """A surrogate in training; `state` and `restore` carry all that the next step depends on."""

    model: nn.Module
    optimizer: torch.optim.SGD

    def state(self) -> State:
        """Return weights, running statistics and momentum under "training."."""
        saved = {f"training.model.{key}": _kept(value) for key, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                saved[f"training.momentum.{name}"] = _kept(buffer)
        return saved

    def restore(self, state: State) -> None:
        """Go on from what `state` returned."""
        self.model.load_state_dict(under(state, "training.model."))
        momentum = under(state, "training.momentum.")
        for name, parameter in self.model.named_parameters():
            if name in momentum:
                buffer = torch.empty_like(parameter).copy_(momentum[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer

    def step(self, images: Tensor, labels: Tensor, rate: float, max_grad_norm: float) -> Tensor:
        """Take one SGD step on images (B, 3, H, W) in [0, 1] and return the mean cross-entropy before it."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(classify(self.model, images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        return loss.detach()


def start_training(model: nn.Module, settings: SurrogateSettings) -> Training:
    """Return `model` with its SGD, at its beginning."""
    rate, decay = settings.surrogate_learning_rate, settings.surrogate_weight_decay
    return Training(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=decay))


def rate_at(settings: SurrogateSettings, done: float, total: float) -> float:
    """Return the learning rate after `done` of `total` epochs (or optimiser steps, as milestones are meant)."""
    rate = settings.surrogate_learning_rate
    if settings.surrogate_schedule == "linear":
        return rate * (1 - done / total)
    if settings.surrogate_schedule == "milestones":
        return rate * 0.1 ** sum(done >= milestone for milestone in settings.surrogate_milestones)
    return rate


def epoch_batches(seed: int, epoch: int, count: int, size: int) -> list[Tensor]:
    """Return the rows of each batch of an epoch, in an order drawn from (seed, epoch); never one row alone."""
    order = torch.randperm(count, generator=keyed_generator(seed, "order", epoch))
    batches = list(torch.split(order, size))
    # Batch normalisation cannot learn from one value a channel.
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


def batch_at(seed: int, step: int, count: int, size: int) -> Tensor:
    """Return the rows of the batch of an optimiser step, counted from 0 through epoch after epoch."""
    # How many batches an epoch has does not depend on its order.
    batches = count // size + (count % size > 1) if count > size else 1
    epoch, index = divmod(step, batches)
    return epoch_batches(seed, epoch, count, size)[index]


def checkpoint_epochs(epochs: int, checkpoints: int) -> list[int]:
    """Return after which epochs networks are kept: evenly spread, the last one at the end."""
    return [-(-epochs * (index + 1) // checkpoints) for index in range(checkpoints)]


def train_surrogate(
    data: LabelledImages,
    settings: TrainedSettings,
    seed: int,
    session: Session,
    *,
    checkpoints: int = 1,
    adversary: AdversarySettings | None = None,
) -> State:
    """Train a surrogate on clean images and return its `checkpoints` (one: the last epoch's) as networks 0, 1, ...

    With `adversary`, every batch is first attacked: sign-PGD within `adversary_eps_255` from a random start
    (Madry et al., arXiv 1706.06083), against the network in evaluation mode.
    """
    data, epochs = by_id(data), settings.surrogate_epochs
    training = start_training(new_surrogate(settings, data.num_classes, seed, session.device), settings)
    kept = checkpoint_epochs(epochs, checkpoints)
    networks: State = {}
    first = 0
    if (saved := session.load()) is not None:
        first = int(saved["training.epoch"])
        training.restore(saved)
        networks = {key: value for key, value in saved.items() if key.startswith("surrogate.")}
    for epoch in range(first, epochs):
        loss = _train_epoch(training, data, settings, seed, epoch, session.device, adversary)
        for index, last in enumerate(kept):
            if last == epoch + 1:
                networks |= surrogate_state(training.model, index)
        session.save({**training.state(), **networks, "training.epoch": torch.tensor(epoch + 1)})
        session.report(epoch + 1, epochs, f"surrogate's loss {loss:.3f}")
    return networks


def _train_epoch(
    training: Training,
    data: LabelledImages,
    settings: TrainedSettings,
    seed: int,
    epoch: int,
    device: torch.device,
    adversary: AdversarySettings | None,
) -> float:
    batches = epoch_batches(seed, epoch, len(data.ids), settings.surrogate_batch_size)
    total = torch.zeros((), device=device)
    for index, rows in enumerate(batches):
        rate = rate_at(settings, epoch + index / len(batches), settings.surrogate_epochs)
        generator = keyed_generator(seed, "batch", epoch, index)
        images, labels = to_float(data.images[rows], device), data.labels[rows].to(device)
        if settings.surrogate_augment:
            padding = settings.crop_padding
            images = crop_flip(images, draw_crops(len(rows), padding, generator), padding)
        if adversary is not None:
            images = images + attack(training.model, images, labels, adversary, generator)
        total += training.step(images, labels, rate, settings.max_grad_norm)
    return float(total) / len(batches)


def attack(
    model: nn.Module, images: Tensor, labels: Tensor, settings: AdversarySettings, generator: torch.Generator
) -> Tensor:
    """Return the perturbation (B, 3, H, W) of `attack_from`, for a network in any mode and a drawn start."""
    unit = torch.rand(images.shape, generator=generator).to(images.device)
    with frozen(model):
        return attack_from(model, images, labels, settings, unit)


def attack_from(
    model: nn.Module, images: Tensor, labels: Tensor, settings: AdversarySettings, unit: Tensor
) -> Tensor:
    """Return the perturbation (B, 3, H, W) that raises the cross-entropy within the adversary's radius.

    `unit`, of the shape of the images and in [0, 1], places the start. The model is in evaluation mode.
    """
    bound = settings.adversary_eps_255 / 255
    return pgd(
        images,
        lambda attacked, _: F.cross_entropy(classify(model, attacked), labels, reduction="none"),
        bound,
        settings.adversary_step_size_255 / 255,
        settings.adversary_steps,
        start=(2 * unit - 1) * bound,
        maximise=True,
    )


@torch.no_grad()
def error_rate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Return the part in [0, 1] of images that `model`, in evaluation mode, gets wrong."""
    model.eval()
    wrong = seen = 0
    for images, labels in batches:
        wrong += int((classify(model, images).argmax(1) != labels).sum())
        seen += len(labels)
    return wrong / seen
