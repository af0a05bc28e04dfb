"""Train a victim on a dataset and measure it on clean test images; the last epoch decides."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eclipse_ray.compensation import augment
from eclipse_ray.config import CompensationConfig, Precision, PrivacyConfig, VictimConfig
from eclipse_ray.diffusion.network import fast_precision
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.victims import VICTIMS

EVALUATION_BATCH = 500
WARMUP = 0.2
"""Part of a one-cycle schedule during which the learning rate rises."""

Array = Tensor | NDArray[np.generic]
OnEpoch = Callable[[int, float, float], None]
Augmentation = Callable[[Tensor, Tensor, nn.Module, torch.Generator, float], tuple[Tensor, Tensor]]
"""(images, targets, victim, generator, progress) -> images and targets of the same shapes.

`images` are float (B, 3, H, W) in [0, 1], already cropped, flipped and compensated; `targets` are soft labels,
float (B, K), that sum to 1; the victim being trained is called through `classify`; `generator` lives on the
device of the images; `progress` in [0, 1) is the part of training that is done. The victim may be left in
evaluation mode.
"""


@dataclass(frozen=True)
class VictimRun:
    """What each epoch gave: accuracy on the test images (0-100) and mean training loss."""

    test_accuracy: list[float]
    train_loss: list[float]


class Bfloat16(nn.Module):
    """Compute `network` in bfloat16 where that is safe; parameters, input and logits stay float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K), float32, for float32 images (B, 3, H, W)."""
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.network(x)
        return logits.float()


@dataclass(frozen=True)
class _Pool:
    """Training images on the device: `views` stored versions of the first images, then one each of the others."""

    padded: Tensor
    labels: Tensor
    views: int
    viewed: int

    def rows(self, generator: torch.Generator) -> Tensor:
        """Return for each label the row of `padded` that stands for it in this epoch."""
        count, device = len(self.labels), self.labels.device
        rows = torch.arange(count, device=device)
        if self.views > 1:
            rows += (self.views - 1) * self.viewed
            drawn = torch.randint(0, self.views, (self.viewed,), generator=generator, device=device)
            rows[: self.viewed] = drawn * self.viewed + torch.arange(self.viewed, device=device)
        return rows


@dataclass(frozen=True)
class _Training:
    """What stays the same from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    pool: _Pool
    classes: int
    config: VictimConfig
    compensation: CompensationConfig | None
    augmentations: Sequence[Augmentation]
    generator: torch.Generator
    private: bool


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
    *,
    augmentations: Sequence[Augmentation] = (),
    privacy: PrivacyConfig | None = None,
    extra: tuple[Array, Array] | None = None,
) -> VictimRun:
    """Train the victim `config.arch` from `seed` and return its accuracy on the test images after each epoch.

    Images are uint8 (N, H, W, 3), labels integers (N,) from 0; the number of classes is the largest label
    plus one. Training images may be (D, N, H, W, 3): D versions of each image, of which each epoch draws one.
    `extra` is more labelled training images, (M, H, W, 3) and (M,). All of them are cropped, flipped and, with
    compensation mode "augment", compensated anew in every epoch (arXiv 2406.15093), then pass through
    `augmentations` in turn; test images never do. With `privacy` every image's gradient is clipped and noise is
    added (DP-SGD, arXiv 1607.00133), in float32, with group for batch normalisation. After each epoch, counted
    from 1, `on_epoch(epoch, test_accuracy, train_loss)` is called. The same seed, device and thread count give
    the same result on a CPU. Raises InputError for empty, mismatched or wrongly typed data and for negative
    labels, ConfigError for `privacy` without Opacus.
    """
    pool = _pool(train_images, train_labels, extra, config.crop_padding, device)
    held_images, held_labels = _checked(test_images, test_labels, "test", device)
    classes = int(max(pool.labels.max(), held_labels.max())) + 1
    generator = torch.Generator(device).manual_seed(seed)
    model = _build(config, classes, seed, device, privacy is not None)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov and config.momentum > 0,
    )
    if privacy is not None:
        batch_size = min(config.batch_size, len(pool.labels))
        optimizer = private_optimizer(optimizer, privacy, batch_size, generator)
    training = _Training(
        model, optimizer, pool, classes, config, compensation, augmentations, generator, privacy is not None
    )
    run = VictimRun([], [])
    for epoch in range(config.epochs):
        loss = _train_epoch(training, epoch)
        accuracy = evaluate(model, held_images, held_labels)
        run.train_loss.append(loss)
        run.test_accuracy.append(accuracy)
        if on_epoch:
            on_epoch(epoch + 1, accuracy, loss)
    return run


def classify(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (B, K) of `model` for float images (B, 3, H, W) in [0, 1], which are normalised first."""
    logits: Tensor = model((images - 0.5) / 0.25)
    return logits


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy (0-100) of `model` on uint8 images (N, H, W, 3), which are only normalised."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    for batch, target in zip(
        torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True
    ):
        logits = classify(model, batch.permute(0, 3, 1, 2).float() / 255)
        correct += (logits.argmax(1) == target).sum()
    return 100 * int(correct) / len(labels)


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


def _train_epoch(training: _Training, epoch: int) -> float:
    training.model.train()
    config, pool, generator = training.config, training.pool, training.generator
    order = torch.randperm(len(pool.labels), generator=generator, device=pool.labels.device)
    source = pool.rows(generator)
    batches = torch.split(order, config.batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1 and not training.private:
        # Batch normalisation cannot learn from one value a channel.
        batches = batches[:-1]
    total = torch.zeros((), device=pool.labels.device)
    for index, rows in enumerate(batches):
        step, steps = epoch * len(batches) + index, config.epochs * len(batches)
        rate = learning_rate_at(step, steps, config)
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        batch, targets = _draw(training, source[rows], pool.labels[rows], step / steps)
        logits = classify(training.model, batch)
        loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
        training.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        training.optimizer.step()
        total += loss.detach()
    return float(total) / len(batches)


def _draw(training: _Training, rows: Tensor, labels: Tensor, progress: float) -> tuple[Tensor, Tensor]:
    """Return one batch as the victim sees it, and its labels: classes (B,), or (B, K) after an augmentation."""
    compensation = training.compensation
    batch = draw_batch(training.pool.padded, rows, training.config, training.generator)
    if compensation is not None and compensation.mode == "augment":
        batch = augment(batch, compensation, training.generator)
    if not training.augmentations:
        return batch, labels
    targets = F.one_hot(labels, training.classes).float()
    with unwatched(training.model) if training.private else nullcontext():
        for augmentation in training.augmentations:
            batch, targets = augmentation(batch, targets, training.model, training.generator, progress)
    # An augmentation may have asked the victim something, in another mode.
    training.model.train()
    return batch.detach().contiguous(memory_format=torch.channels_last), targets.detach()


def placed(build: Callable[[], nn.Module], seed: int, device: torch.device | str) -> nn.Module:
    """Return what `build` makes, its weights drawn from `seed` on the CPU, on `device`, channels last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    # Channels-last convolutions train a quarter faster on a CPU. torch's types do not know the argument.
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build(config: VictimConfig, classes: int, seed: int, device: torch.device | str, private: bool) -> nn.Module:
    model = placed(lambda: VICTIMS[config.arch](classes), seed, device)
    if private:
        # Gradients of single images are formed from activations, which would not all be of one precision.
        return make_private(model)
    return fast_where_allowed(model, config.precision, torch.device(device))


def fast_where_allowed(network: nn.Module, precision: Precision | None, device: torch.device) -> nn.Module:
    """Return the network in bfloat16, unless `precision` is float32 or the device is slow at it."""
    allowed = precision != "float32" and fast_precision(device) == "bfloat16"
    return Bfloat16(network) if allowed else network


def _pool(
    images: Array, labels: Array, extra: tuple[Array, Array] | None, pad: int, device: torch.device | str
) -> _Pool:
    versions = torch.as_tensor(images)
    several = versions.ndim == 5 and len(versions) > 0
    pixels, target = _checked(versions[0] if several else versions, labels, "train", device)
    views, viewed = (len(versions) if several else 1), len(pixels)
    if views > 1:
        pixels = versions.flatten(0, 1).to(device)
    if extra is not None:
        more, more_labels = _checked(*extra, "extra", device)
        if more.shape[1:] != pixels.shape[1:]:
            raise InputError(
                f"extra images: expected {tuple(pixels.shape[1:])} like the training images, "
                f"got {tuple(more.shape[1:])}"
            )
        pixels, target = torch.cat([pixels, more]), torch.cat([target, more_labels])
    return _Pool(F.pad(pixels, (0, 0, pad, pad, pad, pad)), target, views, viewed)


def _checked(images: Array, labels: Array, name: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    pixels, target = torch.as_tensor(images), torch.as_tensor(labels)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise InputError(f"{name} images: expected uint8 (N, H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}")
    if len(pixels) == 0 or target.shape != (len(pixels),):
        raise InputError(f"{name}: {len(pixels)} images came with labels of shape {tuple(target.shape)}")
    if target.is_floating_point() or int(target.min()) < 0:
        raise InputError(f"{name} labels: expected integers from 0, found {target.dtype} {target.min()}")
    return pixels.to(device), target.to(device, torch.int64)


# Differentially private training (DP-SGD, Abadi et al., arXiv 1607.00133) through Opacus, used as a defense: a
# poisoned image moves the weights by no more than the bound. No privacy budget is computed, since batches are
# shuffled as in all other training, not drawn by Poisson sampling.


def make_private(model: nn.Module) -> nn.Module:
    """Return `model` with group for batch normalisation, so that Opacus finds each image's own gradient.

    Batch normalisation lets the images of a batch see each other: an image has no gradient of its own. Opacus'
    ModuleValidator.fix puts gcd(32, channels) groups in its place; all other weights stay as they are. Raises
    ConfigError when Opacus is missing.
    """
    try:
        from opacus import GradSampleModule
        from opacus.validators import ModuleValidator
    except ImportError as error:
        raise ConfigError(f"DP-SGD needs Opacus ({error}): pip install 'eclipse-ray[defenses]'") from None
    fixed = ModuleValidator.fix(model)
    # Opacus 1.6.0 takes wrong gradients of convolutions, without a word, where activations are channels-last.
    fixed.to(memory_format=torch.contiguous_format)
    fixed.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    for module in fixed.modules():
        # Hooks watch what the normalisation returns, which must not be overwritten.
        if isinstance(module, nn.ReLU):
            module.inplace = False
    # Of the first layer, whose input is the images.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    watched: nn.Module = GradSampleModule(fixed)
    return watched


def private_optimizer(
    optimizer: torch.optim.Optimizer, privacy: PrivacyConfig, batch_size: int, generator: torch.Generator
) -> torch.optim.Optimizer:
    """Return `optimizer` with each image's gradient cut to `max_grad_norm` and noise added to their sum.

    The sum of the gradients of a mean loss over `batch_size` images, plus noise of standard deviation
    noise_multiplier * max_grad_norm drawn from `generator`, is divided by `batch_size`; a smaller last batch so
    takes a smaller step. The parameters must be those of a model from `make_private`.
    """
    from opacus.optimizers import DPOptimizer

    private: torch.optim.Optimizer = DPOptimizer(
        optimizer,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=batch_size,
        generator=generator,
    )
    return private


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Let a model from `make_private` be called without recording gradients of images."""
    model.disable_hooks()  # type: ignore[operator]
    try:
        yield
    finally:
        model.enable_hooks()  # type: ignore[operator]
