"""A trial that the engine does not offer: diffusion whose noise lies at two scales, to reach low frequencies.

To the white noise of depth t comes noise on a coarse grid, spread bilinearly, in proportion to it. The network
predicts their sum, so one step gives x0_pred as ever. Whether that drops a low-frequency poison, `depth` asks.
"""

from __future__ import annotations

import math

import torch
from common import BATCH, Pixels
from torch import Tensor
from torch.nn import functional

from eclipse_ray.config import load_config
from eclipse_ray.diffusion.network import Denoiser, build_denoiser, build_unet, default_device
from eclipse_ray.diffusion.process import add_noise, predict_x0
from eclipse_ray.diffusion.sampling import to_model_range, to_uint8

GRID = 6
# Standard deviation of the coarse part, as a multiple of the white part's: 0.08 of the range at t_star = 100.
RATIO = 3.4
ITERATIONS, T_STAR, T_MAX, BATCH_SIZE = 1500, 100, 125, 16


def fit_multiscale(images: Pixels) -> Denoiser:
    """Fit the small network to noise at two scales, on uint8 (N, H, W, 3)."""
    torch.manual_seed(0)
    config = load_config(None, {"denoiser.block_out_channels": [24, 48]}).denoiser
    device = default_device()
    denoiser = build_denoiser(build_unet(config), config).to(device)
    optimizer = torch.optim.Adam(denoiser.parameters(), config.learning_rate)
    for iteration in range(ITERATIONS):
        optimizer.param_groups[0]["lr"] = (
            config.learning_rate * 0.5 * (1 + math.cos(math.pi * iteration / ITERATIONS))
        )
        x0 = to_model_range(torch.from_numpy(images[torch.randint(len(images), (BATCH_SIZE,)).numpy()])).to(device)
        t = torch.randint(T_MAX, (BATCH_SIZE,), device=device)
        epsilon = _noise(x0)
        loss = functional.mse_loss(denoiser(add_noise(x0, epsilon, t, denoiser.alphas_cumprod), t), epsilon)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 10)
        optimizer.step()
    return denoiser.eval()


@torch.no_grad()
def purify_multiscale(denoiser: Denoiser, images: Pixels) -> Pixels:
    """Return one-step x0_pred from depth t_star, uint8 (N, H, W, 3)."""
    torch.manual_seed(1)
    abar = float(denoiser.alphas_cumprod[T_STAR - 1])
    parts = []
    for start in range(0, len(images), BATCH):
        x0 = to_model_range(torch.from_numpy(images[start : start + BATCH])).to(default_device())
        t = torch.full((len(x0),), T_STAR - 1, device=x0.device)
        x_t = add_noise(x0, _noise(x0), t, denoiser.alphas_cumprod)
        parts.append(to_uint8(predict_x0(x_t, denoiser(x_t, t), abar)).cpu())
    return torch.cat(parts).numpy()


def _noise(x0: Tensor) -> Tensor:
    coarse = torch.randn(len(x0), x0.shape[1], GRID, GRID, device=x0.device)
    return torch.randn_like(x0) + RATIO * functional.interpolate(coarse, x0.shape[-2:], mode="bilinear")
