"""Accuracy of victims that are trained on the output of each setting of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import Pixels, VictimJob, fit, load, markdown, one_process_a_core, purified, victims
from engine_multiscale import fit_multiscale, purify_multiscale

from eclipse_ray.config import Sampler, Settings
from eclipse_ray.datasets.memory import ImageSet
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.network import Denoiser, default_device
from eclipse_ray.quality import psnr

SEEDS, DEPTH_SEEDS = 3, 2
CHAIN_IMAGES, LEFT_IMAGES = 2000, 128
DEPTH_ITERATIONS = 1500
# Settings of `depth` that victims are trained on.
TRAINED_ON = ("t_star 200, 1 step(s)", "t_star 400, 4 step(s)", "noise at two scales, 1 step")
# What one process purifies at a time, so that both cores have work to the end.
PIECE = 500
TRAIN = {"clean": "sets/rest", "ar": "ar", "lsp": "lsp"}
# The first is the reference: the published chain with our own network.
SETTINGS: tuple[tuple[Sampler, int], ...] = (("ddpm", 100), ("ddpm", 10), ("ddpm", 1))


def victims_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Victim accuracy of every (sampler, steps) against the 100-step float32 chain, 2,000 training images."""
    jobs: dict[str, VictimJob] = {}
    sets = {column: load(work, name, CHAIN_IMAGES) for column, name in TRAIN.items()}
    with one_process_a_core() as pool:
        pieces = {
            (sampler, steps, column): [
                pool.submit(_purify_piece, work, images, start, sampler, steps)
                for start in range(0, CHAIN_IMAGES, PIECE)
            ]
            for sampler, steps in SETTINGS
            for column, images in sets.items()
        }
        for (sampler, steps, column), futures in pieces.items():
            pixels = np.concatenate([future.result() for future in futures])
            jobs[f"{sampler} {steps}, {column}"] = _job(sets[column], pixels, "augment")
            print(f"purified {column}: {sampler} {steps}", flush=True)
    for column, images in sets.items():
        jobs[f"undefended, {column}"] = _job(images, images.images, "none")
    found = victims(jobs, load(work, "test/clean"), SEEDS)
    names = ["undefended", *(f"{sampler} {steps}" for sampler, steps in SETTINGS)]
    return _table("sampler, steps", names, list(TRAIN), found)


def depth_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Can denoising alone remove a low-frequency poison: depth, steps, several draws, noise at two scales.

    Of every setting the energy left of LSP and the PSNR; of some also victims, without compensation.
    """
    sparse = load(work, "sets/clean").images
    with one_process_a_core() as pool:
        deep, coarse = pool.submit(_fit_deep, sparse), pool.submit(fit_multiscale, sparse)
        denoiser, two_scales = deep.result(), coarse.result()
    cases: dict[str, Callable[[ImageSet], Pixels]] = {
        f"t_star {t_star}, {steps} step(s)": partial(_denoised, denoiser, t_star, steps)
        for t_star, steps in ((100, 1), (200, 1), (200, 4), (400, 1), (400, 4))
    }
    cases["t_star 200, mean of 4 draws"] = partial(_mean_of_draws, denoiser)
    cases["noise at two scales, 1 step"] = lambda images: purify_multiscale(two_scales, images.images)
    clean, poisoned = (load(work, name, LEFT_IMAGES) for name in ("sets/rest", "lsp"))
    left = {name: _left(case(clean), case(poisoned), clean, poisoned) for name, case in cases.items()}
    print(left, flush=True)
    jobs: dict[str, VictimJob] = {}
    for column in ("clean", "lsp"):
        images = load(work, TRAIN[column], CHAIN_IMAGES)
        jobs[f"undefended, {column}"] = _job(images, images.images, "none")
        for name in TRAINED_ON:
            jobs[f"{name}, {column}"] = _job(images, cases[name](images), "none")
        print(f"purified {column}", flush=True)
    found = victims(jobs, load(work, "test/clean"), DEPTH_SEEDS)
    head = ["purification, no compensation", "LSP left", "PSNR, clean", "victim, clean", "victim, LSP"]
    table = [
        [name, f"{100 * share:.0f} %", f"{decibel:.2f}"]
        + [_cell(found[key]) if (key := f"{name}, {column}") in found else "" for column in ("clean", "lsp")]
        for name, (share, decibel) in {"undefended": (1.0, math.inf), **left}.items()
    ]
    rows: list[dict[str, Any]] = [
        {"setting": name, "lsp_left": share, "psnr": decibel} for name, (share, decibel) in left.items()
    ]
    rows += [{"cell": name, "mean": mean, "std": std, "n": DEPTH_SEEDS} for name, (mean, std) in found.items()]
    return markdown(head, table), rows


def _fit_deep(sparse: Pixels) -> Denoiser:
    settings: Settings = {"denoiser.t_star": 250, "denoiser.t_max": 400, "denoiser.iterations": DEPTH_ITERATIONS}
    return fit(sparse, settings)[0]


def _denoised(denoiser: Denoiser, t_star: int, steps: int, images: ImageSet) -> Pixels:
    return purified(denoiser, images, t_star, steps, "ddpm")


def _mean_of_draws(denoiser: Denoiser, images: ImageSet) -> Pixels:
    draws = [purified(denoiser, images, 200, 1, "ddpm", seed) for seed in range(4)]
    mean: Pixels = np.rint(np.mean(draws, axis=0)).astype(np.uint8)
    return mean


def _left(result: Pixels, of_poisoned: Pixels, clean: ImageSet, poisoned: ImageSet) -> tuple[float, float]:
    """Return which part of the poison's energy is left, and the PSNR of the purified clean images."""
    change = poisoned.images.astype(float) - clean.images
    left = of_poisoned.astype(float) - result
    both = (torch.from_numpy(x) for x in (result, clean.images))
    return float((left**2).sum() / (change**2).sum()), psnr(*both)


def _cell(value: tuple[float, float]) -> str:
    return f"{value[0]:.1f} ± {value[1]:.1f}"


def _purify_piece(work: Path, images: ImageSet, start: int, sampler: Sampler, steps: int) -> Pixels:
    torch.set_num_threads(1)
    part = range(start, min(start + PIECE, len(images.ids)))
    denoiser = load_denoiser(work / "denoiser-2000", default_device())
    piece = images.take(part)
    return purified(denoiser, piece, 100, steps, sampler)


def _job(images: ImageSet, pixels: Pixels, mode: Literal["none", "augment"]) -> VictimJob:
    assert images.labels is not None
    return VictimJob(pixels, images.labels, {"compensation.mode": mode})


def _table(
    head: str, names: list[str], columns: list[str], found: dict[str, tuple[float, float]]
) -> tuple[str, list[dict[str, Any]]]:
    cells = [[_cell(found[f"{name}, {column}"]) for column in columns] for name in names]
    rows = [{"cell": name, "mean": mean, "std": std, "n": SEEDS} for name, (mean, std) in found.items()]
    return markdown([head, *columns], [[name, *row] for name, row in zip(names, cells, strict=True)]), rows
