"""What decides: victims trained on what each setting of the engine leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import Pixels, VictimJob, fit, load, markdown, one_process_a_core, purified, victims
from engine_multiscale import fit_multiscale, purify_multiscale

from eclipse_ray.config import Sampler, Settings
from eclipse_ray.data.dataset import ImageSet
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.model import default_device

SEEDS, DEPTH_SEEDS = 3, 2
CHAIN_IMAGES, DEPTH_IMAGES = 2000, 3000
# What one process purifies at a time, so that both cores have work to the end.
PIECE = 500
TRAIN = {"clean": "sets/rest", "ar": "ar", "lsp": "lsp"}
# The first is the reference: the published chain with our own network.
SETTINGS: tuple[tuple[Sampler, int], ...] = (("ddpm", 100), ("ddpm", 10), ("dpm", 4), ("ddpm", 1))


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
    return _table("sampler, steps", names, list(TRAIN), found, SEEDS)


def depth_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Can denoising alone remove a low-frequency poison: depth, steps, several draws, noise at two scales."""
    images = {column: load(work, TRAIN[column], DEPTH_IMAGES) for column in ("clean", "lsp")}
    sparse = load(work, "sets/clean").images
    deep: Settings = {"denoiser.t_star": 250, "denoiser.t_max": 400, "denoiser.iterations": 1500}
    denoiser, _ = fit(sparse, deep)
    two_scales = fit_multiscale(sparse)
    jobs: dict[str, VictimJob] = {}
    for column, data in images.items():
        cases = {"undefended": data.images}
        for t_star, steps in ((100, 1), (200, 1), (400, 1), (400, 4)):
            cases[f"t_star {t_star}, {steps} step(s)"] = purified(denoiser, data, t_star, steps, "ddpm")
        draws = [purified(denoiser, data, 200, 1, "ddpm", seed) for seed in range(4)]
        cases["t_star 200, mean of 4 draws"] = np.rint(np.mean(draws, axis=0)).astype(np.uint8)
        cases["noise at two scales, 1 step"] = purify_multiscale(two_scales, data.images)
        for name, pixels in cases.items():
            jobs[f"{name}, {column}"] = _job(data, pixels, "none")
        print(f"purified {column}", flush=True)
    found = victims(jobs, load(work, "test/clean"), DEPTH_SEEDS)
    names = list(dict.fromkeys(key.rsplit(", ", 1)[0] for key in found))
    return _table("purification, no compensation", names, list(images), found, DEPTH_SEEDS)


def _purify_piece(work: Path, images: ImageSet, start: int, sampler: Sampler, steps: int) -> Pixels:
    torch.set_num_threads(1)
    part = slice(start, start + PIECE)
    denoiser = load_denoiser(work / "denoiser-2000", default_device())
    piece = ImageSet(images.ids[part], images.images[part], None, None)
    return purified(denoiser, piece, 100, steps, sampler)


def _job(images: ImageSet, pixels: Pixels, mode: Literal["none", "augment"]) -> VictimJob:
    assert images.labels is not None
    return VictimJob(pixels, images.labels, {"compensation.mode": mode})


def _table(
    head: str, names: list[str], columns: list[str], found: dict[str, tuple[float, float]], seeds: int
) -> tuple[str, list[dict[str, Any]]]:
    cells = [
        [f"{mean:.1f} ± {std:.1f}" for mean, std in (found[f"{name}, {c}"] for c in columns)] for name in names
    ]
    rows = [{"cell": name, "mean": mean, "std": std, "n": seeds} for name, (mean, std) in found.items()]
    return markdown([head, *columns], [[name, *row] for name, row in zip(names, cells, strict=True)]), rows
