"""What it costs to measure how far purification changed each image, as a part of the time of purifying it.

    python benchmarks/changes.py

prints one line per side length for the default denoiser (untrained, one step) on this machine's device.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from eclipse_ray.config import load_config
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.diffusion.training import start_fit
from eclipse_ray.purification.stages import purify_batch
from eclipse_ray.quality import changes

ROUNDS = 5
PIXELS = 2**18
"""Pixels of a batch, as `purify.batch_pixels` has them by default."""


def main() -> None:
    """Time both, interleaved, and print the least of each."""
    torch.set_num_threads(1)
    config, device = load_config(None, {}), default_device()
    denoiser = start_fit(config.denoiser, 0, device).averaged()
    settings = config.purify.model_copy(update={"t_star": 400, "num_inference_steps": 1})
    for side in (32, 64, 224):
        shape = (PIXELS // side**2, side, side, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        ids = [str(index) for index in range(len(images))]
        purifying, measuring = [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            purified = purify_batch(denoiser, images, ids, settings, 0)
            purifying.append(time.perf_counter() - started)
            started = time.perf_counter()
            found = changes(purified.to(device), torch.from_numpy(images).to(device))
            [values.cpu() for values in found]
            measuring.append(time.perf_counter() - started)
        part = 100 * min(measuring) / min(purifying)
        print(f"{side} px on {device}: {part:.2f} % of {1000 * min(purifying) / len(images):.3f} ms per image")


if __name__ == "__main__":
    main()
