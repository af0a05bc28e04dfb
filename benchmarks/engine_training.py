"""Which network to train, and why timesteps are drawn below t_max only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from common import fit, load, markdown, one_process_a_core
from engine_speed import rate_of

from eclipse_ray.config import Settings
from eclipse_ray.diffusion.network import parameter_count
from eclipse_ray.diffusion.training import Progress

SPARSE = "sets/clean"
ITERATIONS = 1000
# Class, channels of each level and residual blocks per level; all see equal samples in equal order.
NETWORKS: dict[str, Settings] = {
    f"{network} {channels}, {layers} block(s)": {
        "denoiser.network": network,
        "denoiser.block_out_channels": list(channels),
        "denoiser.layers_per_block": layers,
    }
    for network, channels, layers in (
        ("shuffled", (32,), 3),
        ("shuffled", (48,), 3),
        ("shuffled", (64,), 4),
        ("shuffled", (96,), 4),
        ("unet2d", (16, 32), 1),
        ("unet2d", (24, 48), 1),
        ("unet2d", (32, 64), 1),
    )
}
BUDGETS = (100, 500)
"""Iterations of the runs with t below t_max, each with its own learning-rate schedule."""
COMPARED, FACTOR = 100, 20
"""The baseline, t below T, has FACTOR times the iterations of the COMPARED run, and a schedule that ends there."""


def networks_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Held-out PSNR at t_star after equal training, against parameters and images/s."""
    images = load(work, SPARSE).images
    with one_process_a_core() as pool:
        futures = {
            name: pool.submit(_network, images, {**settings, "denoiser.iterations": ITERATIONS})
            for name, settings in NETWORKS.items()
        }
        rows = [{"network": name, **future.result()} for name, future in futures.items()]
    best = max(row["psnr"] for row in rows)
    table = [
        [
            row["network"],
            f"{row['parameters']:,}",
            f"{row['psnr']:.2f}",
            f"{row['psnr'] - best:+.2f}",
            f"{row['images_per_second']:.0f}",
        ]
        for row in rows
    ]
    return markdown(["channels", "parameters", "held-out PSNR", "to the best", "images/s, 1 core"], table), rows


def _network(images: Any, settings: Settings) -> dict[str, Any]:
    denoiser, curve = fit(images, settings)
    return {
        "psnr": curve[-1].denoise_psnr,
        "noisy_psnr": curve[-1].noisy_psnr,
        "parameters": parameter_count(denoiser),
        "images_per_second": rate_of(images[:64], denoiser, 1, 3),
    }


def training_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Held-out PSNR with t drawn below t_max after few iterations, and below T after twenty times as many."""
    images = load(work, SPARSE).images
    runs: dict[str, Settings] = {
        f"t < t_max, {count:,}": {"denoiser.iterations": count, "denoiser.report_every": 25} for count in BUDGETS
    }
    full = f"t < T, {FACTOR * COMPARED:,}"
    runs[full] = {
        "denoiser.iterations": FACTOR * COMPARED,
        "denoiser.t_max": 4000,
        "denoiser.report_every": 100,
    }
    with one_process_a_core() as pool:
        # The longest first, so that the short ones fill the other core.
        futures = {name: pool.submit(_curve, images, runs[name]) for name in reversed(runs)}
        curves = {name: futures[name].result() for name in runs}
    rows = [{"run": name, **vars(point)} for name, curve in curves.items() for point in curve]
    _draw(work / "training.png", rows)
    table = [
        [name, f"{curves[name][-1].denoise_psnr:.2f}", _overtaken(curves[name][-1].denoise_psnr, curves[full])]
        for name in runs
    ]
    return markdown(["run, iterations", "held-out PSNR", "t < T gets there after"], table), rows


def _curve(images: Any, settings: Settings) -> list[Progress]:
    return fit(images, settings)[1]


def _overtaken(reached: float, baseline: list[Progress]) -> str:
    first = next((point.iteration for point in baseline if point.denoise_psnr >= reached), None)
    return "never" if first is None else f"{first:,}"


def _draw(file: Path, rows: list[dict[str, Any]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in dict.fromkeys(row["run"] for row in rows):
        points = [row for row in rows if row["run"] == name]
        axes.plot([p["iteration"] for p in points], [p["denoise_psnr"] for p in points], label=name, marker=".")
    axes.set(xscale="log", xlabel="iterations of equal batch size", ylabel="held-out PSNR at t_star, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
