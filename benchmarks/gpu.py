"""The full-size measurements that want a GPU, in pieces of some minutes: no Ray, no network, one output folder.

    python benchmarks/gpu.py --cifar ../shared/data/cifar10 --tap ../shared/data/tap-published --out runs/gpu

The same command goes on where the last one stopped, until its list is done: OUT/results.json holds every finished
part, and OUT/denoiser.safetensors the weights that later parts need. A part is begun only if what it is expected
to take is left of `--minutes`. `--earlier DIR` reads what an earlier call wrote to another folder. `--tiny` runs
the whole list in minutes, on a CPU too, on a few images: its numbers say nothing.

The list, most valuable first: speed of the engine; resnet18, recipe `modern`, on CIFAR-10 (47,500 training images,
2,500 trusted, 10,000 test images) for each poison under each defense; EM and SEP at full cost; the network of the
paper for the time that is left. The published TAP has only the images of `--tap`; `clean-as-tap` is a clean column
of the same images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, markdown
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from eclipse_ray.config import Config, DataConfig, PoisonConfig, content_hash, load_config
from eclipse_ray.datasets.images import jpeg_roundtrip
from eclipse_ray.datasets.memory import ImageSet, choose_clean, load_images
from eclipse_ray.defenses import combine
from eclipse_ray.defenses.interface import Material, apply_transform
from eclipse_ray.diffusion.filters import SETS, find_filters, undo_known
from eclipse_ray.diffusion.network import (
    Denoiser,
    build_denoiser,
    build_unet,
    default_device,
    fast_precision,
    parameter_count,
)
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.diffusion.training import Progress, run_fit, split_heldout, start_fit
from eclipse_ray.inversion import SURROGATES, Inversion, fit_surrogate, open_surrogate
from eclipse_ray.poisons import OPTIMISED, fit_poison, poison_fitted, poison_images
from eclipse_ray.poisons.interface import LabelledImages, quiet_session
from eclipse_ray.victims.training import train_victim

TRUSTED = 2500
CLASSES = 10
COLUMNS = ("clean", "tap-published", "clean-as-tap", "ar", "lsp", "cuda", "ops")
FULL_COST = ("em", "sep")
ROWS = ("none", "iss-j", "eclipse", "eclipse-against")
SECONDS = {"none": 150, "iss-j": 160, "eclipse": 170, "eclipse-against": 480}
"""What a victim is expected to take on an H100, by row; a poison at full cost is expected to take 400 more."""
TINY = {"em": {"rounds": 1}, "sep": {"surrogate_epochs": 1, "checkpoints": 1}}
"""Settings of the optimised poisons with `--tiny`."""
SIZES = ((32, 32), (375, 500))
PEAK_BF16 = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}
"""Dense bfloat16 operations per second, by the start of the device's name, as its maker states them."""


@dataclass(frozen=True)
class Bench:
    """What every part needs: where the images are, where results go, and when the time is up (time.monotonic)."""

    cifar: Path
    tap: Path
    out: Path
    tiny: bool
    deadline: float
    device: torch.device

    def settings(self, preset: str) -> Config:
        """Return the settings of the default denoiser, deep enough for t_star 400, or of the paper's."""
        chosen: dict[str, Any] = {"denoiser.preset": preset}
        if preset == "small":
            chosen |= {"denoiser.t_max": 500, "denoiser.iterations": 20_000, "purify.t_star": 400}
        if self.tiny:
            chosen |= {"denoiser.iterations": 4, "denoiser.batch_size": 4, "victim.epochs": 1}
        arch = "small" if self.tiny else "resnet18"
        return load_config(None, {"victim.recipe": "modern", "victim.arch": arch, **chosen})


@lru_cache(maxsize=1)
def sets(bench: Bench) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return training, trusted and test images, disjoint by content; the same in every call."""
    pool, test = _cifar(bench, "train", 200), _cifar(bench, "test", 30)
    published = set(_published(bench).ids)
    # An image that occurs in both stays a test image, and no image of the published TAP is trusted.
    tested = set(test.hashes())
    pool = pool.take([place for place, name in enumerate(pool.hashes()) if name not in tested])
    rest = pool.take([place for place, name in enumerate(pool.ids) if name not in published])
    chosen = choose_clean([*rest.hashes()], _labels(rest), 20 if bench.tiny else TRUSTED, 0)
    trusted = rest.take(np.flatnonzero(chosen))
    known = set(trusted.ids)
    return pool.take([place for place, name in enumerate(pool.ids) if name not in known]), trusted, test


def _cifar(bench: Bench, part: str, tiny: int) -> ImageSet:
    url = f"{bench.cifar}/{part}-*.parquet"
    return load_images(url, DataConfig(), limit=tiny if bench.tiny else None)


@lru_cache(maxsize=1)
def _published(bench: Bench) -> ImageSet:
    tap = load_images(str(bench.tap), DataConfig())
    if not bench.tiny:
        return tap
    known = set(_cifar(bench, "train", 200).ids)
    return tap.take([place for place, name in enumerate(tap.ids) if name in known])


def _labels(images: ImageSet) -> list[int | None]:
    assert images.labels is not None
    return [*images.labels.tolist()]


def speed(preset: str, size: tuple[int, int], bench: Bench) -> dict[str, Any]:
    """Return images/s of one-step purification, memory and share of bf16 peak, by precision and compilation."""
    config = bench.settings(preset)
    size = (32, 32) if bench.tiny else size
    count = 2 if bench.tiny else (4096 if size == (32, 32) else 32)
    images = np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
    modes = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}
    result: dict[str, Any] = {}
    for precision in ("float32", "bfloat16"):
        for name, mode in modes.items():
            if bench.device.type == "cpu" and (mode or precision == "bfloat16"):
                continue
            denoiser = build_denoiser(build_unet(config.denoiser), config.denoiser).to(bench.device).eval()
            denoiser.precision = precision
            macs = _operations(denoiser, bench.device)
            if mode:
                denoiser.unet.compile(mode=mode)
            rate, memory = _rate(denoiser, images, bench)
            # 32 x 32 pixels per counted pass; a larger image costs in proportion, and a little more for overlaps.
            operations = rate * macs * size[0] * size[1] / 1024
            peak = next((top for start, top in PEAK_BF16.items() if machine().startswith(start)), None)
            result[f"{name} {precision}"] = {
                "images_per_second": rate,
                "memory_gib": memory,
                "share_of_bf16_peak": operations / peak if peak and precision == "bfloat16" else None,
            }
    return {"parameters": parameter_count(denoiser.unet), "flop_per_32px_image": macs, "modes": result}


def _operations(denoiser: Denoiser, device: torch.device) -> int:
    """Return the floating point operations of one pass over one image of 32 x 32."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        denoiser(torch.zeros(1, 3, 32, 32, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    return int(counter.get_total_flops())


def _rate(denoiser: Denoiser, images: np.ndarray[Any, Any], bench: Bench) -> tuple[float, float | None]:
    """Return images per second, after one pass to warm up, and the most GPU memory in GiB."""
    ids, depth = [str(place) for place in range(len(images))], min(400, denoiser.t_max - 1)
    purify = partial(purify_images, images, denoiser, t_star=depth, num_inference_steps=1, ids=ids)
    purify()
    passes, began = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - began < (0 if bench.tiny else 3):
        purify()
        passes += 1
    seconds = time.perf_counter() - began
    memory = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None
    return passes * len(images) / seconds, memory


def beside(bench: Bench) -> dict[str, Any]:
    """Return images/s of what surrounds the network: noise of 32 x 32 images, and the transfer both ways."""
    count = 64 if bench.tiny else 8192
    ids = [str(place) for place in range(count)]
    images = torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
    steps: dict[str, Callable[[], object]] = {
        "noise": lambda: noise(0, ids, 400, (3, 32, 32), bench.device).sum().item(),
        "to the device and back": lambda: images.to(bench.device).cpu(),
    }
    rates = {}
    for name, step in steps.items():
        step()
        began = time.perf_counter()
        for _ in range(5):
            step()
        rates[name] = 5 * count / (time.perf_counter() - began)
    return rates


def fit_default(bench: Bench) -> dict[str, Any]:
    """Fit the default denoiser on the trusted images and keep its weights."""
    denoiser, last = _fitted(bench)
    save_file(_portable(denoiser), bench.out / "denoiser.safetensors")
    return {"trusted": len(sets(bench)[1].ids), **vars(last)}


def _fitted(bench: Bench, perturb: Inversion | None = None) -> tuple[Denoiser, Progress]:
    """Return the default denoiser, trained against what `perturb` finds, and the last point of its curve."""
    config = bench.settings("small").denoiser
    pixels = torch.from_numpy(sets(bench)[1].images).to(bench.device)
    fitted, held = split_heldout(len(pixels), config.heldout_fraction, 0)
    fit, curve = start_fit(config, 0, bench.device), list[Progress]()
    run_fit(fit, pixels[fitted], pixels[held], 0, curve.append, lambda _: None, perturb=perturb)
    return _fast(fit.averaged()), curve[-1]


def _fast(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser in the precision that `purify` would choose."""
    denoiser.precision = fast_precision(denoiser.alphas_cumprod.device)
    return denoiser


def _against(train: ImageSet, bench: Bench) -> Denoiser:
    """Return a denoiser against the poisoned images `train`: their filters, and surrogates of what is left."""
    config, session = bench.settings("small").denoiser, quiet_session(bench.device)
    assert train.labels is not None
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    trusted = torch.from_numpy(sets(bench)[1].images)
    taps = find_filters(trusted, images, labels, 0, min(SETS, config.iterations), lambda done: None) or {}
    labelled = zip(train.images, train.labels.tolist(), strict=True)
    filters = {content_hash(image): taps[label] for image, label in labelled if label in taps}
    suspicious = LabelledImages(undo_known(images, filters), labels, train.ids, CLASSES)
    states = [fit_surrogate(suspicious, config.iterations, seed, session) for seed in range(SURROGATES)]
    surrogates = [open_surrogate(state, CLASSES, bench.device) for state in states]
    denoiser = _fitted(bench, Inversion(surrogates, CLASSES, config.batch_size, 0))[0]
    denoiser.filters = filters
    return denoiser


def _portable(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return {name: value.cpu().contiguous() for name, value in denoiser.unet.state_dict().items()}


def _default_denoiser(bench: Bench) -> Denoiser:
    config = bench.settings("small").denoiser
    unet = build_unet(config)
    unet.load_state_dict(load_file(bench.out / "denoiser.safetensors"))
    return _fast(build_denoiser(unet, config).to(bench.device).eval())


def victim(column: str, row: str, bench: Bench) -> dict[str, Any]:
    """Train one victim, seed 0, on a poisoned column under a defense; the last epoch decides."""
    config, defense = bench.settings("small"), combine("eclipse" if row == "eclipse-against" else row)
    train, test = _poisoned(column, bench), sets(bench)[2]
    assert train.labels is not None
    assert test.labels is not None
    images = torch.from_numpy(train.images)
    began = time.monotonic()
    denoiser = None
    if row.startswith("eclipse"):
        denoiser = _against(train, bench) if row == "eclipse-against" else _default_denoiser(bench)
    if defense.transform is not None:
        material = Material(
            images=images,
            labels=torch.from_numpy(train.labels),
            ids=train.ids,
            num_classes=CLASSES,
            denoiser=denoiser,
            purify=config.purify.model_copy(update={"batch_size": 1024, "batch_pixels": 2**20}),
            compensation=config.compensation,
            seed=0,
            device=bench.device,
            jpeg=lambda pixels, quality: torch.from_numpy(jpeg_roundtrip(pixels.numpy(), quality)),
        )
        images = apply_transform(defense.transform, material, images, config.defense)
    defended = time.monotonic() - began
    compensation = defense.compensation(config) if defense.compensation else None
    run = train_victim(
        images, train.labels, test.images, test.labels, config.victim, compensation, 0, bench.device
    )
    return {
        "test_accuracy": run.test_accuracy[-1],
        "train_images": len(train.ids),
        "epochs": config.victim.epochs,
        "defense_seconds": defended,
        "seconds": time.monotonic() - began,
    }


@lru_cache(maxsize=1)
def _poisoned(column: str, bench: Bench) -> ImageSet:
    """Return the training images of a column; optimised poisons are fitted at full cost, once for all its rows."""
    train = sets(bench)[0]
    if column == "clean":
        return train
    if column == "tap-published":
        return _published(bench)
    if column == "clean-as-tap":
        wanted = set(_published(bench).ids)
        return train.take([place for place, name in enumerate(train.ids) if name in wanted])
    assert train.labels is not None
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    config = PoisonConfig(name=column, cost="full")
    if bench.tiny:
        config = PoisonConfig.model_validate({"name": column, "cost": "reduced", **TINY.get(column, {})})
    if column not in OPTIMISED:
        poisoned = poison_images(images, labels, train.ids, config, 0, CLASSES)
    else:
        data = LabelledImages(images, labels, train.ids, CLASSES)
        poisoned = poison_fitted(data, fit_poison(data, config, 0, quiet_session(bench.device)), config, 0)
    return replace(train, images=poisoned.numpy())


def paper_network(bench: Bench, state: Path) -> dict[str, Any]:
    """Train the network of the paper until the time is up; `state` holds where it stopped, for the next call.

    Its state is too large to bring home, so it lasts as long as the machine; what is kept is how far it came.
    """
    config = bench.settings("paper").denoiser
    _, trusted, _ = sets(bench)
    pixels = torch.from_numpy(trusted.images).to(bench.device)
    fitted, held = split_heldout(len(pixels), config.heldout_fraction, 0)
    fit, curve = start_fit(config, 0, bench.device), list[Progress]()
    if state.exists():
        fit.restore(torch.load(state, map_location=bench.device, weights_only=True))
    while not curve or time.monotonic() < bench.deadline - 30:
        # The learning rate of this preset is constant, so that training can end anywhere.
        more = 2 if bench.tiny else 500
        fit.config = config.model_copy(update={"iterations": fit.iteration + more, "report_every": more})
        run_fit(fit, pixels[fitted], pixels[held], 0, curve.append, lambda _: None)
        if bench.tiny:
            break
    torch.save(fit.state(), state)
    return {"iterations": fit.iteration, **vars(curve[-1])}


Run = Callable[[Bench], dict[str, Any]]
PARTS: dict[str, tuple[float, Run]] = {
    **{
        f"speed {preset} {h}x{w}": (90, partial(speed, preset, (h, w)))
        for preset in ("small", "paper")
        for h, w in SIZES
    },
    "noise and transfers": (20, beside),
    "denoiser": (300, fit_default),
    **{f"victim {one} {row}": (SECONDS[row], partial(victim, one, row)) for one in COLUMNS for row in ROWS},
    **{
        f"victim {one} {row}": (SECONDS[row] + 400, partial(victim, one, row)) for one in FULL_COST for row in ROWS
    },
}
"""Every part by name: the seconds it is expected to take on an H100, and what runs it."""


def table(done: dict[str, dict[str, Any]]) -> str:
    """Return the accuracies that are there, a row per defense, a column per poison."""
    columns = [*COLUMNS, *FULL_COST]
    found = {name: f"{result['test_accuracy']:.2f}" for name, result in done.items() if name.startswith("victim")}
    rows = [[row, *(found.get(f"victim {column} {row}", "") for column in columns)] for row in ROWS]
    return markdown(["defense", *columns], rows)


def main() -> None:
    """Run the parts that are not done, as far as the time goes, and print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 as Parquet: train-*, test-*")
    parser.add_argument("--tap", type=Path, required=True, help="the published TAP, with labels")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--earlier", type=Path, help="folder of an earlier call, if it is not OUT")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "denoiser.safetensors"):
        if options.earlier and (options.earlier / name).exists():
            (options.out / name).write_bytes((options.earlier / name).read_bytes())
    kept = options.out / "results.json"
    done: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    deadline = time.monotonic() + 60 * options.minutes
    bench = Bench(options.cifar, options.tap, options.out, options.tiny, deadline, default_device())
    for name, (seconds, run) in PARTS.items():
        if name in done or (not options.tiny and time.monotonic() + seconds > deadline):
            continue
        done[name] = {**run(bench), "machine": machine()}
        kept.write_text(json.dumps(done, indent=1))
        print(name, json.dumps(done[name]), flush=True)
    if len(done) >= len(PARTS) and time.monotonic() + 60 < deadline:
        done["paper network"] = paper_network(bench, options.out.parent / "paper-network.pt")
        kept.write_text(json.dumps(done, indent=1))
        print("paper network", json.dumps(done["paper network"]), flush=True)
    print(f"\n{sum(name in done for name in PARTS)} of {len(PARTS)} parts are done.\n\n{table(done)}")


if __name__ == "__main__":
    main()
