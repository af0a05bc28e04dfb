"""Train victims on a dataset, one a seed, side by side on Ray, and measure them on clean test images."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

import ray
import torch

from eclipse_ray import ledger
from eclipse_ray.cluster.connect import Resources, connect, local_denoiser, require_place
from eclipse_ray.cluster.metrics import open_curves
from eclipse_ray.cluster.work import BoardWatcher, on_a_thread, start_board
from eclipse_ray.config import CompensationConfig, Config
from eclipse_ray.datasets.memory import ImageSet, load_images
from eclipse_ray.diffusion.checkpoint import read_card
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.log import say
from eclipse_ray.progress import ProgressLine
from eclipse_ray.results import EvaluateResult
from eclipse_ray.storage.store import Store
from eclipse_ray.victims.training import train_victim


def evaluate(config: Config) -> EvaluateResult:
    """Train evaluate.seeds victims on data.source and test them on data.test; the last epoch decides.

    Compensation is what the source's own run says, unless set here. Raises InputError for missing labels, sets
    that share images, or images of two sizes.
    """
    source, test_url = config.data.source, config.data.test
    if not source or not test_url:
        raise ConfigError("evaluate needs both: eclipse-ray evaluate SRC --test SRC")
    train = load_images(source, config.data, require_labels=True)
    test = load_images(test_url, config.data, require_labels=True)
    _check_disjoint(config, source, train, test_url, test)
    compensation = source_compensation(config, source)
    runs = _train_all(config, train, test, compensation)
    last = [run["test_accuracy"][-1] for run in runs]
    return EvaluateResult(
        test_accuracy=round(statistics.fmean(last), 2),
        test_accuracy_std=round(statistics.stdev(last), 2) if len(last) > 1 else 0.0,
        seeds=len(last),
        epochs=config.victim.epochs,
        victim=config.victim.arch,
        best_epoch_accuracy=round(statistics.fmean(max(run["test_accuracy"]) for run in runs), 2),
        compensation=compensation.mode,
        accuracies=[round(value, 2) for value in last],
        curves=[[round(value, 2) for value in run["test_accuracy"]] for run in runs],
    )


def source_compensation(config: Config, source: str) -> CompensationConfig:
    """Return the compensation for the training loader: what SRC's run says, else none, where not set here.

    Key by key: a preset may set one key without deciding about the mode.
    """
    recorded = _recorded_config(source).get("compensation") or {"mode": "none"}
    chosen = config.compensation.model_dump(exclude_unset=True)
    if chosen and "mode" not in chosen and recorded["mode"] == "none":
        say(
            f"note: compensation.{min(chosen)} has no effect: {source} was not compensated, no mode is set; add "
            "--set compensation.mode=augment to compensate while the victim trains"
        )
    return CompensationConfig.model_validate({**recorded, **chosen})


def _recorded_config(source: str) -> dict[str, Any]:
    """Return the settings of the purification that made SRC, if one did."""
    return ledger.recorded_settings(Store(source))


def _check_disjoint(config: Config, source: str, train: ImageSet, test_url: str, test: ImageSet) -> None:
    """Refuse to measure on images that were trained on, by the victim or by the denoiser."""
    if train.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            f"{source} has {train.images.shape[1:3]} images, {test_url} has {test.images.shape[1:3]}: "
            "train and test images must have the same size"
        )
    sparse: set[str] = set()
    if config.data.clean:
        sparse = set(load_images(config.data.clean, config.data).hashes())
    denoiser = (_recorded_config(source).get("purify") or {}).get("denoiser")
    if denoiser:
        sparse |= set(read_card(local_denoiser(denoiser)).sparse_hashes)
    refuse_shared_images(f"{source}, {test_url}", set(train.hashes()), set(test.hashes()), sparse)


def refuse_shared_images(where: str, train: set[str], test: set[str], sparse: set[str]) -> None:
    """Raise InputError unless the content hashes of training, test and sparse clean images are disjoint."""
    for name, first, second in (
        ("training and test set", train, test),
        ("sparse clean set and test set", sparse, test),
        ("sparse clean set and training set", sparse, train),
    ):
        shared = len(first & second)
        if shared:
            raise InputError(f"{where}: {name} share {shared} images (by content); they must be disjoint")


def _train_all(
    config: Config, train: ImageSet, test: ImageSet, compensation: CompensationConfig
) -> list[dict[str, Any]]:
    # First: a logger that is not there is refused before Ray starts.
    curves = open_curves(config.run.loggers, config.data.output)
    resources = connect(config)
    seeds = [config.run.seed + index for index in range(config.evaluate.seeds)]
    gpus, threads = _share(resources, len(seeds))
    require_place(resources, threads * resources.cpus_per_core, gpus, "a victim")
    board = start_board()
    what = f"evaluate {PurePosixPath(str(config.data.source)).name}"
    line = ProgressLine(what, "epochs", len(seeds) * config.victim.epochs, config.run.progress_seconds)
    data = ray.put((train.images, train.labels, test.images, test.labels))
    task = ray.remote(num_cpus=threads * resources.cpus_per_core, num_gpus=gpus)(_train_one)
    seen: set[tuple[int, int]] = set()

    def show(entry: dict[str, Any]) -> None:
        # A victim that Ray had to start again reports its first epochs twice.
        epoch = (entry["seed"], entry["epoch"])
        if epoch not in seen:
            seen.add(epoch)
            line.advance(1, note=_note(entry))
            curves.log({f"seed {entry['seed']}": entry["test_accuracy"]}, entry["epoch"])

    with line, BoardWatcher(board, show):
        pending = [
            task.remote(data, config.model_dump(mode="json"), compensation.model_dump(), seed, threads, board)
            for seed in seeds
        ]
        runs: list[dict[str, Any]] = on_a_thread(lambda: ray.get(pending), "training of a victim")
    return runs


def _share(resources: Resources, victims: int) -> tuple[float, int]:
    """Return (GPUs, CPU threads) of one victim, so that all cores or GPUs are used at once."""
    if resources.gpus:
        return min(1.0, resources.gpus / victims), 1
    return 0.0, max(1, resources.cores // victims)


def _note(entry: dict[str, Any]) -> str:
    return f"seed {entry['seed']} epoch {entry['epoch']}: {entry['test_accuracy']:.1f} %"


def _train_one(
    data: tuple[Any, Any, Any, Any],
    config: dict[str, Any],
    compensation: dict[str, Any],
    seed: int,
    threads: int,
    board: Any,
) -> dict[str, Any]:
    torch.set_num_threads(threads)

    def on_epoch(epoch: int, accuracy: float, _loss: float) -> None:
        board.post.remote({"seed": seed, "epoch": epoch, "test_accuracy": accuracy})

    images, labels, test_images, test_labels = data
    run = train_victim(
        images,
        labels,
        test_images,
        test_labels,
        Config.model_validate(config).victim,
        CompensationConfig.model_validate(compensation),
        seed,
        default_device(),
        on_epoch,
    )
    return asdict(run)
