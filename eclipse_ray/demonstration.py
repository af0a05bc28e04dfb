"""The whole path on synthetic images: poison, train, purify, evaluate; a table and one picture."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from eclipse_ray import verbs
from eclipse_ray.config import Config, Settings
from eclipse_ray.datasets.memory import ImageSet, load_images
from eclipse_ray.datasets.synthetic import write_synthetic
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.sampling import absorb, to_model_range, to_uint8
from eclipse_ray.errors import InputError
from eclipse_ray.log import say
from eclipse_ray.parameters import ConfigLike, resolve
from eclipse_ray.progress import pace
from eclipse_ray.reports.charts import amplified, image_grid
from eclipse_ray.results import DEMO_FILE, DemoResult, EvaluateResult
from eclipse_ray.storage.store import Store

PICTURE = "demo.png"
# A laptop's share of every step: 2 cores finish in minutes.
SIZES = {"train": 3700, "clean": 185, "test": 500}
SETTINGS: Settings = {
    "denoiser.image_size": 28,
    "denoiser.iterations": 1000,
    # Deep enough for AR; the default depth is for photographs and poisons that are harder to drop.
    "denoiser.t_star": 100,
    "evaluate.seeds": 2,
    "victim.epochs": 10,
    # Diffusion alone suffices for AR, and noise made for photographs would drown these muted images.
    "compensation.mode": "none",
}


def demo(output: str = "runs/demo", *, config: ConfigLike = None, settings: Settings | None = None) -> DemoResult:
    """Make a synthetic dataset below `output`, poison it (AR), purify it, and measure three victims.

    The same call resumes; everything already made with the same settings is kept.
    """
    started = time.monotonic()
    resolved = resolve(config, {**SETTINGS, **(settings or {})}, {})
    folders = {
        name: f"{output}/{name}" for name in ("source", "test", "split", "poisoned", "denoiser", "purified")
    }
    _prepare(resolved, folders)
    clean, rest = f"{folders['split']}/clean", f"{folders['split']}/rest"
    verbs.train(clean=clean, out=folders["denoiser"], config=resolved)
    purified = verbs.purify(
        folders["poisoned"], folders["purified"], denoiser=folders["denoiser"], config=resolved
    )
    sources = {"clean": rest, "poisoned": folders["poisoned"], "purified": folders["purified"]}
    # Two at a time, so that no core waits while the workers of the next one start.
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda train: _accuracy(resolved, train, folders["test"], clean), sources.values())
        accuracies = dict(zip(sources, results, strict=True))
    _draw(resolved, sources, folders["denoiser"], Path(output) / PICTURE)
    result = DemoResult(
        clean=accuracies["clean"].test_accuracy,
        poisoned=accuracies["poisoned"].test_accuracy,
        purified=accuracies["purified"].test_accuracy,
        images_per_second=purified.images_per_second,
        seconds=round(time.monotonic() - started, 1),
        output=output,
    )
    note = {**asdict(result), "victims": {name: asdict(each) for name, each in accuracies.items()}}
    Store(output).write(DEMO_FILE, json.dumps(note, indent=2).encode())
    return result


def demo_table(result: DemoResult) -> str:
    """Return the demo's outcome as a table for people."""
    gap = result.clean - result.poisoned
    recovered = 100 * (result.purified - result.poisoned) / gap if gap > 0 else float("nan")
    # A demo that goes on in its folder finds images purified before.
    rate = result.images_per_second
    speed = f"purified at {pace(rate, 'images')}" if rate else "purified before"
    return "\n".join(
        [
            "",
            "victim trained on         test accuracy",
            f"  clean images                  {result.clean:5.1f} %",
            f"  poisoned images (AR)          {result.poisoned:5.1f} %",
            f"  purified images               {result.purified:5.1f} %   ({recovered:.0f} % of the gap recovered)",
            "",
            f"{speed}; all in {result.seconds:.0f} s",
            f"picture: {result.output}/{PICTURE}",
        ]
    )


def _prepare(config: Config, folders: dict[str, str]) -> None:
    size, seed = config.denoiser.image_size, config.run.seed
    made = [name for name in ("source", "test", "split", "poisoned") if Store(folders[name]).exists()]
    if "source" not in made:
        say(f"demo: drawing {SIZES['train'] + SIZES['clean'] + SIZES['test']:,} synthetic images, {size} px")
        write_synthetic(folders["source"], SIZES["train"] + SIZES["clean"], size, seed)
    if "test" not in made:
        write_synthetic(folders["test"], SIZES["test"], size, seed + 1)
    if "split" not in made:
        verbs.split(folders["source"], clean=SIZES["clean"], out=folders["split"], config=config)
    if "poisoned" not in made:
        verbs.poison("ar", f"{folders['split']}/rest", folders["poisoned"], config=config)


def _accuracy(config: Config, train: str, test: str, clean: str) -> EvaluateResult:
    # The results go into the table of the demo only.
    result = verbs.evaluate(train, test=test, clean=clean, config=config, settings={"data.output": None})
    assert isinstance(result, EvaluateResult), "the demo judges one dataset at a time"
    return result


def _draw(config: Config, sources: dict[str, str], folder: str, path: Path, count: int = 8) -> None:
    """Write the picture: one image per class clean, poisoned, noised, purified, and the poison made visible."""
    sets = {name: load_images(url, config.data) for name, url in sources.items()}
    clean = sets["clean"]
    assert clean.labels is not None, "a victim was trained on them"
    chosen = sorted(np.unique(clean.labels, return_index=True)[1].tolist())[:count]
    ids = [clean.ids[index] for index in chosen]
    rows = {name: _by_id(images, ids) for name, images in sets.items()}
    denoiser = load_denoiser(folder)
    x = to_model_range(torch.from_numpy(rows["poisoned"]))
    noised = to_uint8(absorb(x, denoiser.alphas_cumprod, denoiser.t_star, config.run.seed, ids)).numpy()
    picture = {
        "clean": rows["clean"],
        "poisoned": rows["poisoned"],
        "noised": noised,
        "purified": rows["purified"],
        "poison x10": amplified(rows["poisoned"], rows["clean"]),
        "left x10": amplified(rows["purified"], rows["clean"]),
    }
    names = [clean.classes[int(clean.labels[index])] if clean.classes else "" for index in chosen]
    path.write_bytes(image_grid(picture, names, "AR poison, and what purification leaves of it"))


def _by_id(images: ImageSet, ids: list[str]) -> np.ndarray:
    position = {name: index for index, name in enumerate(images.ids)}
    missing = [name for name in ids if name not in position]
    if missing:
        raise InputError(f"image {missing[0]} is not in every set of the demo; delete the folder and run it again")
    return images.images[[position[name] for name in ids]]
