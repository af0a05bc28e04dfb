"""Training losses and the figure of merit of a denoiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eclipse_ray.diffusion.model import Denoiser
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.sampler import Network, predict_x0, split_output


def add_noise(x0: Tensor, epsilon: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return x_t of a batch with one timestep an image: x0, epsilon (B, 3, H, W), t (B,)."""
    abar = alphas_cumprod[t].to(x0.dtype).view(-1, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * epsilon


def loss_simple(network: Network, x0: Tensor, epsilon: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return the mean squared error of eps_pred (Ho et al. 2020, eq. 14), a scalar."""
    eps_pred = network(add_noise(x0, epsilon, t, alphas_cumprod), t)
    return torch.nn.functional.mse_loss(eps_pred, epsilon)


def psnr(first: Tensor, second: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two batches in [-1, 1], over all their pixels."""
    error = torch.mean((first.double() - second.double()) ** 2)
    return 10 * math.log10(4 / max(float(error), 1e-12))


@torch.inference_mode()
def heldout_psnr(
    denoiser: Denoiser, x0: Tensor, t_star: int, seed: int = 0, batch_size: int = 64
) -> tuple[float, float]:
    """Return (denoised, noisy) PSNR in dB of clean images (N, 3, H, W in [-1, 1]) at depth t_star.

    Denoised is the one-step x0_pred; noisy is x_t divided by sqrt(abar). The noise is fixed by the seed.
    """
    abar = float(denoiser.alphas_cumprod[t_star - 1])
    ids = [f"heldout-{index}" for index in range(len(x0))]
    denoised, noisy = [], []
    for start in range(0, len(x0), batch_size):
        part = x0[start : start + batch_size]
        t = torch.full((len(part),), t_star - 1, device=x0.device)
        epsilon = noise(seed, ids[start : start + len(part)], t_star, tuple(part.shape[1:]), x0.device)
        x_t = add_noise(part, epsilon, t, denoiser.alphas_cumprod)
        denoised.append(predict_x0(x_t, split_output(denoiser(x_t, t))[0], abar))
        noisy.append(x_t / abar**0.5)
    return psnr(torch.cat(denoised), x0), psnr(torch.cat(noisy), x0)
