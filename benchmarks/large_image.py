"""Seconds and peak memory of purifying one large photograph on the CPU; the memory includes all imports.

    python benchmarks/large_image.py                             4000 x 3000, one step
    python benchmarks/large_image.py --steps 2 --preset small

The weights are random, because neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from eclipse_ray.config import load_config
from eclipse_ray.diffusion.network import build_denoiser, build_unet
from eclipse_ray.diffusion.sampling import purify_images


def main() -> None:
    """Parse the arguments, run once, and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--preset", default="debug")
    parser.add_argument("--variance", default="fixed_small", choices=["fixed_small", "learned_range"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"denoiser.preset": arguments.preset, "denoiser.variance_type": arguments.variance}
    config = load_config(None, settings).denoiser
    denoiser = build_denoiser(build_unet(config), config).eval()
    image = torch.randint(0, 256, (1, arguments.height, arguments.width, 3), dtype=torch.uint8)
    started = time.monotonic()
    purify_images(image, denoiser, ids=["photograph"], num_inference_steps=arguments.steps)
    # Kibibytes on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps({**vars(arguments), "seconds": round(time.monotonic() - started, 1), "peak_mib": round(peak)})
    )


if __name__ == "__main__":
    main()
