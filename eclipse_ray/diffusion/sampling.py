"""Absorb and eliminate: noise an image to depth t_star, then denoise it (arXiv 2406.15093, section 4).

Images are float32 (B, 3, H, W) in [-1, 1]. Timestep indices run from 0 to T - 1, so depth t_star is reached by
index t_star - 1. Noise keys: absorb uses t_star, the reverse step at index t uses t; so no key is used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclipse_ray.config import BATCH_PIXELS, TILE_OVERLAP, PurifyConfig, Sampler
from eclipse_ray.diffusion.filters import undo_known
from eclipse_ray.diffusion.network import Denoiser, Network, check_precision
from eclipse_ray.diffusion.noise import check_batch, noise
from eclipse_ray.diffusion.process import ancestral_step, ddim_step, predict_x0, respaced_timesteps, split_output
from eclipse_ray.diffusion.tiling import MIN_SIDE, tiled
from eclipse_ray.errors import ConfigError, InputError

# Bumped only when the pixels that purification gives change, so that other fixes do not orphan unfinished runs.
ENGINE_VERSION = 4

# Pixels of a batch beyond which a step is computed by bands of rows.
BAND_PIXELS = 2**20


def absorb(x: Tensor, alphas_cumprod: Tensor, t_star: int, seed: int, ids: Sequence[str]) -> Tensor:
    """Return x_t at depth t_star: sqrt(abar) x + sqrt(1 - abar) eps (Ho et al. 2020, eq. 4)."""
    abar = float(alphas_cumprod[t_star - 1])
    return abar**0.5 * x + (1 - abar) ** 0.5 * noise(seed, ids, t_star, tuple(x.shape[1:]), x.device)


def _in_bands(
    x_t: Tensor, x0_pred: Tensor, mix: Tensor | None, drawn: Tensor, abar: float, abar_previous: float
) -> Tensor:
    """Return ancestral_step, of large images by bands of rows: the same values with small temporaries."""
    height = x_t.shape[2]
    rows = max(1, BAND_PIXELS // (len(x_t) * x_t.shape[3]))
    if rows >= height:
        return ancestral_step(x_t, x0_pred, mix, drawn, abar, abar_previous)
    result = torch.empty_like(x_t)
    for top in range(0, height, rows):
        band = (slice(None), slice(None), slice(top, top + rows))
        mix_band = None if mix is None else mix[band]
        result[band] = ancestral_step(x_t[band], x0_pred[band], mix_band, drawn[band], abar, abar_previous)
    return result


def eliminate(
    x_t: Tensor,
    network: Network,
    alphas_cumprod: Tensor,
    t_star: int,
    num_inference_steps: int,
    seed: int,
    ids: Sequence[str],
    sampler: Sampler = "ddpm",
) -> Tensor:
    """Return the image after respaced steps from t_star - 1 to the clean end.

    "ddpm" is ancestral, with the learned variance if the network has one and no noise at the last step (Ho et al.
    2020, algorithm 2); "ddim" is deterministic. With a single step both are x0_pred at t_star - 1.
    """
    timesteps = respaced_timesteps(t_star, num_inference_steps)
    for index, t in enumerate(timesteps):
        abar = float(alphas_cumprod[t])
        output = network(x_t, torch.full((len(x_t),), t, device=x_t.device, dtype=torch.int64))
        eps_pred, mix = split_output(output)
        x0_pred = predict_x0(x_t, eps_pred, abar)
        if index == len(timesteps) - 1:
            return x0_pred
        # Of a large photograph each of these takes hundreds of MiB: let go of what is not needed again.
        del output, eps_pred
        abar_previous = float(alphas_cumprod[timesteps[index + 1]])
        if sampler == "ddpm":
            drawn = noise(seed, ids, t, tuple(x_t.shape[1:]), x_t.device)
            x_t = _in_bands(x_t, x0_pred, mix, drawn, abar, abar_previous)
            del drawn
        else:
            x_t = ddim_step(x_t, x0_pred, abar, abar_previous)
        del x0_pred, mix
    raise AssertionError("respaced_timesteps returns at least one timestep")


@torch.inference_mode()
def purify(
    x: Tensor,
    denoiser: Denoiser,
    t_star: int,
    num_inference_steps: int,
    seed: int,
    ids: Sequence[str],
    sampler: Sampler | None = None,
    *,
    tile: int | None = None,
    tile_overlap: int = TILE_OVERLAP,
    batch_pixels: int = BATCH_PIXELS,
) -> Tensor:
    """Return x (B, 3, H, W in [-1, 1]) absorbed to depth t_star and denoised again, in the same range.

    Images larger than `tile` (None: what suits the network) go through it in tiles that overlap by `tile_overlap`,
    together at most `batch_pixels` pixels at a time.
    """
    schedule = denoiser.alphas_cumprod
    network = tiled(denoiser, tile or denoiser.tile, tile_overlap, denoiser.size_multiple, batch_pixels)
    x_t = absorb(x, schedule, t_star, seed, ids)
    return eliminate(x_t, network, schedule, t_star, num_inference_steps, seed, ids, sampler or denoiser.sampler)


def restore_gray(x: Tensor, images: Tensor) -> Tensor:
    """Return x (B, 3, H, W), of those images (uint8 (B, H, W, 3)) that are gray throughout the channels' mean.

    The mean and not luma: the three channels are equally noisy estimates of one gray value, and of all weights
    equal ones leave the least variance (1/3 of one channel's; luma 0.45).
    """
    gray = (images == images[..., :1]).flatten(1).all(dim=1)
    if not bool(gray.any()):
        return x
    return torch.where(gray[:, None, None, None], x.mean(dim=1, keepdim=True), x)


def to_model_range(images: Tensor) -> Tensor:
    """Turn uint8 (B, H, W, 3) into float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Turn float (B, 3, H, W) in [-1, 1] into uint8 (B, H, W, 3): rounded, never truncated."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class Trained(Protocol):
    """What a denoiser says of its use: a `Denoiser`, or what is known of one that is not trained yet."""

    t_max: int
    t_star: int
    num_inference_steps: int
    tile: int
    int8: bool
    alphas_cumprod: Tensor


def check_purification(denoiser: Trained, settings: PurifyConfig) -> tuple[int, int]:
    """Return (t_star, num_inference_steps) of `settings`. Raises ConfigError for what `denoiser` would refuse."""
    check_tile(denoiser, settings.tile, settings.tile_overlap)
    check_precision(denoiser.int8, settings.precision)
    return check_depth(denoiser, settings.t_star, settings.num_inference_steps)


def check_depth(denoiser: Trained, t_star: int | None, num_inference_steps: int | None) -> tuple[int, int]:
    """Return (t_star, num_inference_steps) with the denoiser's recommendation for None.

    Raises ConfigError if the denoiser was not trained at that depth or there are more steps than timesteps.
    """
    depth = denoiser.t_star if t_star is None else t_star
    steps = min(denoiser.num_inference_steps, depth) if num_inference_steps is None else num_inference_steps
    if not 1 <= depth <= denoiser.t_max:
        raise ConfigError(
            f"purify.t_star {depth} is outside 1..{denoiser.t_max}, the timesteps this denoiser is trained on; "
            "lower it or train with a higher denoiser.t_max"
        )
    if not 1 <= steps <= depth:
        raise ConfigError(f"purify.num_inference_steps {steps} must lie in 1..{depth}, the depth t_star")
    return depth, steps


def check_tile(denoiser: Trained, tile: int | None, tile_overlap: int) -> int:
    """Return the side of a tile, of None the network's own. Raises ConfigError if over half of it overlaps."""
    side = tile or denoiser.tile
    if 2 * tile_overlap > side:
        raise ConfigError(f"purify.tile_overlap {tile_overlap} exceeds half of a tile, which has {side} pixels")
    return side


def purify_images(
    images: Tensor | NDArray[np.uint8],
    denoiser: Denoiser,
    *,
    t_star: int | None = None,
    num_inference_steps: int | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    ids: Sequence[str],
    tile: int | None = None,
    tile_overlap: int = TILE_OVERLAP,
    batch_pixels: int = BATCH_PIXELS,
) -> Tensor:
    """Return purified images, uint8 (B, H, W, 3) on the CPU, from the same; None takes the recommendation.

    Filters that the denoiser knows of some images are undone first. Each image's result depends on (seed, its id)
    and, within 1/255, on nothing else. Both sides may have any length from 16 on; above `tile` they are covered
    by tiles overlapping by `tile_overlap`. An image whose three channels are equal everywhere keeps them equal.
    Raises ConfigError for a depth that was not trained, an unknown sampler or an overlap of more than half a tile,
    and InputError for a shape that cannot be purified, or the folder of a denoiser.
    """
    if not isinstance(denoiser, Denoiser):
        raise InputError(f"{denoiser!r} is no denoiser in memory; load it with load_denoiser")
    # torch takes neither arrays that cannot be written nor negative strides, as of a flipped view.
    batch = images if isinstance(images, Tensor) else torch.from_numpy(np.require(images, requirements=["C", "W"]))
    check_batch(batch, ids)
    if sampler not in (None, *get_args(Sampler)):
        raise ConfigError(f"purify.sampler {sampler}: expected one of {', '.join(get_args(Sampler))}")
    check_side(int(batch.shape[1]), int(batch.shape[2]))
    depth, steps = check_depth(denoiser, t_star, num_inference_steps)
    tile = check_tile(denoiser, tile, tile_overlap)
    if not len(batch):
        return batch.cpu()
    batch = undo_known(batch, denoiser.filters).to(denoiser.alphas_cumprod.device)
    purified = purify(
        to_model_range(batch).contiguous(memory_format=torch.channels_last),
        denoiser,
        depth,
        steps,
        seed,
        ids,
        sampler,
        tile=tile,
        tile_overlap=tile_overlap,
        batch_pixels=batch_pixels,
    )
    return to_uint8(restore_gray(purified, batch)).cpu()


def check_side(height: int, width: int) -> None:
    """Raise InputError for an image too small to purify, in pixels."""
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"the image has {width}x{height} pixels; purification needs at least {MIN_SIDE} on each side: "
            "leave it out, or enlarge it with data.resize"
        )
