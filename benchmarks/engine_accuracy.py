"""Accuracy of victims that are trained on the output of each setting of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import Pixels, VictimJob, load, markdown, one_process_a_core, purified, victims

from eclipse_ray.config import Sampler
from eclipse_ray.datasets.memory import ImageSet
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.network import default_device

SEEDS, CHAIN_IMAGES = 3, 2000
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
