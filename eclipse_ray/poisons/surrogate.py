"""The networks that optimised poisons are made with: their training, which resumes exactly, and sign-PGD.

Whatever is random in a fit is drawn on the CPU by a generator keyed by (seed, purpose, epoch, batch), so nothing
of a generator has to be saved and every device draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eclipse_ray.attacks import crop_flip, draw_crops, frozen, pgd
from eclipse_ray.config import PoisonConfig
from eclipse_ray.poisons.optimised import LabelledImages, Session, State, by_id, to_float
from eclipse_ray.victims import VICTIMS
from eclipse_ray.victims.training import classify, placed

MOMENTUM = 0.9
"""Of every surrogate's SGD, as published by all."""
EVALUATION_BATCH = 500

T = TypeVar("T")
Forward = Callable[[nn.Module, Tensor], Tensor]
"""(network, images (B, 3, H, W) in [0, 1]) to logits (B, K)."""


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


def new_surrogate(config: PoisonConfig, num_classes: int, seed: int, device: torch.device) -> nn.Module:
    """Return a fresh network of a resolved config; the weights are the same on every device."""
    assert config.surrogate in VICTIMS, "a resolved config names a surrogate"
    return placed(lambda: VICTIMS[str(config.surrogate)](num_classes), seed, device)


def load_surrogate(
    state: State, index: int, config: PoisonConfig, num_classes: int, device: torch.device
) -> nn.Module:
    """Return network `index` of a state, in evaluation mode and without gradients of its weights."""
    model = new_surrogate(config, num_classes, 0, device)
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

    def step(
        self, images: Tensor, labels: Tensor, rate: float, max_grad_norm: float, forward: Forward = classify
    ) -> Tensor:
        """Take one SGD step on images (B, 3, H, W) in [0, 1] and return the mean cross-entropy before it."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(forward(self.model, images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        return loss.detach()


def start_training(model: nn.Module, config: PoisonConfig) -> Training:
    """Return `model` with the SGD of a resolved config, at its beginning."""
    rate, decay = needed(config.surrogate_learning_rate), needed(config.surrogate_weight_decay)
    return Training(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=decay))


def needed(value: T | None) -> T:
    """Return a number of a resolved config, which has no gaps where a poison looks."""
    assert value is not None, "not a resolved poison config: pass it through resolved_poison first"
    return value


def rate_at(config: PoisonConfig, done: float, total: float) -> float:
    """Return the learning rate after `done` of `total` epochs (or optimiser steps, as milestones are meant)."""
    rate = needed(config.surrogate_learning_rate)
    if config.surrogate_schedule == "linear":
        return rate * (1 - done / total)
    if config.surrogate_schedule == "milestones":
        return rate * 0.1 ** sum(done >= milestone for milestone in needed(config.surrogate_milestones))
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
    data: LabelledImages, config: PoisonConfig, seed: int, session: Session, *, adversarial: bool = False
) -> State:
    """Train a surrogate on clean images and return its `checkpoints` (one: the last epoch's) as networks 0, 1, ...

    With `adversarial`, every batch is first attacked: sign-PGD within `adversary_eps_255` from a random start
    (Madry et al., arXiv 1706.06083), against the network in evaluation mode.
    """
    data, epochs = by_id(data), needed(config.surrogate_epochs)
    training = start_training(new_surrogate(config, data.num_classes, seed, session.device), config)
    kept = checkpoint_epochs(epochs, config.checkpoints or 1)
    networks: State = {}
    first = 0
    if (saved := session.load()) is not None:
        first = int(saved["training.epoch"])
        training.restore(saved)
        networks = {key: value for key, value in saved.items() if key.startswith("surrogate.")}
    for epoch in range(first, epochs):
        loss = _train_epoch(training, data, config, seed, epoch, session.device, adversarial)
        for index, last in enumerate(kept):
            if last == epoch + 1:
                networks |= surrogate_state(training.model, index)
        session.save({**training.state(), **networks, "training.epoch": torch.tensor(epoch + 1)})
        session.report(epoch + 1, epochs, f"surrogate's loss {loss:.3f}")
    return networks


def _train_epoch(
    training: Training,
    data: LabelledImages,
    config: PoisonConfig,
    seed: int,
    epoch: int,
    device: torch.device,
    adversarial: bool,
) -> float:
    batches = epoch_batches(seed, epoch, len(data.ids), needed(config.surrogate_batch_size))
    total = torch.zeros((), device=device)
    for index, rows in enumerate(batches):
        rate = rate_at(config, epoch + index / len(batches), needed(config.surrogate_epochs))
        generator = keyed_generator(seed, "batch", epoch, index)
        images, labels = to_float(data.images[rows], device), data.labels[rows].to(device)
        if config.surrogate_augment:
            padding = needed(config.crop_padding)
            images = crop_flip(images, draw_crops(len(rows), padding, generator), padding)
        if adversarial:
            images = images + attack(training.model, images, labels, config, generator)
        total += training.step(images, labels, rate, needed(config.max_grad_norm))
    return float(total) / len(batches)


def attack(
    model: nn.Module, images: Tensor, labels: Tensor, config: PoisonConfig, generator: torch.Generator
) -> Tensor:
    """Return the perturbation (B, 3, H, W) of `attack_from`, for a network in any mode and a drawn start."""
    unit = torch.rand(images.shape, generator=generator).to(images.device)
    with frozen(model):
        return attack_from(model, images, labels, config, unit)


def attack_from(model: nn.Module, images: Tensor, labels: Tensor, config: PoisonConfig, unit: Tensor) -> Tensor:
    """Return the perturbation (B, 3, H, W) that raises the cross-entropy within the adversary's radius.

    `unit`, of the shape of the images and in [0, 1], places the start. The model is in evaluation mode.
    """
    bound = needed(config.adversary_eps_255) / 255
    return pgd(
        images,
        lambda attacked, _: F.cross_entropy(classify(model, attacked), labels, reduction="none"),
        bound,
        needed(config.adversary_step_size_255) / 255,
        needed(config.adversary_steps),
        start=(2 * unit - 1) * bound,
        maximise=True,
    )


@torch.no_grad()
def error_rate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], forward: Forward = classify) -> float:
    """Return the part in [0, 1] of images that `model`, in evaluation mode, gets wrong."""
    model.eval()
    wrong = seen = 0
    for images, labels in batches:
        wrong += int((forward(model, images).argmax(1) != labels).sum())
        seen += len(labels)
    return wrong / seen
