"""Fit a denoiser on the enlarged sparse clean set; knows nothing of Ray, which only wraps and reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eclipse_ray.config import DenoiserConfig
from eclipse_ray.diffusion.crops import ImageBuffer, crops
from eclipse_ray.diffusion.ema import start_ema, update_ema
from eclipse_ray.diffusion.losses import heldout_psnr, loss_hybrid
from eclipse_ray.diffusion.model import Denoiser, build_denoiser, build_unet
from eclipse_ray.diffusion.sampler import to_model_range
from eclipse_ray.diffusion.timesteps import draw_timesteps, record_losses, start_losses

if TYPE_CHECKING:
    from diffusers import UNet2DModel


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
    # What loss-second-moment sampling remembers (see `timesteps`); None for uniform sampling.
    timestep_losses: dict[str, Tensor] | None = None
    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue, as tensors and plain values (loadable with weights_only)."""
        return {
            "unet": self.unet.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "timestep_losses": self.timestep_losses,
            "iteration": self.iteration,
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        self.unet.load_state_dict(state["unet"])
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in (self.timestep_losses or {}).items():
            value.copy_(state["timestep_losses"][name])
        self.iteration, self.history = state["iteration"], state["history"]

    def averaged(self) -> Denoiser:
        """Return a denoiser with the averaged weights."""
        device = next(self.unet.parameters()).device
        unet = type(self.unet).from_config(self.unet.config).to(device)
        unet.load_state_dict({**self.unet.state_dict(), **self.average})
        return build_denoiser(unet, self.config).to(device).eval()


def start_fit(config: DenoiserConfig, seed: int, device: torch.device) -> Fit:
    """Return an untrained network, its average and its optimiser; the start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_unet(config)
    unet = unet.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    resampled = config.timestep_sampler == "loss_second_moment"
    losses = start_losses(config.t_max or config.num_train_timesteps) if resampled else None
    return Fit(config, unet, start_ema(unet), optimizer, losses)


def split_heldout(images: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of (training part, held-out part), chosen by the seed; each has at least one image."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(fraction * images)), images - 1)
    return order[count:], order[:count]


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
    """Return the learning rate: a linear warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (iteration + 1) / max(1, min(config.warmup_iterations, config.iterations)))
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
    gather: Callable[[Tensor], Tensor] = lambda part: part,
    on_step: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Train until `iterations`; train and heldout are uint8 (N, H, W, 3) on the network's device.

    `train` may hold images larger than the training size, of several sizes too: each draw is a random crop.
    Indices, timesteps, noise and places of an iteration are drawn for the whole batch from (seed, iteration), and
    each worker takes its slice: the optimisation is the same for any number of workers that divides the batch.
    `gather` joins a tensor (B of this worker,) of every worker in rank order; only resampled timesteps need it.
    `on_step` is told the number of every finished iteration.
    """
    config = fit.config
    denoiser = build_denoiser(fit.unet, config).to(heldout.device)
    schedule, network = denoiser.alphas_cumprod, wrap(denoiser).train()
    losses: list[Tensor] = []
    while fit.iteration < config.iterations:
        x0, epsilon, t, weights = _draw_batch(
            config, train, fit.iteration, seed, rank, world_size, fit.timestep_losses
        )
        if config.dropout:
            # Its masks come from torch's global generator: keyed, so that a resumed training draws the same.
            torch.manual_seed(_mix(_mix(seed, -1 - fit.iteration), 1 + rank))
        terms = loss_hybrid(network, x0, epsilon, t, schedule, config.vlb_weight)
        loss = (weights * terms).mean()
        _optimise(fit, network, loss)
        if fit.timestep_losses is not None:
            record_losses(fit.timestep_losses, gather(t), gather(terms.detach()))
        losses.append(loss.detach())
        on_step(fit.iteration)
        last = fit.iteration == config.iterations
        if fit.iteration % config.report_every == 0 or last:
            _report(fit, torch.stack(losses).mean().item(), heldout, seed, on_report)
            losses.clear()
        if fit.iteration % config.checkpoint_every == 0 or last:
            on_checkpoint(fit)


def worker_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the part of a batch that one worker takes; parts differ by at most one image."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def _optimise(fit: Fit, network: nn.Module, loss: Tensor) -> None:
    config = fit.config
    for group in fit.optimizer.param_groups:
        group["lr"] = learning_rate_at(config, fit.iteration)
    fit.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if config.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
    fit.optimizer.step()
    update_ema(fit.average, fit.unet, config.ema_decay, fit.iteration, config.ema_warmup)
    fit.iteration += 1


def _draw_batch(
    config: DenoiserConfig,
    train: Tensor | ImageBuffer,
    iteration: int,
    seed: int,
    rank: int,
    world_size: int,
    timestep_losses: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = config.batch_size
    indices = enlarged_batch(len(train), config.replication, size, iteration, seed)
    generator = torch.Generator().manual_seed(_mix(seed, -1 - iteration))
    t, weights = draw_timesteps(config.t_max or config.num_train_timesteps, size, generator, timestep_losses)
    epsilon = torch.randn(size, 3, config.image_size, config.image_size, generator=generator)
    # Last, and drawn where there is nothing to choose too: all other draws are the same for images of any size.
    places = torch.rand(size, 2, generator=generator, dtype=torch.float64)
    mine = worker_slice(size, rank, world_size)
    x0 = to_model_range(crops(train, indices[mine], places[mine], config.image_size))
    device = x0.device
    return (
        x0.contiguous(memory_format=torch.channels_last),
        epsilon[mine].to(device, memory_format=torch.channels_last),
        t[mine].to(device),
        weights[mine].to(device),
    )


def _report(fit: Fit, loss: float, heldout: Tensor, seed: int, on_report: Callable[[Progress], None]) -> None:
    denoised, noisy = heldout_psnr(fit.averaged(), to_model_range(heldout), fit.config.t_star, seed)
    progress = Progress(fit.iteration, loss, denoised, noisy)
    fit.history.append(dict(vars(progress)))
    on_report(progress)


def _mix(seed: int, counter: int) -> int:
    # One 64-bit seed for each (seed, counter); the odd constant keeps neighbouring runs apart.
    return (seed * 0x9E3779B97F4A7C15 + counter * 0xD1B54A32D192ED03) % 2**63
