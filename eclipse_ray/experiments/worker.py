"""What runs on a worker of Ray: make a transformed set, measure a recipe and commit its result, try a point."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray import tune

from eclipse_ray.compensation import bake
from eclipse_ray.config import CompensationConfig, Config
from eclipse_ray.datasets.memory import ImageSet
from eclipse_ray.defenses.simple import privacy
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.errors import EclipseError
from eclipse_ray.experiments.artifacts import Cache, Pixels, keep_quality, make_defended
from eclipse_ray.experiments.experiment import Sets, labels_of, result_json
from eclipse_ray.experiments.recipe import Facts, Measured, Need, Recipe
from eclipse_ray.experiments.search import feasible, make_trial, tuned_point
from eclipse_ray.storage.store import Store
from eclipse_ray.victims.training import train_victim

MOST_DB = 100.0
"""Stands for the PSNR of images that did not change."""


@dataclass(frozen=True)
class Bench:
    """What every worker of an experiment needs; `threads` is the number of CPU threads of one victim."""

    sets: Sets
    cache: Cache
    threads: int
    fidelity_weight: float


@dataclass(frozen=True)
class Progress:
    """One epoch of a victim; `score` is its test accuracy plus what its fidelity is worth."""

    key: str
    title: str
    epoch: int
    test_accuracy: float
    score: float
    last: bool


Told = Callable[[Measured], None]


def defend(need: Need, bench: Bench, images: Pixels | None) -> None:
    """Make a transformed set; `images` are those of its column, or None for images that no poison changed."""
    torch.set_num_threads(bench.threads)
    original = bench.sets.source if need.column else bench.sets.test
    made_of = original.images if images is None else images
    make_defended(need.key, need.row, bench.cache, made_of, original, bench.sets.num_classes)


def likeness(key: str, bench: Bench, images: Pixels) -> None:
    """Measure once what the poison of a column does to the images."""
    keep_quality(bench.cache, key, images, bench.sets.source.images)


def measure(recipe: Recipe, bench: Bench, images: Pixels | None, board: Any, told: Told | None = None) -> Measured:
    """Return what a recipe gives, measured and committed if it was not before.

    `images` are those of the recipe's column, or None for images that no poison changed. Every epoch is posted on
    `board`; `told` is given what is known after every epoch but the last.
    """
    kept = bench.cache.folder
    if kept is not None and kept.exists(f"results/{recipe.key}.json"):
        return Measured(**json.loads(kept.read(f"results/{recipe.key}.json")))
    torch.set_num_threads(bench.threads)
    trained_on, compensation = _training_images(recipe, bench, images)
    result = _begin(recipe, bench)
    began = time.monotonic()

    def on_epoch(epoch: int, accuracy: float, loss: float) -> None:
        result.test_accuracy.append(accuracy)
        result.train_loss.append(loss)
        score, last = score_of(result, bench.fidelity_weight), epoch == recipe.victim.config.epochs
        board.post.remote(vars(Progress(recipe.key, recipe.title, epoch, accuracy, score, last)))
        if told is not None and not last:
            told(replace(result, seconds=time.monotonic() - began))

    config, defense = recipe.row.config, recipe.row.defense
    train_victim(
        trained_on,
        labels_of(bench.sets.source),
        bench.sets.test.images,
        labels_of(bench.sets.test),
        recipe.victim.config,
        compensation,
        recipe.seed,
        default_device(),
        on_epoch,
        augmentations=[defense.augmentation(config.defense)] if defense.augmentation else [],
        privacy=privacy(config.defense) if defense.privacy else None,
        extra=_labelled(bench.sets.parts[config.matrix.sparse_limit]) if defense.dilution else None,
    )
    result = replace(result, seconds=time.monotonic() - began)
    if kept is not None:
        kept.create(f"results/{recipe.key}.json", result_json(result))
    return result


def score_of(result: Measured, fidelity_weight: float) -> float:
    """Return the last test accuracy plus what the fidelity is worth, where a recipe asks for it."""
    return result.test_accuracy[-1] + fidelity_weight * (result.psnr or 0.0)


def _training_images(recipe: Recipe, bench: Bench, images: Pixels | None) -> tuple[Pixels, CompensationConfig]:
    """Return the images to train on, and what the loader adds to them."""
    own = recipe.row.compensation
    if recipe.training == recipe.column.key:
        # A run that baked has written the compensation into these images already.
        return bench.sets.source.images if images is None else images, own
    found = bench.cache.load(recipe.training)
    if own.mode != "baked":
        return found, own
    baked = bake(torch.from_numpy(found), bench.sets.source.ids, own, recipe.row.config.run.seed)
    return baked.numpy(), CompensationConfig(mode="none")


def _begin(recipe: Recipe, bench: Bench) -> Measured:
    device, fidelity = default_device(), None
    if recipe.scored:
        kept = (bench.cache.note("defended", recipe.scored) or {})["psnr"]
        fidelity = MOST_DB if kept is None else kept
    return Measured(
        title=recipe.title,
        test_accuracy=[],
        train_loss=[],
        seconds=0.0,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        threads=bench.threads,
        images=len(bench.sets.source.ids),
        seed=recipe.seed,
        victim=recipe.victim.config.model_dump(mode="json"),
        compensation=recipe.row.compensation.model_dump(mode="json"),
        point=recipe.row.entry.settings,
        psnr=fidelity,
    )


def _labelled(images: ImageSet) -> tuple[Pixels, Any]:
    return images.images, labels_of(images)


def try_point(parameters: dict[str, Any], config: Config, facts: Facts, bench: list[Any], board: Any) -> None:
    """Try one point of a sweep inside Ray Tune; `bench` is a reference in a list, which Ray does not resolve."""
    shared: Bench = ray.get(bench[0])
    point = tuned_point(parameters)
    try:
        if not feasible(config, point, facts):
            # Only Optuna asks for more steps than timesteps, because it does not know the rule: it gets no score.
            tune.report({"left_out": True})
            return
        trial = make_trial(config, point, facts)
        for need in trial.recipes[0].needs:
            defend(need, shared, None)
        results = [measure(one, shared, None, board, _teller(one, shared, config)) for one in trial.recipes]
    except EclipseError as error:
        # Reported and not raised, because another attempt would fail too.
        tune.report({"error": str(error)})
        return
    score = float(np.mean([score_of(result, shared.fidelity_weight) for result in results]))
    tune.report({"score": score, "epoch": config.victim.epochs})


def _teller(recipe: Recipe, bench: Bench, config: Config) -> Told | None:
    """Return what tells the scheduler about an epoch, if it may stop victims."""
    if not config.sweep.asha:
        return None

    def tell(result: Measured) -> None:
        record = json.dumps({"key": recipe.key, "result": asdict(replace(result, stopped=True))})
        score = score_of(result, bench.fidelity_weight)
        tune.report({"score": score, "epoch": len(result.test_accuracy), "record": record})

    return tell


class KeepStopped(tune.Callback):
    """Commits what a victim had reached that the scheduler stopped, because its own process no longer can."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write what the trial last reported, unless it was its final report."""
        last = trial.last_result or {}
        if "record" in last:
            kept = json.loads(last["record"])
            self.store.create(f"results/{kept['key']}.json", result_json(Measured(**kept["result"])))
