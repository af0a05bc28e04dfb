"""Fit a denoiser on the enlarged sparse clean set; knows nothing of Ray, which only wraps and reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from eclipse_ray.config import DenoiserConfig
from eclipse_ray.diffusion.crops import ImageBuffer, crops
from eclipse_ray.diffusion.ema import start_ema, update_ema
from eclipse_ray.diffusion.losses import heldout_psnr, loss_simple
from eclipse_ray.diffusion.model import Denoiser, build_denoiser, build_unet
from eclipse_ray.diffusion.sampler import to_model_range
from eclipse_ray.diffusion.schedule import cosine_alphas_cumprod


@dataclass(frozen=True)
class Progress:
    """One point of the training curve: mean loss since the last, PSNR in dB of held-out images at t_star."""

    iteration: int
    loss: float
    denoise_psnr: float
    noisy_psnr: float


@dataclass
class Fit:
    """A training under way; `state()` and `restore()` carry it across an interruption."""

    config: DenoiserConfig
    unet: UNet2DModel
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue, as tensors and plain values (loadable with weights_only)."""
        return {
            "unet": self.unet.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        self.unet.load_state_dict(state["unet"])
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.history = state["iteration"], state["history"]

    def averaged(self) -> Denoiser:
        """Return a denoiser with the averaged weights."""
        device = next(self.unet.parameters()).device
        unet = UNet2DModel.from_config(self.unet.config).to(device)
        unet.load_state_dict({**self.unet.state_dict(), **self.average})
        return build_denoiser(unet, self.config).to(device).eval()


def start_fit(config: DenoiserConfig, seed: int, device: torch.device) -> Fit:
    """Return an untrained network, its average and its optimiser; the start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_unet(config)
    unet = unet.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    return Fit(config, unet, start_ema(unet), optimizer)


def enlarged_batch(images: int, replication: int, batch_size: int, iteration: int, seed: int) -> Tensor:
    """Return the indices (batch_size,) of one batch of the enlarged set, shuffled anew each epoch.

    The enlarged set holds every sparse image 1 + M times (arXiv 2406.15093, section 4.2): replication is how
    often an index occurs in an epoch, never a copy in memory.
    """
    size = images * (1 + replication)
    positions = torch.arange(batch_size) + iteration * batch_size
    batch = torch.empty(batch_size, dtype=torch.int64)
    for epoch in torch.unique(positions // size).tolist():
        generator = torch.Generator().manual_seed(_mix(seed, int(epoch)))
        order = torch.randperm(size, generator=generator) % images
        inside = positions // size == epoch
        batch[inside] = order[positions[inside] % size]
    return batch


def learning_rate_at(config: DenoiserConfig, iteration: int) -> float:
    """Return the learning rate: 100 iterations of warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (iteration + 1) / min(100, config.iterations))
    if config.lr_decay == "none":
        return config.learning_rate * warm
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))


def run_fit(
    fit: Fit,
    train: Tensor | ImageBuffer,
    heldout: Tensor,
    seed: int,
    on_report: Callable[[Progress], None],
    on_checkpoint: Callable[[Fit], None],
    *,
    rank: int = 0,
    world_size: int = 1,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> None:
    """Train until `iterations`; train and heldout are uint8 (N, H, W, 3) on the network's device.

    `train` may hold images larger than the training size, of several sizes too: each draw is a random crop.
    Indices, timesteps, noise and places of an iteration are drawn for the whole batch from (seed, iteration), and
    each worker takes its slice: the optimisation is the same for any number of workers that divides the batch.
    """
    config = fit.config
    schedule = cosine_alphas_cumprod(config.num_train_timesteps).to(heldout.device)
    network = wrap(_NoiseNetwork(fit.unet)).train()
    losses: list[Tensor] = []
    while fit.iteration < config.iterations:
        for group in fit.optimizer.param_groups:
            group["lr"] = learning_rate_at(config, fit.iteration)
        x0, epsilon, t = _draw_batch(config, train, fit.iteration, seed, rank, world_size)
        loss = loss_simple(network, x0, epsilon, t, schedule)
        fit.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        fit.optimizer.step()
        update_ema(fit.average, fit.unet, config.ema_decay, fit.iteration)
        fit.iteration += 1
        losses.append(loss.detach())
        last = fit.iteration == config.iterations
        if fit.iteration % config.report_every == 0 or last:
            _report(fit, torch.stack(losses).mean().item(), heldout, seed, on_report)
            losses.clear()
        if fit.iteration % config.checkpoint_every == 0 or last:
            on_checkpoint(fit)


class _NoiseNetwork(nn.Module):
    """The U-Net as a plain module from (x_t, t) to eps_pred, which data-parallel wrappers can take."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.unet(x_t, t).sample
        return output


def _draw_batch(
    config: DenoiserConfig, train: Tensor | ImageBuffer, iteration: int, seed: int, rank: int, world_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    size = config.batch_size
    indices = enlarged_batch(len(train), config.replication, size, iteration, seed)
    generator = torch.Generator().manual_seed(_mix(seed, -1 - iteration))
    t = torch.randint(0, int(config.t_max or config.num_train_timesteps), (size,), generator=generator)
    epsilon = torch.randn(size, 3, config.image_size, config.image_size, generator=generator)
    # Last, and drawn where there is nothing to choose too: all other draws are the same for images of any size.
    places = torch.rand(size, 2, generator=generator, dtype=torch.float64)
    mine = slice(rank * size // world_size, (rank + 1) * size // world_size)
    x0 = to_model_range(crops(train, indices[mine], places[mine], config.image_size))
    device = x0.device
    return (
        x0.contiguous(memory_format=torch.channels_last),
        epsilon[mine].to(device, memory_format=torch.channels_last),
        t[mine].to(device),
    )


def _report(fit: Fit, loss: float, heldout: Tensor, seed: int, on_report: Callable[[Progress], None]) -> None:
    denoised, noisy = heldout_psnr(fit.averaged(), to_model_range(heldout), fit.config.t_star, seed)
    progress = Progress(fit.iteration, loss, denoised, noisy)
    fit.history.append(dict(vars(progress)))
    on_report(progress)


def _mix(seed: int, counter: int) -> int:
    # One 64-bit seed for each (seed, counter); the odd constant keeps neighbouring runs apart.
    return (seed * 0x9E3779B97F4A7C15 + counter * 0xD1B54A32D192ED03) % 2**63
