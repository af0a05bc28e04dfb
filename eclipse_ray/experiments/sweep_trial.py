"""One trial of a sweep on a worker: purify a part, look at what went away, train a quick victim, commit."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import tune

from eclipse_ray import compensation
from eclipse_ray.config import CompensationConfig, Config, digest
from eclipse_ray.datasets.memory import ImageSet
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.errors import EclipseError
from eclipse_ray.experiments.materials import Cache, Work, make_defended
from eclipse_ray.experiments.objectives import shortcut_score
from eclipse_ray.experiments.space import SweepFacts, Trial, feasible, make_trial
from eclipse_ray.experiments.trial import device_name
from eclipse_ray.storage.store import Store
from eclipse_ray.victims.training import train_victim

Pixels = NDArray[np.uint8]
Result = dict[str, Any]
Report = Callable[[Result], None]

MOST_DB = 100.0
"""Stands for the PSNR of images that did not change."""
PROBES = "probes"


@dataclass(frozen=True)
class Setup:
    """What every trial of a sweep needs to know; `scored` are clean images that trained no denoiser."""

    config: Config
    facts: SweepFacts
    source: ImageSet
    scored: ImageSet
    threads: int

    @property
    def cache(self) -> Cache:
        """The sweep's folder."""
        return Cache(str(self.config.data.output))


def score_of(result: Result, config: Config) -> float:
    """Return the objective of a result plus what its fidelity is worth."""
    return float(result[config.sweep.objective]) + config.sweep.fidelity_weight * float(result["psnr"])


def run_trial(config: dict[str, Any], setup: list[Any], board: Any) -> None:
    """Measure one point and commit what came out; what was measured before is only told again.

    `config` holds the values of the axes, or one key `point` with them as JSON. `setup` is a reference in a list.
    """
    shared: Setup = ray.get(setup[0])
    point = json.loads(config["point"]) if "point" in config else config
    try:
        if not feasible(shared.config, point, shared.facts):
            # Only a searcher that knows nothing of it asks for more steps than timesteps: it is told no score.
            tune.report({"left_out": True})
            return
        trial = make_trial(shared.config, point, shared.facts)
        store, name = Store(str(shared.config.data.output)), f"results/{trial.key}.json"
        if store.exists(name):
            result = json.loads(store.read(name))
        else:
            result = measure(shared, trial, _reporter(shared, trial, board))
            store.create(name, json.dumps(result, indent=1).encode())
    except EclipseError as error:
        # Said rather than raised, because trying again would not help.
        tune.report({"error": str(error)})
        return
    score = score_of(result, shared.config)
    board.post.remote({"key": trial.key, "title": trial.title, "score": score, "last": True})
    tune.report(
        {"score": score, "epoch": shared.config.sweep.seeds * shared.config.victim.epochs, "key": trial.key}
    )


def _reporter(setup: Setup, trial: Trial, board: Any) -> Report:
    def report(result: Result) -> None:
        score = score_of(result, setup.config)
        board.post.remote(
            {"key": trial.key, "title": trial.title, "score": score, "epoch": result["epochs"], "last": False}
        )
        if setup.config.sweep.asha:
            told = {"key": trial.key, "record": json.dumps({**result, "stopped": True})}
            tune.report({"score": score, "epoch": result["epochs"], **told})

    return report


def measure(setup: Setup, trial: Trial, report: Report) -> Result:
    """Return what a trial found; `report` is given what is known after every epoch but the last."""
    began, device = time.monotonic(), default_device()
    purified, looked_at = prepare(setup, trial)
    purify, own = trial.config.purify, trial.config.compensation
    result: Result = {
        "point": trial.point,
        "purify": {
            "t_star": purify.t_star,
            "num_inference_steps": purify.num_inference_steps,
            "sampler": purify.sampler,
        },
        "compensation": own.model_dump(mode="json"),
        **looked_at,
        "images": len(setup.source.ids),
        "scored_images": len(setup.scored.ids),
        "proxy_accuracy": None,
        "stopped": False,
        "epochs": 0,
        "device": device_name(device),
        "threads": setup.threads,
    }
    if trial.config.sweep.objective == "proxy_accuracy":
        result |= _train(setup, trial, purified, result, report)
    return result | {"seconds": time.monotonic() - began}


def prepare(setup: Setup, trial: Trial) -> tuple[Pixels, Result]:
    """Return the purified part of the dataset, and PSNR and shortcut score of its purification, made once."""
    torch.set_num_threads(setup.threads)
    cache = setup.cache
    purified = _purified(setup, trial, trial.purified, setup.source)
    clean = _purified(setup, trial, trial.scored, setup.scored)
    key = digest([trial.purified, trial.scored])
    found = cache.note(PROBES, key)
    if found is None:
        found = looked_at(setup, purified, clean)
        kept = cache.note("defended", trial.scored) or {}
        found["psnr"] = MOST_DB if kept["psnr"] is None else kept["psnr"]
        cache.finish(PROBES, key, found)
    return purified, found


def looked_at(setup: Setup, purified: Pixels, clean: Pixels) -> Result:
    """Return the shortcut score of what purification removed."""
    removed, removed_clean = (
        torch.from_numpy(images.astype(np.int16) - after)
        for images, after in ((setup.source.images, purified), (setup.scored.images, clean))
    )
    score = shortcut_score(removed, torch.from_numpy(_labels(setup.source)), removed_clean, setup.config.run.seed)
    return {
        "shortcut_score": score.score,
        "removed_accuracy": score.removed_accuracy,
        "clean_confidence": score.clean_confidence,
    }


def _labels(images: ImageSet) -> NDArray[np.int64]:
    assert images.labels is not None
    return np.array(images.labels)


def _purified(setup: Setup, trial: Trial, key: str, images: ImageSet) -> Pixels:
    config = trial.config
    work = Work(
        cache=setup.cache,
        key=key,
        name="eclipse-a",
        config=config.model_dump(mode="json"),
        denoiser=config.purify.denoiser or setup.cache.url("denoisers", trial.denoiser),
        seed=config.run.seed,
        num_classes=1,
        threads=setup.threads,
    )
    labels = np.zeros(len(images.ids), np.int64)
    return make_defended(work, images.images, images.images, labels, images.ids)


def _train(setup: Setup, trial: Trial, purified: Pixels, result: Result, report: Report) -> Result:
    """Train sweep.seeds victims one after the other; their last epochs count."""
    config = trial.config
    images, loader = _compensated(setup, config, purified)
    curves: list[list[float]] = []

    def on_epoch(epoch: int, accuracy: float, _loss: float) -> None:
        curves[-1].append(accuracy)
        done = (len(curves) - 1) * config.victim.epochs + epoch
        if done < config.sweep.seeds * config.victim.epochs:
            report({**result, "proxy_accuracy": _last(curves), "curves": curves, "epochs": done})

    for seed in range(config.run.seed, config.run.seed + config.sweep.seeds):
        curves.append([])
        train_victim(
            images,
            _labels(setup.source),
            setup.scored.images,
            _labels(setup.scored),
            config.victim,
            loader,
            seed,
            default_device(),
            on_epoch,
        )
    epochs = config.sweep.seeds * config.victim.epochs
    return {"proxy_accuracy": _last(curves), "curves": curves, "epochs": epochs}


def _last(curves: list[list[float]]) -> float:
    return statistics.fmean(curve[-1] for curve in curves)


def _compensated(setup: Setup, config: Config, purified: Pixels) -> tuple[Pixels, CompensationConfig]:
    """Return the images to train on, and what the loader adds to them."""
    own = config.compensation
    if own.mode != "baked":
        return np.array(purified), own
    baked = compensation.bake(torch.from_numpy(np.array(purified)), setup.source.ids, own, config.run.seed)
    return baked.numpy(), CompensationConfig(mode="none")
