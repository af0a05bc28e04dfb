"""AR: autoregressive perturbations (Sandoval-Segura et al., arXiv 2206.03693)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eclipse_ray.config import PoisonConfig
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.budget import AR_T, budget, check_inputs, class_id, draw_ids, scale_to_l2

Floats = NDArray[np.float64]

MARGIN = 4
"""Rows and columns cropped off the start of the signal."""
TAPS = tuple((row, column) for row in range(3) for column in range(3))[:8]
"""Offsets (rows, columns) of the eight known pixels in a window; the ninth is the pixel being written."""
TRIAL_NORM = 50.0
"""Largest L2 norm of a process's trial signal over 32x32 pixels; larger ones are discarded."""
MIN_DIFFERENCE = 0.05
"""Least error, relative to the signal, of a process that predicts another process's trial signal."""
START_T, TRIAL_T, COEFFICIENTS_T = AR_T, AR_T + 1, AR_T + 2
"""Timesteps of an image's start, of the trial start, and of the first attempt at coefficients."""
ATTEMPTS = 2**12
TRIALS = 16
"""Draws tried at once; only speed depends on it."""


def ar_perturbation(
    images: Tensor, labels: Tensor, ids: Sequence[str], config: PoisonConfig, seed: int, num_classes: int
) -> Tensor:
    """Return the perturbation, float32 (B, H, W, 3) on [0, 1], of uint8 `images` (B, H, W, 3).

    Each class and channel has its own linear process, which writes every pixel from the eight before it in
    its 3x3 window; each image (scope "class": each class) has its own Gaussian start. The result is
    scaled to the L2 bound over all channels. Raises InputError for an inconsistent batch, ConfigError when
    there are more classes than processes to be found.
    """
    values = check_inputs(images, labels, ids, num_classes)
    shape = tuple(images.shape[1:])
    height, width = shape[0], shape[1]
    if not values:
        return torch.zeros(images.shape)
    keys = draw_ids(values, ids, config.scope or "sample")
    start = noise(seed, keys, START_T, (height + MARGIN, width + MARGIN, 3)).numpy().astype(np.float64)
    coefficients = processes(seed, num_classes, height, width)[values]
    signal = generate(coefficients, start)[:, MARGIN:, MARGIN:]
    return scale_to_l2(torch.from_numpy(np.ascontiguousarray(signal)), budget(config, shape)[1])


def generate(coefficients: Floats, start: Floats) -> Floats:
    """Return float64 signals (B, H, W, C) that continue `start` (B, H, W, C) by `coefficients` (B, C, 8).

    Pixels are overwritten in raster order from (2, 2); the two first rows and columns stay.
    """
    width = start.shape[2]
    # Pixel-major, so that one step of the recursion touches one contiguous (B, C) slice of all classes.
    signal = np.ascontiguousarray(start.transpose(1, 2, 0, 3))
    taps = np.ascontiguousarray(coefficients.transpose(2, 0, 1))
    for row in range(2, len(signal)):
        known = np.zeros_like(signal[0, 2:])
        for index, (down, right) in enumerate(TAPS[:6]):
            known += taps[index] * signal[row - 2 + down, right : right + width - 2]
        line = signal[row]
        for column in range(2, width):
            line[column] = known[column - 2] + taps[6] * line[column - 2] + taps[7] * line[column - 1]
    return signal.transpose(2, 0, 1, 3)


@lru_cache(maxsize=16)
def processes(seed: int, num_classes: int, height: int, width: int) -> Floats:
    """Return the coefficients, float64 (num_classes, 3, 8), of every class and channel.

    They are chosen class after class among draws keyed by class and attempt: bounded on a trial of this
    image size, and unable to predict the trial signals of those already chosen. Raises ConfigError when
    no further process can be found.
    """
    chosen: list[Floats] = []
    windows: list[Floats] = []
    for label in range(num_classes):
        wanted = len(chosen) + 3
        for first in range(0, ATTEMPTS, TRIALS):
            for taps, gram in _bounded(seed, label, height, width, first):
                if len(chosen) < wanted and _differs(taps, windows):
                    chosen.append(taps)
                    windows.append(gram)
            if len(chosen) == wanted:
                break
        else:
            raise ConfigError(f"poison ar: no further bounded process found for class {label} of {num_classes}")
    return np.stack(chosen).reshape(num_classes, 3, 8)


def _bounded(seed: int, label: int, height: int, width: int, first: int) -> list[tuple[Floats, Floats]]:
    """Return those of the next TRIALS draws that stay bounded, each with its trial's Gram matrix (9, 9).

    The Gram matrix is that of all 3x3 windows of the trial signal.
    """
    key = [class_id(label)]
    steps = range(COEFFICIENTS_T + first, COEFFICIENTS_T + first + TRIALS)
    draws = np.concatenate([noise(seed, key, step, (8,)).numpy().astype(np.float64) for step in steps])
    draws /= draws.sum(axis=1, keepdims=True)
    start = noise(seed, key, TRIAL_T, (height + MARGIN, width + MARGIN, 1)).numpy().astype(np.float64)
    # An unbounded process overflows, which is what the trial is to find out.
    with np.errstate(over="ignore", invalid="ignore"):
        signals = generate(draws[:, None], start.repeat(TRIALS, axis=0))[:, MARGIN:, MARGIN:, 0]
        norms = np.sqrt(np.square(signals).sum(axis=(1, 2)))
    kept = []
    for index in np.flatnonzero(norms <= TRIAL_NORM * math.sqrt(height * width) / 32):
        patches = np.lib.stride_tricks.sliding_window_view(signals[index], (3, 3)).reshape(-1, 9)
        kept.append((draws[index], np.einsum("ni,nj->ij", patches, patches)))
    return kept


def _differs(taps: Floats, windows: list[Floats]) -> bool:
    if not windows:
        return True
    error = np.append(taps, -1.0)
    grams = np.stack(windows)
    residual = np.einsum("i,nij,j->n", error, grams, error)
    return bool((residual >= MIN_DIFFERENCE**2 * grams[:, 8, 8]).all())
