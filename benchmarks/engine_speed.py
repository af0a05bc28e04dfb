"""How well and how fast each sampler denoises, and what the defaults gain over the published setting."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import Pixels, load, markdown, purified

from eclipse_ray.config import Precision, Sampler, Settings, load_config
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.network import Denoiser, build_denoiser, build_unet, default_device, fast_precision
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.quality import psnr, ssim

IMAGES = 128
SPEED_IMAGES = 64
ROUNDS = 9
T_STAR = 100
POISONS = ("ar", "lsp", "urp")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
# The first is the reference: every timestep, as published.
GRID: dict[Sampler, tuple[int, ...]] = {"ddpm": (100, 25, 10, 4, 2, 1), "ddim": (10, 4, 2)}


def samplers_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """PSNR and SSIM to the clean images, part of the poison's energy left, images/s, ratio to the reference."""
    denoiser = load_denoiser(work / "denoiser-2000", default_device())
    clean = load(work, "sets/rest", IMAGES)
    poisoned = {name: load(work, name, IMAGES) for name in POISONS}
    rows: list[dict[str, Any]] = []
    purified(denoiser, load(work, "sets/rest", 64), T_STAR, 1, "ddpm")
    for sampler, steps in [(sampler, steps) for sampler, counts in GRID.items() for steps in counts]:
        started = time.perf_counter()
        result = purified(denoiser, clean, T_STAR, steps, sampler)
        rate = IMAGES / (time.perf_counter() - started)
        row: dict[str, Any] = {"sampler": sampler, "steps": steps, "images_per_second": rate}
        row |= {
            "psnr": psnr(torch.from_numpy(result), torch.from_numpy(clean.images)),
            "ssim": ssim(torch.from_numpy(result), torch.from_numpy(clean.images)),
        }
        row["ratio"] = rate / (rows[0]["images_per_second"] if rows else rate)
        for name, images in poisoned.items():
            # The same ids draw the same noise, so the difference is what is left of the perturbation.
            left = purified(denoiser, images, T_STAR, steps, sampler).astype(float) - result
            row[name] = float((left**2).sum() / ((images.images.astype(float) - clean.images) ** 2).sum())
        rows.append(row)
        print(row, flush=True)
    head = ["sampler", "steps", "PSNR", "SSIM", *(f"{name} left" for name in POISONS), "images/s", "ratio"]
    table = [
        [row["sampler"], str(row["steps"]), f"{row['psnr']:.2f}", f"{row['ssim']:.4f}"]
        + [f"{100 * row[name]:.0f} %" for name in POISONS]
        + [f"{row['images_per_second']:.1f}", f"{row['ratio']:.0f}"]
        for row in rows
    ]
    return markdown(head, table), rows


def speed_part(work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Images/s of the published setting and of ours on the same 64 images, each warmed up, in one run."""
    device = default_device()
    paper = load_config(None, {"denoiser.preset": "paper"}).denoiser
    torch.manual_seed(0)
    large = build_denoiser(build_unet(paper), paper).eval().to(device)
    small = load_denoiser(work / "denoiser-2000", device)
    images = load(work, "sets/rest", SPEED_IMAGES).images
    cases: list[tuple[str, Denoiser, int, int]] = [
        ("paper network, 100 steps, float32", large, 100, 1),
        ("paper network, 1 step, float32", large, 1, 1),
        ("small network, 100 steps, float32", small, 100, 1),
        ("small network, 1 step, float32 (default)", small, 1, 10),
    ]
    rows: list[dict[str, Any]] = []
    for name, denoiser, steps, repeats in cases:
        rate = rate_of(images, denoiser, steps, repeats)
        published = rows[0]["images_per_second"] if rows else rate
        rows.append({"case": name, "images_per_second": rate, "ratio": rate / published})
        print(rows[-1], flush=True)
    table = [[row["case"], f"{row['images_per_second']:.2f}", f"{row['ratio']:.0f}"] for row in rows]
    return markdown(["setting", "images/s", "ratio"], table), rows


def device_part(_work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Gain of network, precision, memory layout and compilation: medians of alternating rounds on one thread."""
    torch.set_num_threads(1)
    device = default_device()
    images = torch.randint(0, 256, (SPEED_IMAGES, 32, 32, 3), dtype=torch.uint8).numpy()
    networks: dict[str, Settings] = {"U-Net (preset unet)": {"denoiser.preset": "unet"}, "default": {}}
    cases = {
        f"{network}, {precision}": untrained(settings, device, precision)
        for network, settings in networks.items()
        for precision in PRECISIONS
    }
    fast = fast_precision(device)
    cases[f"default, {fast}, contiguous"] = untrained({}, device, fast)
    cases[f"default, {fast}, contiguous"].unet.to(memory_format=torch.contiguous_format)
    cases[f"default, {fast}, compiled"] = untrained({}, device, fast)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    cases[f"default, {fast}, compiled"].unet.compile(mode=mode)
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, denoiser in cases.items():
            rates[name].append(rate_of(images, denoiser, 1, 1))
    rows: list[dict[str, Any]] = [
        {"case": name, "images_per_second": statistics.median(found)} for name, found in rates.items()
    ]
    first = rows[0]["images_per_second"]
    table = [
        [row["case"], f"{row['images_per_second']:.0f}", f"{row['images_per_second'] / first:.2f}"] for row in rows
    ]
    return markdown(["network, one step", "images/s", "to the first"], table), rows


def untrained(settings: Settings, device: torch.device, precision: Precision) -> Denoiser:
    """Return a denoiser with drawn weights, which takes as long as a trained one."""
    config = load_config(None, dict(settings)).denoiser
    torch.manual_seed(0)
    denoiser = build_denoiser(build_unet(config), config).eval().to(device)
    denoiser.unet.to(memory_format=torch.channels_last)
    denoiser.precision = precision
    return denoiser


def rate_of(images: Pixels, denoiser: Denoiser, steps: int, repeats: int) -> float:
    """Return images per second, after one step to warm up."""
    ids = [str(index) for index in range(len(images))]
    purify_images(images, denoiser, t_star=T_STAR, num_inference_steps=1, ids=ids)
    started = time.perf_counter()
    for _ in range(repeats):
        purify_images(images, denoiser, t_star=T_STAR, num_inference_steps=steps, ids=ids)
    return repeats * len(images) / (time.perf_counter() - started)
