"""Ray Train fits the denoiser on the enlarged sparse clean set, on any number of workers, and resumes.

With `denoiser.against` it first looks for a filter per class (diffusion/filters.py) and fits surrogates on the
suspicious set, which are kept in the output folder; the denoiser then learns to remove what they have learned
(inversion.py).
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from numpy.typing import NDArray
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback

from eclipse_ray import ledger, log
from eclipse_ray.cluster.connect import (
    Resources,
    connect,
    local_denoiser,
    refuse_process_local,
    require_cpus,
    require_gpus,
    require_place,
)
from eclipse_ray.cluster.metrics import Curves, open_curves
from eclipse_ray.cluster.work import BoardWatcher, Watch, brought_home, on_a_thread, reaching, settle, start_board
from eclipse_ray.config import Config, DenoiserConfig, digest, to_yaml
from eclipse_ray.datasets.formats import refuse_output
from eclipse_ray.datasets.memory import ImageSet, MixedSet, load_mixed, load_squares
from eclipse_ray.diffusion import training
from eclipse_ray.diffusion.checkpoint import (
    CARD_FILE,
    DENOISER_FILES,
    Card,
    FilteredClass,
    read_card,
    save_denoiser,
)
from eclipse_ray.diffusion.filters import FEWEST_TRUSTED, NARROWEST, SETS, find_filters, undo_filters
from eclipse_ray.diffusion.network import timestep_scale
from eclipse_ray.diffusion.sampling import ENGINE_VERSION
from eclipse_ray.diffusion.training import centre_crops, image_buffer
from eclipse_ray.errors import ConfigError, InputError, InterruptedRunError, ResumeError
from eclipse_ray.inversion import METHOD, SURROGATES, Inversion, fit_surrogate, open_surrogate, surrogate_settings
from eclipse_ray.log import counted, say
from eclipse_ray.poisons.interface import LabelledImages, Session
from eclipse_ray.progress import ProgressLine
from eclipse_ray.results import TrainResult
from eclipse_ray.storage.store import Store
from eclipse_ray.victims.training import fast_where_allowed

STATE_FILE = "state.pt"
FILTERS_KEY = "_eclipse/filters.json"
MOST_SUSPICIOUS = 50_000
"""Most images that surrogates are trained on; their number of optimiser steps is bounded anyway."""


def train(config: Config) -> TrainResult:
    """Fit a denoiser on data.clean and write it to denoiser.output; the same command resumes or returns at once.

    Raises ConfigError or InputError for unusable input, ResumeError if the folder belongs to other settings.
    """
    clean, output = _locations(config)
    for url in (clean, config.denoiser.against):
        if url:
            refuse_output(url, output)
    store = Store(output)
    refuse_process_local(output, store.in_this_process_only)
    store.require_writable()
    images = _sparse_set(config, clean)
    suspicious = _suspicious_set(config, clean, images) if config.denoiser.against else None
    fingerprint = _fingerprint(config, images.hashes, suspicious)
    ledger.claim(store, fingerprint, to_yaml(config))
    log.set_run("train", fingerprint.value)
    if not store.exists(CARD_FILE):
        _run_training(config, store, images, suspicious, fingerprint.value)
    else:
        say(f"{output}: already trained with these settings and images")
    card = read_card(local_denoiser(output))
    if card.denoise_psnr is None or card.noisy_psnr is None:
        raise ResumeError(f"{output}: holds an imported denoiser; name another folder with --out")
    return TrainResult(card.iterations, card.denoise_psnr, card.noisy_psnr, output)


def _locations(config: Config) -> tuple[str, str]:
    if not config.data.clean:
        raise ConfigError("data.clean is not set: name the sparse clean set, for example --clean my/clean")
    if not config.denoiser.output:
        raise ConfigError(
            "denoiser.output is not set: name a folder for the denoiser, for example --out my/denoiser"
        )
    return config.data.clean, config.denoiser.output


def _sparse_set(config: Config, clean: str) -> MixedSet:
    images = load_mixed(clean, config.data)
    side = config.denoiser.image_size
    for name, (height, width) in zip(images.ids, images.sizes.tolist(), strict=True):
        if min(height, width) < side:
            raise InputError(
                f"{clean}: image {name} is {width}x{height} pixels, the denoiser trains on {side}x{side}; "
                f"leave it out, lower denoiser.image_size, or enlarge it with --resize {side}"
            )
    if len(images.ids) < 2:
        raise InputError(f"{clean}: at least 2 images are needed, one of them held out; found {len(images.ids)}")
    return images


@dataclass(frozen=True)
class Suspicious:
    """At most MOST_SUSPICIOUS squares; and of the whole set its size, a digest, and its labels by content."""

    squares: ImageSet
    num_classes: int
    total: int
    content: str
    known: dict[str, list[int]]

    def record(self) -> dict[str, Any]:
        """Return what decides the surrogates and what is done with them, for fingerprint and card."""
        return {**METHOD, "images": self.total, "content": self.content}


def _suspicious_set(config: Config, clean: str, trusted: MixedSet) -> Suspicious:
    """Return the images of denoiser.against. Raises InputError if it shares images with the trusted ones."""
    against = str(config.denoiser.against)
    side, seed = config.denoiser.image_size, config.run.seed
    squares, known = load_squares(against, config.data, side, MOST_SUSPICIOUS, seed)
    shared = len(known.keys() & set(trusted.hashes))
    if shared:
        raise InputError(
            f"{against}, {clean}: share {counted(shared, 'image')} (by content); they must be disjoint"
        )
    labels = [label for each in known.values() for label in each]
    if len(set(labels)) < 2:
        raise InputError(f"{against}: all images have one label, so no network can learn what poisons them")
    content = digest(sorted([name, *sorted(each)] for name, each in known.items()))
    return Suspicious(squares, max(max(labels) + 1, len(squares.classes or [])), len(labels), content, known)


def deciding_settings(denoiser: DenoiserConfig) -> dict[str, Any]:
    """Return the settings that decide the weights."""
    settings = denoiser.model_dump(mode="json", exclude=denoiser.OF_A_RUN)
    # Denoisers that were trained when float32 was the only precision have fingerprints without it.
    if settings["precision"] == "float32":
        del settings["precision"]
    # And those without spots, without them. (A folder of another ENGINE_VERSION is refused; keys of grids stay.)
    if settings["spots"] == 0:
        del settings["spots"]
    # Fingerprints of denoisers that were trained when there was another way to draw timesteps name this one.
    return {**settings, "timestep_sampler": "uniform"}


def _fingerprint(config: Config, hashes: list[str], suspicious: Suspicious | None) -> ledger.Fingerprint:
    tree = {
        "denoiser": deciding_settings(config.denoiser),
        "data": {"resize": config.data.resize},
        "run": {"seed": config.run.seed},
        **({"against": suspicious.record()} if suspicious else {}),
    }
    return ledger.Fingerprint(config=tree, weights="", input=digest(sorted(hashes)), engine_version=ENGINE_VERSION)


def _run_training(
    config: Config, store: Store, images: MixedSet, suspicious: Suspicious | None, fingerprint: str
) -> None:
    curves = open_curves(config.run.loggers, store.url, fingerprint)
    with ProgressLine("train", "iterations", 1, config.run.progress_seconds, phase=reaching(config)):
        resources = connect(config)
        workers, use_gpu = _workers(config.denoiser, resources)
        trainer = _Trainer(config, store, resources, workers, use_gpu)
        require_cpus(resources, workers, f"training with denoiser.num_workers={workers}")
        require_gpus(resources, workers * use_gpu, f"denoiser.use_gpu with denoiser.num_workers={workers}")
        require_place(resources, 1, float(use_gpu), "a worker of the training")
    name, record, filters = "train", None, []
    starting = f"starting {counted(workers, 'worker')}"
    if suspicious is not None:
        name, record = "train, part 3 of 3: denoiser", suspicious.record()
        filters = _find_filters(config, store, images, suspicious)
        suspicious = _without_filters(suspicious, filters)
        _fit_surrogates(trainer, suspicious, fingerprint)
    line = ProgressLine(
        name, "iterations", config.denoiser.iterations, config.run.progress_seconds, phase=starting
    )
    settings = {
        # One buffer, which every worker of a node reads in place.
        "pixels": ray.put(images.pixels),
        "sizes": images.sizes.tolist(),
        "hashes": images.hashes,
        "fingerprint": fingerprint,
        "against": record,
        "filters": [each.model_dump() for each in filters],
        "num_classes": suspicious.num_classes if suspicious else 0,
    }
    callbacks: list[UserCallback] = [TrainLogger(curves)] if config.run.loggers else []
    watch = Watch("training", "iteration", config.run.watchdog_seconds)
    checkpoint = trainer.fit(
        _train_worker, settings, fingerprint, lambda entry: _show(line, entry), line, watch, callbacks
    )
    if checkpoint is None:
        raise InterruptedRunError("training stopped without a checkpoint; run the same command again to resume")
    _publish(checkpoint, store)


@dataclass(frozen=True)
class _Trainer:
    """How Ray Train runs a function on workers: both the fit of the surrogates and that of the denoiser."""

    config: Config
    store: Store
    resources: Resources
    workers: int
    use_gpu: bool

    def fit(
        self,
        worker: Callable[[dict[str, Any]], None],
        settings: dict[str, Any],
        name: str,
        show: Callable[[dict[str, Any]], None],
        line: ProgressLine,
        watch: Watch,
        callbacks: list[UserCallback],
    ) -> Checkpoint | None:
        """Run `worker` under `name` and return its last checkpoint; what it posts on the board goes to `show`.

        Raises its EclipseError, and InterruptedRunError when Ray gives up or `watch` sees no sign of life.
        """
        board, store = start_board(), self.store
        trainer = ray.train.torch.TorchTrainer(
            worker,
            train_loop_config={
                "config": self.config.model_dump(mode="json"),
                "output": store.url,
                "threads": 0 if self.use_gpu else max(1, self.resources.cores // self.workers),
                "board": board,
                **settings,
            },
            scaling_config=ScalingConfig(
                # On a cluster, one worker is enough to go on with while a lost node is replaced.
                num_workers=self.workers if self.resources.local else (1, self.workers),
                use_gpu=self.use_gpu,
                resources_per_worker={"CPU": 1},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=store.path("_eclipse/train") if store.local else f"{store.url}/_eclipse/train",
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                failure_config=FailureConfig(max_failures=3),
                callbacks=callbacks,
            ),
        )
        with line, BoardWatcher(board, show, watch):
            result = on_a_thread(trainer.fit, watch)
        if result.error is not None:
            raise brought_home(result.error, watch.what)
        return result.checkpoint


def _find_filters(config: Config, store: Store, trusted: MixedSet, suspicious: Suspicious) -> list[FilteredClass]:
    """Return the classes of the suspicious set that went through a filter each; they are looked for only once.

    With data.resize none are looked for: images are known by what is stored, and a filter acts at that size.
    """
    if store.exists(FILTERS_KEY):
        return [FilteredClass.model_validate(each) for each in json.loads(store.read(FILTERS_KEY))]
    sets, side = min(SETS, config.denoiser.iterations), config.denoiser.image_size
    known, classes = suspicious.known, suspicious.squares.classes
    taps: dict[int, torch.Tensor] | None = None
    if config.data.resize is None:
        with ProgressLine("train, part 1 of 3: filters", "sets", sets, config.run.progress_seconds) as line:
            taps = find_filters(
                _squares(trusted, side),
                torch.from_numpy(suspicious.squares.images),
                torch.from_numpy(suspicious.squares.labels),
                config.run.seed,
                sets,
                lambda done: line.advance(done - line.done),
            )
    found = [
        # An image that has two labels also has two filters, and neither is right.
        FilteredClass(
            label=label, taps=each.tolist(), images=sorted(k for k, v in known.items() if set(v) == {label})
        )
        for label, each in (taps or {}).items()
    ]
    say(f"{config.denoiser.against}: {_verdict(taps, classes)}")
    store.write(FILTERS_KEY, json.dumps([each.model_dump() for each in found]).encode())
    return found


def _verdict(taps: dict[int, torch.Tensor] | None, classes: Sequence[str] | None) -> str:
    if taps is None:
        return (
            f"whether classes were blurred cannot be told: that takes {FEWEST_TRUSTED} trusted images of some "
            f"variety, {NARROWEST} pixels or more on each side, and no data.resize"
        )
    names = ", ".join(classes[label] if classes else str(label) for label in taps)
    return (
        f"each of these classes was blurred, which purification undoes: {names}"
        if names
        else "no class is blurred"
    )


def _squares(images: MixedSet, side: int) -> torch.Tensor:
    """Return the central squares of the images, uint8 (N, side, side, 3)."""
    buffer = image_buffer(torch.from_numpy(images.pixels.copy()), torch.from_numpy(images.sizes))
    return centre_crops(buffer, side)


def _without_filters(suspicious: Suspicious, filters: list[FilteredClass]) -> Suspicious:
    """Return the suspicious set with what was found undone: surrogates are to learn what is left."""
    squares = suspicious.squares
    pixels = torch.from_numpy(squares.images.copy())
    for each in filters:
        rows = np.flatnonzero(squares.labels == each.label)
        pixels[rows] = undo_filters(pixels[rows], torch.tensor(each.taps).expand(len(rows), -1, -1))
    return replace(suspicious, squares=replace(squares, images=pixels.numpy()))


def _surrogate_key(number: int) -> str:
    return f"_eclipse/surrogates/{number}.safetensors"


def _fit_surrogates(trainer: _Trainer, suspicious: Suspicious, fingerprint: str) -> None:
    """Fit the surrogates that the output folder does not hold yet; each worker of Ray Train fits whole ones."""
    config = trainer.config
    left = [number for number in range(SURROGATES) if not trainer.store.exists(_surrogate_key(number))]
    if not left:
        return
    squares, iterations = suspicious.squares, config.denoiser.iterations
    epochs = surrogate_settings(len(squares.ids), iterations).surrogate_epochs
    line = ProgressLine(
        "train, part 2 of 3: surrogates", "epochs", epochs * len(left), config.run.progress_seconds
    )
    settings = {
        "pixels": ray.put(squares.images),
        "labels": ray.put(squares.labels),
        "ids": squares.ids,
        "num_classes": suspicious.num_classes,
    }
    trainer = replace(trainer, workers=min(trainer.workers, len(left)))
    watch = Watch("training of the surrogates", "epoch", config.run.watchdog_seconds)
    done: dict[int, int] = {}

    def show(entry: dict[str, Any]) -> None:
        # A surrogate that Ray had to start again reports its first epochs twice.
        done[entry["surrogate"]] = entry["epoch"]
        line.advance(sum(done.values()) - line.done, note=entry["note"])

    trainer.fit(_surrogate_worker, settings, f"{fingerprint}-surrogates", show, line, watch, [])


def _surrogate_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker; fits its share of the surrogates that are missing, and stores each at once."""
    config, store = Config.model_validate(settings["config"]), Store(settings["output"])
    context = ray.train.get_context()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    pixels, labels = _read_only(settings["pixels"]), _read_only(settings["labels"])
    suspicious = LabelledImages(pixels, labels, settings["ids"], settings["num_classes"])
    for number in range(context.get_world_rank(), SURROGATES, context.get_world_size()):
        if store.exists(_surrogate_key(number)):
            continue

        def report(done: int, _total: int, note: str, number: int = number) -> None:
            settings["board"].post.remote({"surrogate": number, "epoch": done, "note": note})

        session = Session(ray.train.torch.get_device(), report, lambda: None, lambda _state: None)
        state = fit_surrogate(suspicious, config.denoiser.iterations, config.run.seed + number, session)
        store.write(_surrogate_key(number), safetensors.torch.save(state))
    settle(settings["board"])


class TrainLogger(UserCallback):
    """Hands what the first worker reports to the curves, in the process that controls the training."""

    def __init__(self, curves: Curves) -> None:
        self.curves = curves

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Log one report; called by Ray Train when all workers have made it."""
        values = {key: value for key, value in metrics[0].items() if key != "iteration"}
        self.curves.log(values, int(metrics[0]["iteration"]))


def _workers(denoiser: DenoiserConfig, resources: Resources) -> tuple[int, bool]:
    """Return how many workers train and whether each has a GPU; the batch is divided among them."""
    use_gpu = resources.gpus >= (denoiser.num_workers or 1) if denoiser.use_gpu is None else denoiser.use_gpu
    automatic = min(resources.gpus if use_gpu else resources.cores, denoiser.batch_size)
    return denoiser.num_workers or max(1, automatic), use_gpu


def _show(line: ProgressLine, entry: dict[str, Any]) -> None:
    if "begins" in entry:
        # Or begins again after a failure: only now does the clock say something.
        line.begin(entry["iteration"])
        line.phase = "first iterations"
        return
    if "loss" not in entry:
        line.advance(entry["iteration"] - line.done)
        return
    note = f"loss {entry['loss']:.4f}, held-out {entry['denoise_psnr']:.2f} dB (noised {entry['noisy_psnr']:.2f})"
    line.advance(entry["iteration"] - line.done, note=note)


def _publish(checkpoint: Checkpoint, store: Store) -> None:
    # The card is the last of DENOISER_FILES: a folder without one is known to be unfinished.
    with checkpoint.as_directory() as folder:
        for name in DENOISER_FILES:
            store.write(name, (Path(folder) / name).read_bytes())


def _train_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker; every worker runs this with its rank."""
    config = Config.model_validate(settings["config"])
    context = ray.train.get_context()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = ray.train.torch.get_device()
    images = image_buffer(_read_only(settings["pixels"]), torch.tensor(settings["sizes"], dtype=torch.int64))
    trained, heldout = training.split_heldout(len(images), config.denoiser.heldout_fraction, config.run.seed)
    fit = training.start_fit(config.denoiser, config.run.seed, device)
    _restore(fit)
    first = context.get_world_rank() == 0
    if first:
        settings["board"].post.remote({"iteration": fit.iteration, "begins": True})
    shown = time.monotonic()

    def step(iteration: int) -> None:
        # The first report may be minutes away, and people want to know sooner how long it all takes.
        nonlocal shown
        if first and time.monotonic() - shown >= config.run.progress_seconds / 2:
            shown = time.monotonic()
            settings["board"].post.remote({"iteration": iteration})

    def report(progress: training.Progress) -> None:
        if first:
            settings["board"].post.remote(vars(progress))

    def checkpoint(state: training.Fit) -> None:
        card = _card(config, state, settings)
        _report_checkpoint(state if first else None, card)

    training.run_fit(
        fit,
        images.select(trained).to(device),
        centre_crops(images.select(heldout), config.denoiser.image_size).to(device),
        config.run.seed,
        report,
        checkpoint,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        wrap=ray.train.torch.prepare_model,
        on_step=step,
        perturb=_inversion(config, settings, device) if settings["against"] else None,
    )
    settle(settings["board"])


def _inversion(config: Config, settings: dict[str, Any], device: torch.device) -> Inversion:
    store, context = Store(settings["output"]), ray.train.get_context()
    states = [safetensors.torch.load(store.read(_surrogate_key(number))) for number in range(SURROGATES)]
    return Inversion(
        [
            fast_where_allowed(
                open_surrogate(state, settings["num_classes"], device), config.denoiser.precision, device
            )
            for state in states
        ],
        settings["num_classes"],
        config.denoiser.batch_size,
        config.run.seed,
        context.get_world_rank(),
        context.get_world_size(),
    )


def _read_only(reference: Any) -> torch.Tensor:
    array: NDArray[Any] = ray.get(reference)
    with warnings.catch_warnings():
        # The object store hands out read-only memory; torch warns of writes, and nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _restore(fit: training.Fit) -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        fit.restore(torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True))


def _card(config: Config, fit: training.Fit, settings: dict[str, Any]) -> Card:
    last = fit.history[-1] if fit.history else {"denoise_psnr": 0.0, "noisy_psnr": 0.0}
    denoiser = config.denoiser
    against: dict[str, Any] = {}
    if settings["against"]:
        seeds = [config.run.seed + number for number in range(SURROGATES)]
        against = {"against": {"source": denoiser.against, **settings["against"], "surrogate_seeds": seeds}}
    return Card(
        t_max=denoiser.t_max or denoiser.num_train_timesteps,
        t_star=denoiser.t_star,
        num_inference_steps=denoiser.num_inference_steps,
        sampler=denoiser.sampler,
        timestep_scale=timestep_scale(denoiser),
        iterations=fit.iteration,
        denoise_psnr=last["denoise_psnr"],
        noisy_psnr=last["noisy_psnr"],
        sparse_images=len(settings["hashes"]),
        sparse_hashes=sorted(settings["hashes"]),
        fingerprint=settings["fingerprint"],
        settings={**denoiser.model_dump(mode="json", exclude={"against"}), "seed": config.run.seed, **against},
        filters=settings["filters"],
        history=fit.history,
    )


def _report_checkpoint(fit: training.Fit | None, card: Card) -> None:
    """Report from every rank, as Ray requires; only the first has a checkpoint, a whole denoiser folder."""
    metrics = {"iteration": card.iterations, "denoise_psnr": card.denoise_psnr}
    if fit is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(fit.state(), Path(folder) / STATE_FILE)
        save_denoiser(folder, fit.averaged(), card)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
