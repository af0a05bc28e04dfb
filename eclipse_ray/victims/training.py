"""Train a victim on a dataset and measure it on clean test images; the last epoch decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eclipse_ray.compensation import augment
from eclipse_ray.config import CompensationConfig, VictimConfig
from eclipse_ray.errors import InputError
from eclipse_ray.victims import VICTIMS

EVALUATION_BATCH = 500
WARMUP = 0.2
"""Part of a one-cycle schedule during which the learning rate rises."""

Array = Tensor | NDArray[np.generic]
OnEpoch = Callable[[int, float, float], None]


@dataclass(frozen=True)
class VictimRun:
    """What each epoch gave: accuracy on the test images (0-100) and mean training loss."""

    test_accuracy: list[float]
    train_loss: list[float]


def train_victim(
    train_images: Array,
    train_labels: Array,
    test_images: Array,
    test_labels: Array,
    config: VictimConfig,
    compensation: CompensationConfig | None,
    seed: int,
    device: torch.device | str,
    on_epoch: OnEpoch | None = None,
) -> VictimRun:
    """Train the victim `config.arch` from `seed` and return its accuracy on the test images after each epoch.

    Images are uint8 (N, H, W, 3), labels integers (N,) from 0; the number of classes is the largest label
    plus one. Training images are cropped, flipped and, with compensation mode "augment", compensated anew
    in every epoch (arXiv 2406.15093); test images never are. `on_epoch(epoch, test_accuracy, train_loss)`
    is called after each epoch, counted from 1. The same seed, device and thread count give the same
    result. Raises InputError for empty, mismatched or wrongly typed data and for negative labels.
    """
    images, labels = _checked(train_images, train_labels, "train", device)
    held_images, held_labels = _checked(test_images, test_labels, "test", device)
    classes = int(max(labels.max(), held_labels.max())) + 1
    generator = torch.Generator(device).manual_seed(seed)
    model = _build(config, classes, seed, device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    pad = config.crop_padding
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    run = VictimRun([], [])
    for epoch in range(config.epochs):
        loss = _train_epoch(model, optimizer, padded, labels, config, compensation, epoch, generator)
        accuracy = evaluate(model, held_images, held_labels)
        run.train_loss.append(loss)
        run.test_accuracy.append(accuracy)
        if on_epoch:
            on_epoch(epoch + 1, accuracy, loss)
    return run


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy (0-100) of `model` on uint8 images (N, H, W, 3), which are only normalised."""
    model.eval()
    correct = 0
    for batch, target in zip(
        torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True
    ):
        logits = model(_normalise(batch.permute(0, 3, 1, 2).float() / 255))
        correct += int((logits.argmax(1) == target).sum())
    return 100 * correct / len(labels)


def learning_rate_at(step: int, steps: int, config: VictimConfig) -> float:
    """Return the learning rate of optimiser step `step` out of `steps`.

    "one_cycle" rises linearly and falls along a cosine to zero (Smith and Topin, arXiv 1708.07120);
    "constant" is the published setting.
    """
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step + 0.5) / steps
    if progress < WARMUP:
        return config.learning_rate * progress / WARMUP
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def draw_batch(padded: Tensor, rows: Tensor, config: VictimConfig, generator: torch.Generator) -> Tensor:
    """Return the images `rows` of `padded`, uint8 (N, H + 2 pad, W + 2 pad, 3), cropped and flipped.

    The result is float (B, 3, H, W) in [0, 1], in channels-last memory.
    """
    pad, device, count = config.crop_padding, padded.device, len(rows)
    height, width = int(padded.shape[1]) - 2 * pad, int(padded.shape[2]) - 2 * pad
    shift = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator, device=device)
    ys = shift[0] + torch.arange(height, device=device)
    xs = torch.arange(width, device=device).expand(count, width)
    if config.flip:
        flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
        xs = torch.where(flip, width - 1 - xs, xs)
    xs = xs + shift[1]
    batch = padded[rows[:, None, None], ys[:, :, None], xs[:, None, :]]
    return batch.permute(0, 3, 1, 2).float() / 255


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    padded: Tensor,
    labels: Tensor,
    config: VictimConfig,
    compensation: CompensationConfig | None,
    epoch: int,
    generator: torch.Generator,
) -> float:
    model.train()
    order = torch.randperm(len(labels), generator=generator, device=labels.device)
    batches = torch.split(order, config.batch_size)
    # Batch normalisation cannot learn from one value a channel.
    batches = batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches
    total = torch.zeros((), device=labels.device)
    for index, rows in enumerate(batches):
        rate = learning_rate_at(epoch * len(batches) + index, config.epochs * len(batches), config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = draw_batch(padded, rows, config, generator)
        if compensation is not None and compensation.mode == "augment":
            batch = augment(batch, compensation, generator)
        loss = F.cross_entropy(model(_normalise(batch)), labels[rows], label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        total += loss.detach()
    return float(total) / len(batches)


def _build(config: VictimConfig, classes: int, seed: int, device: torch.device | str) -> nn.Module:
    # Weights are drawn on the CPU, so that they are the same on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VICTIMS[config.arch](classes)
    # Channels-last convolutions train a quarter faster on a CPU. torch's types do not know the argument.
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _normalise(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def _checked(images: Array, labels: Array, name: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    pixels, target = torch.as_tensor(images), torch.as_tensor(labels)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise InputError(f"{name} images: expected uint8 (N, H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}")
    if len(pixels) == 0 or target.shape != (len(pixels),):
        raise InputError(f"{name}: {len(pixels)} images came with labels of shape {tuple(target.shape)}")
    if target.is_floating_point() or int(target.min()) < 0:
        raise InputError(f"{name} labels: expected integers from 0, found {target.dtype} {target.min()}")
    return pixels.to(device), target.to(device, torch.int64)
