"""Absorb and eliminate: noise an image to depth t_star, then denoise it (arXiv 2406.15093, section 4).

Images are float32 (B, 3, H, W) in [-1, 1]. Timestep indices run from 0 to T - 1, so depth t_star is reached by
index t_star - 1. Noise keys: absorb uses t_star, the reverse step at index t uses t; so no key is used twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eclipse_ray.diffusion.model import Denoiser
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.schedule import respaced_timesteps

Network = Callable[[Tensor, Tensor], Tensor]


def absorb(x: Tensor, alphas_cumprod: Tensor, t_star: int, seed: int, ids: Sequence[str]) -> Tensor:
    """Return x_t at depth t_star: sqrt(abar) x + sqrt(1 - abar) eps (Ho et al. 2020, eq. 4)."""
    abar = float(alphas_cumprod[t_star - 1])
    return abar**0.5 * x + (1 - abar) ** 0.5 * noise(seed, ids, t_star, tuple(x.shape[1:]), x.device)


def predict_x0(x_t: Tensor, eps_pred: Tensor, abar: float) -> Tensor:
    """Return x0_pred clipped to [-1, 1] (Ho et al. 2020, eq. 15)."""
    return ((x_t - (1 - abar) ** 0.5 * eps_pred) / abar**0.5).clamp(-1, 1)


def posterior(x_t: Tensor, x0_pred: Tensor, abar: float, abar_previous: float) -> tuple[Tensor, float]:
    """Return mean and variance of q(x_previous | x_t, x0_pred) (Ho et al. 2020, eq. 7)."""
    alpha = abar / abar_previous
    beta = 1 - alpha
    mean = (abar_previous**0.5 * beta * x0_pred + alpha**0.5 * (1 - abar_previous) * x_t) / (1 - abar)
    return mean, beta * (1 - abar_previous) / (1 - abar)


def eliminate(
    x_t: Tensor,
    network: Network,
    alphas_cumprod: Tensor,
    t_star: int,
    num_inference_steps: int,
    seed: int,
    ids: Sequence[str],
) -> Tensor:
    """Return the image after ancestral steps t_star - 1 ... 0, respaced; no noise at the last one.

    With a single step this is x0_pred at t_star - 1.
    """
    timesteps = respaced_timesteps(t_star, num_inference_steps)
    for t, t_previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
        abar = float(alphas_cumprod[t])
        abar_previous = float(alphas_cumprod[t_previous]) if t_previous >= 0 else 1.0
        eps_pred = network(x_t, torch.full((len(x_t),), t, device=x_t.device, dtype=torch.int64))
        mean, variance = posterior(x_t, predict_x0(x_t, eps_pred, abar), abar, abar_previous)
        if t_previous >= 0:
            mean = mean + variance**0.5 * noise(seed, ids, t, tuple(x_t.shape[1:]), x_t.device)
        x_t = mean
    return x_t.clamp(-1, 1)


@torch.inference_mode()
def purify(
    x: Tensor, denoiser: Denoiser, t_star: int, num_inference_steps: int, seed: int, ids: Sequence[str]
) -> Tensor:
    """Return x (B, 3, H, W in [-1, 1]) absorbed to depth t_star and denoised again, in the same range."""
    schedule = denoiser.alphas_cumprod
    x_t = absorb(x, schedule, t_star, seed, ids)
    return eliminate(x_t, denoiser, schedule, t_star, num_inference_steps, seed, ids)


def to_model_range(images: Tensor) -> Tensor:
    """Turn uint8 (B, H, W, 3) into float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Turn float (B, 3, H, W) in [-1, 1] into uint8 (B, H, W, 3): rounded, never truncated."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
