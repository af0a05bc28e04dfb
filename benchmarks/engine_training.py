"""Which network to train, and why timesteps are drawn below t_max only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from common import fit, load, markdown, one_process_a_core
from engine_speed import rate_of

from eclipse_ray.config import Settings
from eclipse_ray.diffusion.model import parameter_count

SPARSE = "sets/clean"
ITERATIONS = 1000
# Channels of each level and residual blocks a level, from the smallest; all see equal samples in equal order.
NETWORKS: dict[str, Settings] = {
    f"{channels}, {layers} block(s)": {
        "denoiser.block_out_channels": list(channels),
        "denoiser.layers_per_block": layers,
        "denoiser.norm_num_groups": groups,
    }
    for channels, layers, groups in (
        ((16,), 1, 8),
        ((32,), 1, 8),
        ((16, 16), 1, 8),
        ((16, 32), 1, 8),
        ((24, 48), 1, 8),
        ((16, 32, 64), 1, 8),
        ((32, 64), 1, 8),
        ((32, 64), 2, 8),
        ((48, 96), 1, 8),
    )
}
MAX_FACTOR = 20
"""The baseline that draws t over 0..T is stopped after so many times the sample-steps."""


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
    """The training curve with t below t_max, and with t below T until it gets there or 20 times the samples."""
    images = load(work, SPARSE).images
    _, curve = fit(images, {})
    reached = curve[-1].denoise_psnr
    full: Settings = {
        "denoiser.t_max": 4000,
        "denoiser.iterations": MAX_FACTOR * curve[-1].iteration,
        "denoiser.report_every": 500,
        # A constant rate favours the baseline wherever it is stopped: no decay timed for a later end.
        "denoiser.lr_decay": "none",
    }
    _, baseline = fit(images, full, lambda progress: progress.denoise_psnr >= reached)
    rows = [
        {"range": name, **vars(point)} for name, points in (("t_max", curve), ("T", baseline)) for point in points
    ]
    _draw(work / "training.png", rows)
    text = (
        f"t < t_max: {reached:.2f} dB after {curve[-1].iteration:,} iterations; t < T: at best "
        f"{max(point.denoise_psnr for point in baseline):.2f} dB within {baseline[-1].iteration:,}."
    )
    return text, rows


def _draw(file: Path, rows: list[dict[str, Any]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("t_max", "t below t_max (default)"), ("T", "t below T (as published)")):
        points = [row for row in rows if row["range"] == name]
        axes.plot([p["iteration"] for p in points], [p["denoise_psnr"] for p in points], label=label, marker=".")
    axes.set(xscale="log", xlabel="iterations of equal batch size", ylabel="held-out PSNR at t_star, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
