"""What an experiment has found: tidy rows, from which tables, pictures, plans and the best settings are made."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from eclipse_ray.cluster.connect import Resources, local_denoiser, open_denoiser
from eclipse_ray.cluster.work import shares
from eclipse_ray.config import Config, Range
from eclipse_ray.diffusion.checkpoint import read_card
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.errors import EclipseError
from eclipse_ray.experiments import search
from eclipse_ray.experiments.artifacts import denoiser_folder
from eclipse_ray.experiments.experiment import Experiment, labels_of, open_matrix, open_sweep, score_of
from eclipse_ray.experiments.recipe import PUBLISHED, Column, Recipe, Row
from eclipse_ray.experiments.search import COMPENSATION_AXES, Trial
from eclipse_ray.log import counted
from eclipse_ray.poisons import budget, cost_of, variant_of
from eclipse_ray.results import (
    EvaluateResult,
    MatrixAxis,
    MatrixPlan,
    MatrixResult,
    MatrixView,
    SweepPlan,
    SweepResult,
    SweepView,
    sweep_order,
)
from eclipse_ray.storage.store import Store
from eclipse_ray.victims.training import train_victim

TIMED_IMAGES = 64
PLACES = {"source", "output", "clean", "test"}

TidyRow = dict[str, Any]


def tidy_row(experiment: Experiment, recipe: Recipe) -> TidyRow:
    """Return everything that is known of a measured recipe; accuracies in per cent, PSNR in dB."""
    result, cache = experiment.result(recipe.key), experiment.cache
    accuracy, images = result.test_accuracy, result.images
    poison = recipe.column.config.poison if recipe.column.config else None
    sparse = sparse_images(experiment, recipe.row.config)
    made = cache.note("defended", recipe.training) if recipe.training != recipe.column.key else None
    looks = made or cache.note("quality", recipe.column.key) or {}
    fitted = cache.note("poisons", recipe.column.key) or {}
    return {
        "poison": recipe.column.entry.label,
        "variant": variant_of(poison) if poison else "",
        "budget": bound(experiment, recipe.column),
        "cost": cost_of(poison) if poison else "",
        "poison_seconds": fitted.get("seconds"),
        "defense": recipe.row.entry.label,
        "victim": recipe.victim.entry.label,
        "recipe": recipe.victim.config.recipe,
        "epochs": recipe.victim.config.epochs,
        "seed": recipe.seed,
        "n": images,
        "sparse": sparse,
        "b_over_n": 100 * sparse / images,
        "test_images": len(experiment.sets.test.ids),
        "test_accuracy": accuracy[-1],
        "best_epoch_accuracy": max(accuracy),
        "best_epoch": 1 + accuracy.index(max(accuracy)),
        "seconds": result.seconds,
        "defense_seconds": (made or {}).get("seconds"),
        "images_per_second": (made or {}).get("images_per_second"),
        "psnr": looks.get("psnr"),
        "ssim": looks.get("ssim"),
        "rho": looks.get("rho"),
        "device": result.device,
        "fingerprint": recipe.key,
    }


def trial_row(experiment: Experiment, trial: Trial) -> TidyRow:
    """Return everything that is known of a measured trial: its settings, and the mean over its victims."""
    config, rows = trial.row.config, [tidy_row(experiment, recipe) for recipe in trial.recipes]
    results = [experiment.result(recipe.key) for recipe in trial.recipes]
    given, own = bool(config.purify.denoiser), config.denoiser
    return {
        **rows[0],
        **{name: getattr(config.purify, name) for name in search.PURIFY_AXES},
        **{name: getattr(config.compensation, name) for name in COMPENSATION_AXES},
        "preset": None if given else own.preset,
        "replication": None if given else own.replication,
        "iterations": None if given else own.iterations,
        "sparse_percent": 100 * rows[0]["sparse"] / experiment.sets.total,
        "point": json.dumps(trial.point),
        "proxy_accuracy": statistics.fmean(row["test_accuracy"] for row in rows),
        "psnr": results[0].psnr,
        "score": trial_score(experiment, trial),
        "stopped": any(result.stopped for result in results),
        "epochs": sum(len(result.test_accuracy) for result in results),
        "images": rows[0]["n"],
        "scored_images": rows[0]["test_images"],
        "seconds": sum(row["seconds"] for row in rows),
    }


def trial_score(experiment: Experiment, trial: Trial) -> float:
    """Return the mean accuracy of a measured trial's victims, in per cent, plus what its fidelity is worth."""
    weight = experiment.config.sweep.fidelity_weight
    return statistics.fmean(score_of(experiment.result(recipe.key), weight) for recipe in trial.recipes)


def sparse_images(experiment: Experiment, config: Config) -> int:
    """Return how many clean images trained the denoiser of `config`, or may have trained it."""
    if not experiment.space:
        images = experiment.sets.parts.get(config.matrix.sparse_limit)
        return len(images.ids) if images else 0
    if config.purify.denoiser:
        return read_card(local_denoiser(config.purify.denoiser)).sparse_images
    return len(experiment.sets.parts[config.sweep.sparse_percent].ids)


def bound(experiment: Experiment, column: Column) -> str:
    """Return the norm bound of a column in words, such as "L-inf 8/255", or "published" if others made them."""
    if column.config is None:
        return PUBLISHED if column.poisoned else ""
    norm, limit = budget(column.config.poison, experiment.sets.source.images.shape[1:])
    if norm == "linf":
        return f"L-inf {255 * limit:g}/255"
    return f"L2 {limit:.3f}" if norm == "l2" else "no norm bound"


def evaluation(experiment: Experiment) -> EvaluateResult:
    """Return what the victims of one dataset have reached."""
    recipes = experiment.grid.recipes
    curves = [experiment.result(recipe.key).test_accuracy for recipe in recipes]
    last = [curve[-1] for curve in curves]
    victim = recipes[0].victim.config
    return EvaluateResult(
        test_accuracy=round(statistics.fmean(last), 2),
        test_accuracy_std=round(statistics.stdev(last), 2) if len(last) > 1 else 0.0,
        seeds=len(last),
        epochs=victim.epochs,
        victim=victim.arch,
        best_epoch_accuracy=round(statistics.fmean(max(curve) for curve in curves), 2),
        compensation=recipes[0].row.compensation.mode,
        accuracies=[round(value, 2) for value in last],
        curves=[[round(value, 2) for value in curve] for curve in curves],
    )


def matrix_view(experiment: Experiment) -> MatrixView:
    """Return the axes of a matrix, and a tidy row for every cell that is measured."""
    grid, sets, done = experiment.grid, experiment.sets, experiment.done()
    victims, defenses, columns = (
        [one.entry.label for one in axis] for axis in (grid.victims, grid.rows, grid.columns)
    )

    def place(recipe: Recipe) -> tuple[int, int, int, int]:
        victim, row, column = (one.entry.label for one in (recipe.victim, recipe.row, recipe.column))
        return victims.index(victim), defenses.index(row), columns.index(column), recipe.seed

    return MatrixView(
        columns=[MatrixAxis(one.entry.label, one.entry.published, bound(experiment, one)) for one in grid.columns],
        defenses=[
            MatrixAxis(one.entry.label, one.entry.published, _sparse_words(experiment, one)) for one in grid.rows
        ],
        victims=[
            MatrixAxis(
                one.entry.label,
                one.config.arch,
                f"Victim {one.config.arch}, recipe {one.config.recipe}, {one.config.epochs} epochs",
            )
            for one in grid.victims
        ],
        seeds=grid.seeds,
        dataset=experiment.config.matrix.published,
        images=len(sets.source.ids),
        sparse=sparse_images(experiment, experiment.config),
        test_images=len(sets.test.ids),
        rows=[tidy_row(experiment, one) for one in sorted(grid.recipes, key=place) if one.key in done],
    )


def _sparse_words(experiment: Experiment, row: Row) -> str:
    own = sparse_images(experiment, row.config)
    return "" if own == sparse_images(experiment, experiment.config) else f"{own:,} sparse images"


def matrix_result(experiment: Experiment) -> MatrixResult:
    """Return how far a matrix is after a run."""
    done = experiment.done()
    return MatrixResult(
        cells=len(experiment.grid.recipes),
        done=sum(recipe.key in done for recipe in experiment.grid.recipes),
        failed=len(experiment.failures),
        output=experiment.store.url,
        table=f"{experiment.store.url}/table.md",
        failures=experiment.failures,
    )


def matrix_plan(config: Config) -> MatrixPlan:
    """Return which cells a run would measure, and how long it takes where similar work was measured here.

    Trainings are estimated from those of the same defense and victim, else of the same victim; poisons and
    transforms from those of the same name. Everything is scaled by epochs and images. Nothing is written.
    """
    experiment = open_matrix(config)
    missing, done = experiment.missing(), experiment.done()
    seconds, unknown = 0.0, set()
    for what, count, pace in _to_do(experiment, missing):
        if pace is None:
            unknown.add(what)
        else:
            seconds += pace * count
    return MatrixPlan(
        cells=len(experiment.grid.recipes),
        done=sum(recipe.key in done for recipe in experiment.grid.recipes),
        missing=[recipe.title for recipe in missing],
        seconds_left=round(seconds, 1),
        unknown=sorted(unknown),
        output=experiment.store.url,
    )


def _training_paces(experiment: Experiment) -> dict[tuple[str, str], float]:
    """Return the mean seconds per image and epoch by (defense, victim) and by ("", victim)."""
    found: dict[tuple[str, str], list[float]] = {}
    done = experiment.done()
    for recipe in experiment.grid.recipes:
        if recipe.key in done:
            result, arch = experiment.result(recipe.key), recipe.victim.config.arch
            pace = result.seconds / (len(result.test_accuracy) * result.images)
            for key in ((recipe.row.entry.name, arch), ("", arch)):
                found.setdefault(key, []).append(pace)
    return {key: statistics.fmean(values) for key, values in found.items()}


def _to_do(experiment: Experiment, missing: list[Recipe]) -> Iterator[tuple[str, float, float | None]]:
    """Yield (what, images, seconds per image or None) for each training and each set that is still to be made."""
    images, cache, limits = len(experiment.sets.source.ids), experiment.cache, experiment.config.matrix
    _, concurrent, _ = shares(limits.num_gpus, limits.max_concurrent, _this_machine())
    training = _training_paces(experiment)
    for recipe in missing:
        victim, arch = recipe.victim, recipe.victim.config.arch
        pace = training.get((recipe.row.entry.name, arch)) or training.get(("", arch))
        yield f"training {victim.entry.label}", victim.config.epochs * images / concurrent, pace
    paces = {kind: _paces(experiment, kind) for kind in ("poisons", "defended")}
    for key, column in {one.column.key: one.column for one in missing if one.column.config}.items():
        if cache.note("poisons", key) is None:
            yield f"poison {column.entry.label}", images, paces["poisons"].get(column.entry.name)
    for key, need in {need.key: need for one in missing for need in one.needs}.items():
        if cache.note("defended", key) is None:
            yield f"images under {need.row.entry.label}", images, paces["defended"].get(need.row.entry.name)
    for key, row in {one.row.denoiser: one.row for one in missing if one.row.denoiser}.items():
        if not row.config.purify.denoiser and cache.note("denoisers", key) is None:
            yield f"denoiser of {row.entry.label}", images, None


def _paces(experiment: Experiment, kind: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for entry in experiment.store.list(f"cache/{kind}"):
        if entry.key.endswith(".json") and entry.key.count("/") == 2:
            note = json.loads(experiment.store.read(entry.key))
            found.setdefault(note["name"], []).append(note["seconds"] / note["images"])
    return {name: statistics.fmean(values) for name, values in found.items()}


def sweep_view(experiment: Experiment) -> SweepView:
    """Return a tidy row for every trial that is measured, the columns that vary, and the best settings."""
    trials, sets = experiment.measured_trials(), experiment.sets
    rows = [trial_row(experiment, trial) for trial in trials]
    front = pareto_front([row["proxy_accuracy"] for row in rows], [row["psnr"] for row in rows])
    for row, best in zip(rows, front, strict=True):
        row["pareto"] = best
    names = [key.split(".")[1] for key in experiment.space]
    axes = [name for name in names if len({str(row.get(name)) for row in rows}) > 1]
    return SweepView(
        axes=[name for name in axes if all(name in row for row in rows)],
        rows=rows,
        best=_best_tree(experiment, best_trial(experiment)) if trials else {},
        summary=(
            f"{len(rows)} of {counted(experiment.trials_wanted(), 'trial')}, "
            f"{len(sets.source.ids):,} of {counted(sets.total, 'image')}, scored on "
            f"{len(sets.test.ids):,} clean ones"
        ),
    )


def best_trial(experiment: Experiment) -> Trial:
    """Return the trial of the highest score; one that was stopped early only if there is no other.

    Raises EclipseError if nothing was measured.
    """
    trials = experiment.measured_trials()
    if not trials:
        first = next(iter(experiment.failures.values()), "no trial was run")
        raise EclipseError(f"no trial could be measured: {first}")

    def order(trial: Trial) -> tuple[bool, float]:
        stopped = any(experiment.result(recipe.key).stopped for recipe in trial.recipes)
        return sweep_order(stopped, trial_score(experiment, trial))

    return min(trials, key=order)


def _best_tree(experiment: Experiment, trial: Trial) -> dict[str, dict[str, Any]]:
    """Return the sections that `purify --config` needs; of the others only what is not the default."""
    config = trial.row.config
    purify = config.purify.model_dump(mode="json", exclude_defaults=True)
    tree = {
        "data": config.data.model_dump(mode="json", exclude_defaults=True, exclude=PLACES),
        "purify": {**purify, "denoiser": Store(denoiser_folder(trial.row, experiment.cache)).url},
        "compensation": config.compensation.model_dump(mode="json"),
        "run": {"seed": config.run.seed},
    }
    return {section: keys for section, keys in tree.items() if keys}


def sweep_result(experiment: Experiment) -> SweepResult:
    """Return the best settings of a sweep. Raises EclipseError if nothing was measured."""
    best = best_trial(experiment)
    config = best.row.config
    return SweepResult(
        trials=len(experiment.measured_trials()),
        best={
            "purify": {name: getattr(config.purify, name) for name in search.PURIFY_AXES},
            "compensation": {name: getattr(config.compensation, name) for name in COMPENSATION_AXES},
        },
        score=round(trial_score(experiment, best), 3),
        failed=len(experiment.failures),
        output=experiment.store.url,
        failures=experiment.failures,
    )


def sweep_plan(config: Config) -> SweepPlan:
    """Return which trials a run would do, and how long it takes, timed on a few images; nothing is written."""
    experiment = open_sweep(config)
    config, left, listed = experiment.config, experiment.trials_left(), experiment.trials is not None
    missing, limits = experiment.missing(), config.sweep
    _, concurrent, threads = shares(limits.num_gpus, limits.max_concurrent, _this_machine())
    needs = {need.key: need for recipe in missing for need in recipe.needs}
    unmade = [need for key, need in needs.items() if experiment.cache.note("defended", key) is None]
    sets = experiment.sets
    images = {True: len(sets.source.ids), False: len(sets.test.ids)}
    passes = sum(
        images[need.column is not None] * int(need.row.config.purify.num_inference_steps or 1) for need in unmade
    )
    if not listed:
        passes = round(left * _mean_steps(experiment) * sum(images.values()))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pace = _seconds_a_step(experiment) if passes else 0.0
        epochs = left * limits.seeds * config.victim.epochs
        seconds = epochs * _seconds_an_epoch(experiment) if epochs else 0.0
    finally:
        torch.set_num_threads(before)
    denoisers = len(denoisers_to_train(experiment))
    unknown = [f"training {denoisers} denoisers"] if denoisers else []
    if pace is None:
        unknown.append("purification by a denoiser that is not there yet")
    titles = {trial.title for trial in experiment.measured_trials()}
    return SweepPlan(
        trials=experiment.trials_wanted(),
        done=len(titles),
        missing=[trial.title for trial in experiment.trials or [] if trial.title not in titles]
        or [f"{left} points that Optuna will choose"] * (left > 0),
        purifications=len({need.key for need in unmade if need.column}) if listed else left,
        denoisers=denoisers,
        seconds_left=round((seconds + passes * (pace or 0.0)) / concurrent, 1),
        unknown=unknown,
        output=experiment.store.url,
    )


def denoisers_to_train(experiment: Experiment) -> dict[str, Config]:
    """Return the settings of every denoiser that a missing trial needs and that is not there yet, by key."""
    if experiment.config.purify.denoiser:
        return {}
    rows = [recipe.row for recipe in experiment.missing()]
    if experiment.trials is None:
        points = search.deepest_points(experiment.space)
        rows = [search.make_trial(experiment.config, point, experiment.facts).row for point in points]
    needed = {row.denoiser: row.config for row in rows}
    return {key: config for key, config in needed.items() if experiment.cache.note("denoisers", key) is None}


def _mean_steps(experiment: Experiment) -> float:
    config = experiment.config
    values = experiment.space.get("purify.num_inference_steps", [config.purify.num_inference_steps])
    ends = [values.low, values.high] if isinstance(values, Range) else values
    return statistics.fmean(one or experiment.facts.of_denoiser(config).num_inference_steps for one in ends)


def _seconds_a_step(experiment: Experiment) -> float | None:
    """Return the time of one image and step, after one pass to warm up; None if no denoiser is there to try."""
    url = experiment.config.purify.denoiser
    if not url:
        return None
    denoiser = open_denoiser(url, experiment.config.purify.precision)
    source = experiment.sets.source
    images, ids = source.images[:TIMED_IMAGES], source.ids[:TIMED_IMAGES]
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        purify_images(np.array(images), denoiser, num_inference_steps=1, seed=0, ids=ids)
    return (time.perf_counter() - began) / len(ids)


def _seconds_an_epoch(experiment: Experiment) -> float:
    """Return the time of one epoch of a sweep's victim, from epochs of a few images."""
    source, config = experiment.sets.source, experiment.config
    count = min(len(source.ids), 4 * config.victim.batch_size)
    images, labels = np.array(source.images[:count]), np.array(labels_of(source)[:count])
    short = config.victim.model_copy(update={"epochs": 2})
    test = images[:TIMED_IMAGES], labels[:TIMED_IMAGES]
    ended: list[float] = []

    def on_epoch(*_: object) -> None:
        ended.append(time.perf_counter())

    train_victim(images, labels, *test, short, config.compensation, 0, default_device(), on_epoch)
    return (ended[1] - ended[0]) * len(source.ids) / count


def _this_machine() -> Resources:
    cores = os.cpu_count() or 1
    return Resources(cpus=2 * cores, gpus=torch.cuda.device_count(), cores=cores, local=True)


def pareto_front(defense: Sequence[float], fidelity: Sequence[float]) -> list[bool]:
    """Return which points no other one beats: better in one of the two and not worse in the other."""
    pairs = list(zip(defense, fidelity, strict=True))
    return [
        not any(a >= x and b >= y and (a, b) != (x, y) for a, b in pairs if not math.isnan(a + b))
        for x, y in pairs
    ]
