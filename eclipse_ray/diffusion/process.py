"""The cosine noise schedule and its respacing (Nichol & Dhariwal 2021, eq. 17 and section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_alphas_cumprod(num_train_timesteps: int) -> Tensor:
    """Return alphas_cumprod, float64 (T,), of the cosine schedule with betas capped at 0.999."""
    levels = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    signal = torch.cos((levels + 0.008) / 1.008 * (math.pi / 2)) ** 2
    betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def linear_alphas_cumprod(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return alphas_cumprod, float64 (T,), of betas rising evenly (Ho et al. 2020, section 4)."""
    betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


def linear_betas(num_train_timesteps: int) -> tuple[float, float]:
    """Return (first, last) beta of the linear schedule, scaled with 1000 / T as the published code does."""
    return 0.1 / num_train_timesteps, 20.0 / num_train_timesteps


def respaced_timesteps(t_star: int, num_inference_steps: int) -> list[int]:
    """Return the timesteps to visit, descending from t_star - 1, evenly spread so that all strides are alike.

    The last one is a stride above the clean image, not 0, where denoising has nothing left to do (diffusers calls
    this spacing "trailing"). One step visits t_star - 1 alone; t_star steps visit every timestep. Raises
    ValueError if the number of steps is not in 1..t_star.
    """
    if not 1 <= num_inference_steps <= t_star:
        raise ValueError(f"num_inference_steps {num_inference_steps} must lie in 1..t_star = {t_star}")
    return [t_star - 1 - index * t_star // num_inference_steps for index in range(num_inference_steps)]


def noise_std(alphas_cumprod: Tensor, t: int) -> float:
    """Return the standard deviation of the noise at timestep t, on images in [-1, 1]."""
    return math.sqrt(1 - float(alphas_cumprod[t]))
