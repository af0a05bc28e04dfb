"""What the engine's benchmarks share: images, fitting, purifying, victims in processes. No Ray, no cluster."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eclipse_ray.config import Sampler, Settings, load_config
from eclipse_ray.datasets.memory import ImageSet, load_images
from eclipse_ray.diffusion.checkpoint import Card, save_denoiser
from eclipse_ray.diffusion.network import Denoiser, build_denoiser, build_unet, default_device
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.diffusion.training import Progress, run_fit, split_heldout, start_fit
from eclipse_ray.victims.training import train_victim

BATCH = 64
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class VictimJob:
    """One cell of a table: training images, their labels, and how the victim is trained."""

    images: Pixels
    labels: NDArray[np.integer]
    settings: Settings


def load(work: Path, name: str, count: int | None = None) -> ImageSet:
    """Return the first images of a dataset that `benchmarks/cifar10.py --steps prepare` wrote below `work`."""
    return load_images(str(work / name), load_config().data, limit=count)


# The paper's depth and the network with which these tables were made; configs/reduced.yaml compares depths.
SHALLOW: Settings = {"denoiser.preset": "unet", "denoiser.t_star": 100, "denoiser.iterations": 2000}


def machine() -> str:
    """Return the device, cores, torch and Python of this run, and the date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return f"{device}; torch {torch.__version__}; Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}"


def untrained(settings: Settings) -> Denoiser:
    """Return a denoiser with drawn weights, which takes as long as a trained one."""
    config = load_config(None, settings).denoiser
    torch.manual_seed(0)
    return build_denoiser(build_unet(config), config).eval()


def write_untrained(folder: str, settings: Settings) -> None:
    """Write `untrained` as a folder that `purify` opens; its card claims what nobody measured."""
    denoiser = untrained(settings)
    card = Card(
        t_max=denoiser.t_max,
        t_star=denoiser.t_star,
        num_inference_steps=denoiser.num_inference_steps,
        iterations=0,
        denoise_psnr=20.0,
        noisy_psnr=20.0,
        sparse_images=0,
        sparse_hashes=[],
        fingerprint="benchmark",
        settings={},
    )
    save_denoiser(folder, denoiser, card)


def fit(images: Pixels, settings: Settings) -> tuple[Denoiser, list[Progress]]:
    """Fit a denoiser on uint8 (N, H, W, 3), and return it with its curve; 5 % are held out by seed 0."""
    config = load_config(None, {**SHALLOW, **settings}).denoiser
    device = default_device()
    pixels = torch.from_numpy(images.copy())
    trained, held = split_heldout(len(pixels), config.heldout_fraction, 0)
    state = start_fit(config, 0, device)
    curve: list[Progress] = []
    run_fit(state, pixels[trained].to(device), pixels[held].to(device), 0, curve.append, lambda _: None)
    return state.averaged(), curve


def purified(
    denoiser: Denoiser, images: ImageSet, t_star: int, steps: int, sampler: Sampler, seed: int = 0
) -> Pixels:
    """Return the purified images, uint8 (N, H, W, 3)."""
    parts = [
        purify_images(
            images.images[start : start + BATCH],
            denoiser,
            t_star=t_star,
            num_inference_steps=steps,
            sampler=sampler,
            seed=seed,
            ids=images.ids[start : start + BATCH],
        )
        for start in range(0, len(images.ids), BATCH)
    ]
    return torch.cat(parts).numpy()


def one_process_a_core() -> ProcessPoolExecutor:
    """Return a pool of processes with one thread each; a single process if there is a GPU."""
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    return ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def victims(jobs: dict[str, VictimJob], test: ImageSet, seeds: int) -> dict[str, tuple[float, float]]:
    """Return the mean and standard deviation of last-epoch test accuracy over seeds, one process per core."""
    assert test.labels is not None
    with one_process_a_core() as pool:
        runs = {
            name: [pool.submit(_victim, job, test.images, test.labels, seed) for seed in range(seeds)]
            for name, job in jobs.items()
        }
        found: dict[str, tuple[float, float]] = {}
        for name, futures in runs.items():
            values = [future.result() for future in futures]
            found[name] = (statistics.mean(values), statistics.stdev(values) if seeds > 1 else 0.0)
            print(f"{name}: {found[name][0]:.2f} ± {found[name][1]:.2f}", flush=True)
    return found


def _victim(job: VictimJob, images: Pixels, labels: NDArray[np.integer], seed: int) -> float:
    config = load_config(None, job.settings)
    run = train_victim(
        job.images, job.labels, images, labels, config.victim, config.compensation, seed, default_device()
    )
    return run.test_accuracy[-1]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)
