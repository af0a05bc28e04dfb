"""Training losses and the figure of merit of a denoiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eclipse_ray.diffusion.model import IMAGE_CHANNELS, Denoiser, Network
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.sampler import mixed_log_variance, posterior, predict_x0, split_output


def add_noise(x0: Tensor, epsilon: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return x_t of a batch with one timestep an image: x0, epsilon (B, 3, H, W), t (B,)."""
    abar = alphas_cumprod[t].to(x0.dtype).view(-1, 1, 1, 1)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * epsilon


def loss_simple(eps_pred: Tensor, epsilon: Tensor) -> Tensor:
    """Return the mean squared error of eps_pred of each image (B,), from (B, 3, H, W) (Ho et al. 2020, eq. 14)."""
    return (eps_pred - epsilon).square().mean(dim=(1, 2, 3))


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(other_mean, other_variance)) in nats, element by element."""
    log_ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (torch.exp(log_ratio) - 1 - log_ratio + distance)


def decoder_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log of the probability that a Gaussian falls into the 8-bit level of x0 (Ho et al. 2020, eq. 13).

    x0 lies on the levels in [-1, 1]; the lowest and the highest take the tails. Nats, element by element; at most
    -log(1e-12), as in the published code.
    """
    scale = torch.exp(-0.5 * log_variance)
    upper = torch.where(x0 > 1 - 1 / 255, math.inf, (x0 + 1 / 255 - mean) * scale)
    lower = torch.where(x0 < -1 + 1 / 255, -math.inf, (x0 - 1 / 255 - mean) * scale)
    # Mirrored into the lower tail, and by erfc, so that the difference of two small numbers keeps its digits.
    mirror = lower + upper > 0
    high, low = torch.where(mirror, -lower, upper), torch.where(mirror, -upper, lower)
    probability = 0.5 * (torch.erfc(-high / math.sqrt(2)) - torch.erfc(-low / math.sqrt(2)))
    return -torch.log(probability.clamp(min=1e-12))


def loss_vlb(output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return the term L_t of the variational bound of each image (B,), bits per dimension (Ho et al. 2020, eq. 5).

    output is (B, 6, H, W), eps_pred and variance mix; x0 and x_t (B, 3, H, W); t (B,). Only the variance learns
    from it: eps_pred is detached (Nichol & Dhariwal 2021, section 3.1). x0_pred is not clipped.
    """
    eps_pred, mix = output.detach()[:, :IMAGE_CHANNELS].double(), output[:, IMAGE_CHANNELS:].double()
    # float64 throughout: betas near t = 0 are differences of numbers that agree in five digits.
    x0, x_t = x0.double(), x_t.double()
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    abar, abar_previous = alphas_cumprod[t].view(-1, 1, 1, 1), before[t].view(-1, 1, 1, 1)
    beta = 1 - alphas_cumprod / before
    beta_tilde = beta * (1 - before) / (1 - alphas_cumprod)
    # beta_tilde of t = 0 is zero; the published code puts that of t = 1 in its place.
    low, high = beta_tilde[t.clamp(min=1)].log().view(-1, 1, 1, 1), beta[t].log().view(-1, 1, 1, 1)
    true_mean, _ = posterior(x_t, x0, abar, abar_previous)
    x0_pred = (x_t - (1 - abar).sqrt() * eps_pred) / abar.sqrt()
    mean, _ = posterior(x_t, x0_pred, abar, abar_previous)
    log_variance = mixed_log_variance(mix, low, high)
    divergence = gaussian_kl(true_mean, low, mean, log_variance)
    nats = torch.where(t.view(-1, 1, 1, 1) == 0, decoder_nll(x0, mean, log_variance), divergence)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def loss_hybrid(
    network: Network, x0: Tensor, epsilon: Tensor, t: Tensor, alphas_cumprod: Tensor, vlb_weight: float
) -> Tensor:
    """Return the training loss of each image (B,): loss_simple, plus vlb_weight T loss_vlb for learned variances.

    Nichol & Dhariwal 2021, eq. 16: the bound is a sum over T timesteps, so a drawn term counts T times.
    """
    x_t = add_noise(x0, epsilon, t, alphas_cumprod)
    output = network(x_t, t)
    eps_pred, mix = split_output(output)
    simple = loss_simple(eps_pred, epsilon)
    if mix is None:
        return simple
    bound = loss_vlb(output, x0, x_t, t, alphas_cumprod)
    return simple + vlb_weight * len(alphas_cumprod) * bound.to(simple.dtype)


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
