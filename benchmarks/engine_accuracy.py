"""What decides: victims trained on what each setting of the engine leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import VictimJob, fit, load, markdown, purified, victims

from eclipse_ray.config import Settings
from eclipse_ray.data.dataset import ImageSet
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.model import default_device

SEEDS = 3
CHAIN_IMAGES, DEPTH_IMAGES = 2000, 5000
TRAIN = {"clean": "sets/rest", "ar": "ar", "lsp": "lsp"}
MODES = ("none", "augment")
# The first is the reference: the published chain with our own network.
SETTINGS = (("ddpm", 100), ("ddpm", 10), ("ddim", 4), ("dpm", 4), ("ddpm", 2), ("ddpm", 1))


def victims_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Victim accuracy of every (sampler, steps) against the 100-step float32 chain, 2,000 training images."""
    denoiser = load_denoiser(work / "denoiser-2000", default_device())
    jobs: dict[str, VictimJob] = {}
    for column, name in TRAIN.items():
        images = load(work, name, CHAIN_IMAGES)
        jobs[f"undefended, {column}"] = _job(images, images.images, "none")
        for sampler, steps in SETTINGS:
            pixels = purified(denoiser, images, 100, steps, sampler)
            jobs[f"{sampler} {steps}, {column}"] = _job(images, pixels, "augment")
            print(f"purified {column}: {sampler} {steps}", flush=True)
    found = victims(jobs, load(work, "test/clean"), SEEDS)
    names = ["undefended", *(f"{sampler} {steps}" for sampler, steps in SETTINGS)]
    table = [[name, *(_text(found[f"{name}, {column}"]) for column in TRAIN)] for name in names]
    rows = [{"cell": name, "mean": mean, "std": std} for name, (mean, std) in found.items()]
    return markdown(["sampler, steps", *TRAIN], table), rows


def depth_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """What could remove a low-frequency poison: depth, steps, several draws, noise on a coarser grid as well."""
    images = {column: load(work, name, DEPTH_IMAGES) for column, name in TRAIN.items()}
    sparse = load(work, "sets/clean").images
    deep: Settings = {"denoiser.t_star": 250, "denoiser.t_max": 400}
    denoiser, _ = fit(sparse, deep)
    jobs: dict[str, VictimJob] = {}
    for column, data in images.items():
        cases = {"undefended": data.images}
        for t_star, steps in ((100, 1), (200, 1), (400, 1), (400, 4)):
            cases[f"t_star {t_star}, {steps} step(s)"] = purified(denoiser, data, t_star, steps, "ddpm")
        draws = [purified(denoiser, data, 200, 1, "ddpm", seed) for seed in range(4)]
        cases["t_star 200, mean of 4 draws"] = np.rint(np.mean(draws, axis=0)).astype(np.uint8)
        for name, pixels in cases.items():
            for mode in MODES:
                jobs[f"{name}, {column}, {mode}"] = _job(data, pixels, mode)
    found = victims(jobs, load(work, "test/clean"), SEEDS)
    names = list(dict.fromkeys(key.rsplit(", ", 2)[0] for key in found))
    head = ["purification", *(f"{column}, {mode}" for column in TRAIN for mode in MODES)]
    table = [
        [name, *(_text(found[f"{name}, {column}, {mode}"]) for column in TRAIN for mode in MODES)]
        for name in names
    ]
    rows = [{"cell": name, "mean": mean, "std": std} for name, (mean, std) in found.items()]
    return markdown(head, table), rows


def _job(images: ImageSet, pixels: Any, mode: str) -> VictimJob:
    assert images.labels is not None
    return VictimJob(pixels, images.labels, {"compensation.mode": mode})


def _text(value: tuple[float, float]) -> str:
    return f"{value[0]:.1f} ± {value[1]:.1f}"
