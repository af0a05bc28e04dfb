"""What a sweep has found, as tidy rows and the best settings, and about how long the rest will take."""

from __future__ import annotations

import json
import os
import statistics
import time
from typing import Any

import numpy as np
import torch

from eclipse_ray.cluster.connect import Resources, local_denoiser, open_denoiser
from eclipse_ray.config import Config, Range
from eclipse_ray.diffusion.checkpoint import read_card
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.experiments.objectives import pareto_front
from eclipse_ray.experiments.space import Trial
from eclipse_ray.experiments.sweep import Sweep, best_of, sweep_denoisers
from eclipse_ray.experiments.sweep_trial import Result, score_of
from eclipse_ray.experiments.tuner import shares
from eclipse_ray.results import SweepPlan, SweepResult, SweepView
from eclipse_ray.storage.store import Store
from eclipse_ray.victims.training import train_victim

COMPENSATION = ("mode", "p", "sigma", "coarse_sigma", "coarse_grid")
TIMED_IMAGES = 64
PLACES = {"source", "output", "clean", "test"}

Row = dict[str, Any]


def view(sweep: Sweep) -> SweepView:
    """Return a tidy row for every trial that is measured, the columns that vary, and the best settings."""
    done = sweep.done()
    rows = [_row(sweep, trial, result) for trial, result in done]
    objective = sweep.config.sweep.objective
    front = pareto_front([row[objective] for row in rows], [row["psnr"] for row in rows])
    for row, best in zip(rows, front, strict=True):
        row["pareto"] = best
    names = [key.split(".")[1] for key in sweep.space]
    axes = [name for name in names if len({str(row.get(name)) for row in rows}) > 1]
    sets = sweep.sets
    return SweepView(
        axes=[name for name in axes if all(name in row for row in rows)],
        rows=rows,
        best=_best_tree(sweep, best_of(sweep)[0]) if done else {},
        summary=(
            f"{len(rows)} of {sweep.config.sweep.trials if sweep.listed is None else len(sweep.listed)} trials, "
            f"{len(sets.source.ids):,} of {sets.total:,} images, scored on {len(sets.scored.ids):,} clean ones"
        ),
    )


def result(sweep: Sweep) -> SweepResult:
    """Return the best settings of a sweep. Raises EclipseError if nothing was measured."""
    found = best_of(sweep)[1]
    own = found["compensation"]
    return SweepResult(
        trials=len(sweep.done()),
        best={"purify": dict(found["purify"]), "compensation": {key: own[key] for key in COMPENSATION}},
        score=round(score_of(found, sweep.config), 3),
        objective=sweep.config.sweep.objective,
        failed=len(sweep.failures),
        output=sweep.store.url,
        failures=sweep.failures,
    )


def _row(sweep: Sweep, trial: Trial, result: Result) -> Row:
    own, given = trial.config.denoiser, bool(trial.config.purify.denoiser)
    sparse = _sparse_images(sweep, trial.config)
    return {
        **result["purify"],
        **{key: result["compensation"][key] for key in COMPENSATION},
        "preset": None if given else own.preset,
        "replication": None if given else own.replication,
        "iterations": None if given else own.iterations,
        "sparse": sparse,
        "sparse_percent": 100 * sparse / sweep.sets.total,
        "point": json.dumps(trial.point),
        "proxy_accuracy": result["proxy_accuracy"],
        "shortcut_score": result["shortcut_score"],
        "removed_accuracy": result["removed_accuracy"],
        "clean_confidence": result["clean_confidence"],
        "psnr": result["psnr"],
        "score": score_of(result, sweep.config),
        "stopped": result["stopped"],
        "epochs": result["epochs"],
        "images": result["images"],
        "scored_images": result["scored_images"],
        "seconds": result.get("seconds"),
        "device": result["device"],
        "fingerprint": trial.key,
    }


def _sparse_images(sweep: Sweep, config: Config) -> int:
    if config.purify.denoiser:
        return read_card(local_denoiser(config.purify.denoiser)).sparse_images
    return len(sweep.sets.parts[config.sweep.sparse_percent].ids)


def _best_tree(sweep: Sweep, trial: Trial) -> dict[str, dict[str, Any]]:
    """Return the sections that `purify --config` needs; how the source is read comes along where it was set."""
    config = trial.config
    folder = config.purify.denoiser or sweep.cache.url("denoisers", trial.denoiser)
    chosen = config.purify.model_dump(mode="json", exclude_unset=True)
    chosen |= {name: getattr(config.purify, name) for name in ("t_star", "num_inference_steps", "sampler")}
    tree = {
        "data": config.data.model_dump(mode="json", exclude_unset=True, exclude=PLACES),
        "purify": {**chosen, "denoiser": Store(folder).url},
        "compensation": config.compensation.model_dump(mode="json"),
        "run": {"seed": config.run.seed},
    }
    return {section: keys for section, keys in tree.items() if keys}


def plan(sweep: Sweep) -> SweepPlan:
    """Return which trials a run would do, and about how long it takes, timed on a few images here."""
    config, missing, left = sweep.config, sweep.missing(), sweep.left()
    _, concurrent, threads = shares(config.sweep.num_gpus, config.sweep.max_concurrent, _this_machine())
    needed = {trial.purified: trial for trial in missing}
    unmade = [trial for key, trial in needed.items() if sweep.cache.note("defended", key) is None]
    steps: float = sum(int(trial.config.purify.num_inference_steps or 1) for trial in unmade)
    if sweep.listed is None:
        steps = left * _mean_steps(sweep)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pace, seconds = _seconds_a_step(sweep) if steps else 0.0, 0.0
        if config.sweep.objective == "proxy_accuracy" and left:
            seconds = left * config.sweep.seeds * config.victim.epochs * _seconds_an_epoch(sweep)
    finally:
        torch.set_num_threads(before)
    denoisers = 0 if config.purify.denoiser else len(sweep_denoisers(sweep))
    unknown = [f"training {denoisers} denoisers"] if denoisers else []
    if pace is None:
        unknown.append("purification by a denoiser that is not there yet")
    images = len(sweep.sets.source.ids) + len(sweep.sets.scored.ids)
    return SweepPlan(
        trials=config.sweep.trials if sweep.listed is None else len(sweep.listed),
        done=len(sweep.done()),
        missing=[trial.title for trial in missing] or [f"{left} points that Optuna will choose"] * (left > 0),
        purifications=left if sweep.listed is None else len(unmade),
        denoisers=denoisers,
        seconds_left=round((seconds + images * steps * (pace or 0.0)) / concurrent, 1),
        unknown=unknown,
        output=sweep.store.url,
    )


def _mean_steps(sweep: Sweep) -> float:
    values = sweep.space.get("purify.num_inference_steps")
    if values is None:
        known = sweep.facts.recommended
        default = known.num_inference_steps if known else sweep.config.denoiser.num_inference_steps
        return float(sweep.config.purify.num_inference_steps or default)
    return statistics.fmean([values.low, values.high] if isinstance(values, Range) else values)


def _seconds_a_step(sweep: Sweep) -> float | None:
    """Return the time of one image and step, after one pass to warm up; None if no denoiser is there to try."""
    url = sweep.config.purify.denoiser
    if not url:
        return None
    denoiser = open_denoiser(url, sweep.config.purify.precision)
    images, ids = sweep.sets.source.images[:TIMED_IMAGES], sweep.sets.source.ids[:TIMED_IMAGES]
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        purify_images(np.array(images), denoiser, num_inference_steps=1, seed=0, ids=ids)
    return (time.perf_counter() - began) / len(ids)


def _seconds_an_epoch(sweep: Sweep) -> float:
    """Return the time of one epoch of the proxy victim, from epochs of a few images."""
    source, config = sweep.sets.source, sweep.config
    assert source.labels is not None
    count = min(len(source.ids), 4 * config.victim.batch_size)
    images, labels = np.array(source.images[:count]), np.array(source.labels[:count])
    short = config.victim.model_copy(update={"epochs": 2})
    began: list[float] = []
    test = slice(0, TIMED_IMAGES)
    train_victim(
        images,
        labels,
        images[test],
        labels[test],
        short,
        config.compensation,
        0,
        default_device(),
        lambda *_: began.append(time.perf_counter()),
    )
    return (began[1] - began[0]) * len(source.ids) / count


def _this_machine() -> Resources:
    cores = os.cpu_count() or 1
    return Resources(cpus=2 * cores, gpus=torch.cuda.device_count(), cores=cores, local=True)
