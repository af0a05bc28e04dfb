"""The diffusion process: noise schedules and their respacing, the forward noise, and one reverse step.

The cosine schedule and respacing are those of Nichol & Dhariwal 2021, eq. 17 and section 4.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

IMAGE_CHANNELS = 3
# A number for a whole batch, as in sampling, or a tensor (B, 1, 1, 1) with one for each image, as in training.
Level = TypeVar("Level", float, Tensor)


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


def add_noise(x0: Tensor, epsilon: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return x_t of a batch with one timestep per image: x0, epsilon (B, 3, H, W), t (B,)."""
    abar = alphas_cumprod[t].to(x0.dtype).view(-1, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * epsilon


def predict_x0(x_t: Tensor, eps_pred: Tensor, abar: float) -> Tensor:
    """Return x0_pred clipped to [-1, 1] (Ho et al. 2020, eq. 15)."""
    return ((x_t - (1 - abar) ** 0.5 * eps_pred) / abar**0.5).clamp(-1, 1)


def split_output(output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (eps_pred, variance mix or None) of a network's output of 3 or 6 channels."""
    if output.shape[1] == 2 * IMAGE_CHANNELS:
        return output[:, :IMAGE_CHANNELS], output[:, IMAGE_CHANNELS:]
    return output, None


def posterior(x_t: Tensor, x0_pred: Tensor, abar: Level, abar_previous: Level) -> tuple[Tensor, Level]:
    """Return mean and variance of q(x_previous | x_t, x0_pred) (Ho et al. 2020, eq. 7)."""
    alpha = abar / abar_previous
    beta = 1 - alpha
    mean = (abar_previous**0.5 * beta * x0_pred + alpha**0.5 * (1 - abar_previous) * x_t) / (1 - abar)
    return mean, beta * (1 - abar_previous) / (1 - abar)


def learned_variance(mix: Tensor, abar: float, abar_previous: float) -> Tensor:
    """Return the variance exp(w log beta + (1 - w) log beta_tilde), w = (mix + 1) / 2 (Nichol & Dhariwal, eq. 15).

    Only for steps that end above t = 0, where beta_tilde is positive.
    """
    beta = 1 - abar / abar_previous
    low, high = math.log(beta * (1 - abar_previous) / (1 - abar)), math.log(beta)
    return torch.exp(mixed_log_variance(mix, low, high))


def mixed_log_variance(mix: Tensor, low: Level, high: Level) -> Tensor:
    """Return w high + (1 - w) low with w = (mix + 1) / 2, between the logarithms of beta_tilde and beta."""
    weight = (mix + 1) / 2
    return weight * high + (1 - weight) * low


def ddim_step(x_t: Tensor, x0_pred: Tensor, abar: float, abar_previous: float) -> Tensor:
    """Return x_previous without noise (Song et al. 2021, eq. 12 with sigma = 0)."""
    ratio = ((1 - abar_previous) / (1 - abar)) ** 0.5
    return ratio * x_t + (abar_previous**0.5 - ratio * abar**0.5) * x0_pred


def ancestral_step(
    x_t: Tensor, x0_pred: Tensor, mix: Tensor | None, drawn: Tensor, abar: float, abar_previous: float
) -> Tensor:
    """Return x_previous with the noise drawn for it, of the learned variance if there is one (Ho et al. 2020)."""
    mean, fixed = posterior(x_t, x0_pred, abar, abar_previous)
    deviation = fixed**0.5 if mix is None else learned_variance(mix, abar, abar_previous).sqrt()
    return mean + deviation * drawn
