"""AR: autoregressive perturbations (Sandoval-Segura et al., arXiv 2206.03693).

The recursion, its starts and the selection of processes are those of the public code: coefficients N(0, 1)
divided by their sum, three trial signals within the norm, and a strong enough response of every filter kept
before to the last of them. Three things differ. The processes are found anew for each seed; the fixed sets that
the public code ships are the poison `ar-published`. The norms and the response are in float64, so a candidate near
a limit may be judged otherwise. Above 32 px a process must also stay bounded at the size of the images, in
proportion to its side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import noise
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.interface import AR_T, LabelledImages, PoisonSettings, draw_ids, scale_to_l2

Floats = NDArray[np.float64]

MARGIN = 4
"""Rows and columns cropped off the start of the signal."""
TAPS = tuple((row, column) for row in range(3) for column in range(3))[:8]
"""Offsets (rows, columns) of the eight known pixels in a window; the ninth is the pixel being written."""
TRIAL_SIZE, TRIAL_CORNERS, TRIAL_NORM, TRIAL_STARTS = 32, (4, 12), 50.0, 3
"""Side, sides of early corners, largest L2 norm over all channels, and number of the starts that try a process."""
MIN_RESPONSE, MIN_RESPONSE_MANY = 10.0, 3.0
"""Least response of each earlier process's filter to a new unit-norm signal, as published (10, 100 classes)."""
START_T, TRIAL_T, COEFFICIENTS_T = AR_T, AR_T + 1, AR_T + 2
"""Timesteps of an image's start, of the trial starts, and of the first chunk of candidates."""
CHUNK, CHUNKS, ATTEMPTS = 8192, 50, 8
"""Candidates drawn at once, how many times before those kept are given up, and how many times that may be."""


class Ar(PoisonSettings):
    """The settings of ar."""

    eps_255: float = Field(
        255.0, gt=0, description="L2 bound in 1/255, over all channels; published: 1 on [0, 1]."
    )

    def budget(self, shape: Sequence[int]) -> tuple[str, float]:
        """Return ("l2", bound on [0, 1])."""
        return "l2", self.eps_255 / 255


def ar_perturbation(data: LabelledImages, settings: Ar, seed: int, published: bool = False) -> Tensor:
    """Return the perturbation of each image; see `ClosedForm`.

    Each class and channel has its own linear process, which writes every pixel from the eight before it in
    its 3x3 window; each image (scope "class": each class) has its own Gaussian start. The result is
    scaled to the L2 bound over all channels. `published` takes the processes of the authors: class k the k-th of
    the set for 10 or 100 classes. Raises ConfigError when there are more classes than processes.
    """
    height, width = data.images.shape[1:3]
    keys = draw_ids(data, settings.scope)
    start = noise(seed, keys, START_T, (height + MARGIN, width + MARGIN, 3)).numpy().astype(np.float64)
    if published:
        found = published_processes(data.num_classes)
    else:
        found = processes(seed, data.num_classes, height, width)
    signal = generate(found[data.labels.numpy()], start)[:, MARGIN:, MARGIN:]
    return scale_to_l2(torch.from_numpy(np.ascontiguousarray(signal)), settings)


@lru_cache(maxsize=2)
def published_processes(num_classes: int) -> Floats:
    """Return the published coefficients, float64 (10 or 100, 3, 8). Raises ConfigError beyond 100 classes."""
    if num_classes > 100:
        raise ConfigError(f"poison ar-published: its authors published 100 processes, not {num_classes}; take ar")
    known = json.loads(files("eclipse_ray.poisons").joinpath("ar.json").read_text(encoding="utf-8"))
    return np.array(known["10" if num_classes <= 10 else "100"], np.float64)


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

    Candidates are tried in a fixed order and kept, as published, if they stay bounded on every trial start and
    the filter of each process kept before responds strongly to their signal. Of one seed in four, those kept
    first leave no room for ten: then others are tried. Raises ConfigError when no further process can be found.
    """
    most = 0
    for attempt in range(ATTEMPTS):
        candidates = chain.from_iterable(_bounded(seed, attempt * CHUNKS + chunk) for chunk in range(CHUNKS))
        chosen = _choose(candidates, seed, num_classes, height, width)
        if len(chosen) == num_classes:
            return np.stack(chosen)
        most = max(most, len(chosen))
    raise ConfigError(f"poison ar: found only {most} different processes for {num_classes} classes")


def _choose(
    candidates: Iterator[tuple[Floats, Floats]], seed: int, num_classes: int, height: int, width: int
) -> list[Floats]:
    """Return the first candidates, `num_classes` at most, that differ from all those chosen before."""
    threshold = MIN_RESPONSE if num_classes <= 10 else MIN_RESPONSE_MANY
    chosen: list[Floats] = []
    for taps, windows in candidates:
        if _responds(chosen, windows, threshold) and _bounded_at(seed, taps, height, width):
            chosen.append(taps)
            if len(chosen) == num_classes:
                break
    return chosen


def _bounded(seed: int, chunk: int) -> Iterator[tuple[Floats, Floats]]:
    """Yield (coefficients (3, 8), windows (N, 3, 9) of the unit-norm trial signal) of bounded candidates."""
    draws = noise(seed, ["ar-processes"], COEFFICIENTS_T + chunk, (CHUNK, 3, 8))[0].numpy().astype(np.float64)
    draws /= draws.sum(axis=2, keepdims=True)
    # The upper left corner of a signal needs only itself and has no larger norm: most candidates fail there.
    corners = [(0, size) for size in TRIAL_CORNERS]
    for index, size in [*corners, *((index, TRIAL_SIZE) for index in range(TRIAL_STARTS))]:
        start = noise(seed, [f"ar-start-{index}"], TRIAL_T, (TRIAL_SIZE + MARGIN, TRIAL_SIZE + MARGIN, 3))
        signals, norms = _trial(draws, start[:, : size + MARGIN, : size + MARGIN])
        # Not a number, where a signal overflowed, is not bounded either.
        kept = norms <= TRIAL_NORM
        draws, signals, norms = draws[kept], signals[kept], norms[kept]
    for taps, signal, norm in zip(draws, signals, norms, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(signal / norm, (3, 3), axis=(0, 1))
        yield taps, windows.reshape(-1, 3, 9)


def _trial(coefficients: Floats, start: Tensor) -> tuple[Floats, Floats]:
    """Return the signals (B, H, W, 3) of all candidates from one start (1, H + 4, W + 4, 3), and their norms."""
    starts = start.numpy().astype(np.float64).repeat(len(coefficients), axis=0)
    # An unbounded process overflows, which is what the trial is to find out.
    with np.errstate(over="ignore", invalid="ignore"):
        signals = generate(coefficients, starts)[:, MARGIN:, MARGIN:]
        return signals, np.asarray(np.sqrt(np.square(signals).sum(axis=(1, 2, 3))))


def _bounded_at(seed: int, taps: Floats, height: int, width: int) -> bool:
    if max(height, width) <= TRIAL_SIZE:
        return True
    start = noise(seed, ["ar-start-large"], TRIAL_T, (height + MARGIN, width + MARGIN, 3))
    limit = TRIAL_NORM * math.sqrt(height * width) / TRIAL_SIZE
    _, norms = _trial(taps[None], start)
    return bool(norms[0] <= limit)


def _responds(chosen: list[Floats], windows: Floats, threshold: float) -> bool:
    """Return whether the filter of every chosen process (its taps, then -1) responds at least `threshold`."""
    if not chosen:
        return True
    filters = np.concatenate([np.stack(chosen), np.full((len(chosen), 3, 1), -1.0)], axis=2)
    outputs = np.einsum("nck,fck->fn", windows, filters)
    return bool((np.maximum(outputs, 0).sum(axis=1) >= threshold).all())
