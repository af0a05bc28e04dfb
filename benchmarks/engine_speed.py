"""How well and how fast each sampler denoises, and what the defaults gain over the published setting."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import Pixels, load, markdown, purified, untrained

from eclipse_ray.config import Computed, Precision, Sampler, Settings
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.network import Denoiser, default_device, fast_precision, has_int8
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.quality import psnr, ssim

IMAGES = 128
SPEED_IMAGES = 64
# Of the published chain, of which one image takes some ten seconds on a CPU.
FEW_IMAGES = 8
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


def speed_part(_work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Images/s of the published setting, of the U-Net that was our default, and of the default, in one run."""
    device = default_device()
    fast = fast_precision(device)
    paper = placed({"denoiser.preset": "paper"}, device, "float32")
    unet = placed({"denoiser.preset": "unet"}, device, "float32")
    cases: list[tuple[str, Denoiser, int, int, int]] = [
        ("paper network, 100 steps, float32", paper, 100, FEW_IMAGES, 1),
        ("paper network, 1 step, float32", paper, 1, SPEED_IMAGES, 1),
        ("U-Net (preset unet), 1 step, float32", unet, 1, SPEED_IMAGES, 10),
        ("default, 1 step, float32", placed({}, device, "float32"), 1, SPEED_IMAGES, 40),
        (f"default, 1 step, {fast} (what this device gets)", placed({}, device, fast), 1, SPEED_IMAGES, 100),
    ]
    if has_int8(device):
        cases.append(("default, 1 step, int8", placed({}, device, "int8"), 1, SPEED_IMAGES, 100))
    rows: list[dict[str, Any]] = []
    for name, denoiser, steps, count, repeats in cases:
        rate = rate_of(drawn_images(count), denoiser, steps, repeats)
        published = rows[0]["images_per_second"] if rows else rate
        rows.append({"case": name, "images_per_second": rate, "ratio": rate / published})
        print(rows[-1], flush=True)
    table = [[row["case"], f"{row['images_per_second']:.2f}", f"{row['ratio']:,.0f}"] for row in rows]
    return markdown(["setting", "images/s", "ratio"], table), rows


def device_part(_work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Gain of network, precision, memory layout and compilation: medians of alternating rounds on one thread."""
    torch.set_num_threads(1)
    device = default_device()
    images = drawn_images(SPEED_IMAGES)
    networks: dict[str, Settings] = {"U-Net (preset unet)": {"denoiser.preset": "unet"}, "default": {}}
    cases = {
        f"{network}, {precision}": placed(settings, device, precision)
        for network, settings in networks.items()
        for precision in PRECISIONS
    }
    fast = fast_precision(device)
    cases[f"default, {fast}, contiguous"] = placed({}, device, fast)
    contiguous = cases[f"default, {fast}, contiguous"].unet
    contiguous.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    cases[f"default, {fast}, compiled"] = placed({}, device, fast)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    cases[f"default, {fast}, compiled"].unet.compile(mode=mode)
    if has_int8(device):
        cases["default, int8"] = placed({}, device, "int8")
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


def drawn_images(count: int) -> Pixels:
    """Return uint8 (count, 32, 32, 3) of noise: what an image shows does not change how long it takes."""
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8).numpy()


def placed(settings: Settings, device: torch.device, precision: Computed) -> Denoiser:
    """Return an untrained denoiser on `device`, as `purify` would use it in `precision`."""
    denoiser = untrained(settings).to(device)
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
