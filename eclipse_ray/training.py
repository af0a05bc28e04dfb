"""Ray Train fits the denoiser on the enlarged sparse clean set, on any number of workers, and resumes."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
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
from eclipse_ray.cluster.work import BoardWatcher, Watch, brought_home, on_a_thread, reaching, start_board
from eclipse_ray.config import Config, DenoiserConfig, digest, to_yaml
from eclipse_ray.datasets.memory import MixedSet, load_mixed
from eclipse_ray.diffusion import training
from eclipse_ray.diffusion.checkpoint import CARD_FILE, DENOISER_FILES, Card, read_card, save_denoiser
from eclipse_ray.diffusion.network import timestep_scale
from eclipse_ray.diffusion.sampling import ENGINE_VERSION
from eclipse_ray.diffusion.training import ImageBuffer, centre_crops, image_buffer
from eclipse_ray.errors import ConfigError, InputError, InterruptedRunError, ResumeError
from eclipse_ray.log import say
from eclipse_ray.progress import ProgressLine
from eclipse_ray.results import TrainResult
from eclipse_ray.storage.store import Store

STATE_FILE = "state.pt"
# Settings that say how training is spread or watched; all others decide the weights.
NOT_IN_FINGERPRINT = {"output", "num_workers", "use_gpu", "report_every", "checkpoint_every"}


def train(config: Config) -> TrainResult:
    """Fit a denoiser on data.clean and write it to denoiser.output; the same command resumes or returns at once.

    Raises ConfigError or InputError for unusable input, ResumeError if the folder belongs to other settings.
    """
    clean, output = _locations(config)
    images = _sparse_set(config, clean)
    store = Store(output)
    refuse_process_local(output, store.in_this_process_only)
    fingerprint = _fingerprint(config, images.hashes)
    ledger.claim(store, fingerprint, to_yaml(config))
    log.set_run("train", fingerprint.value)
    if not store.exists(CARD_FILE):
        _run_training(config, store, images, fingerprint.value)
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


def deciding_settings(denoiser: DenoiserConfig) -> dict[str, Any]:
    """Return the settings that decide the weights."""
    settings = denoiser.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT)
    # Fingerprints of denoisers that were trained when there was another way to draw timesteps name this one.
    return {**settings, "timestep_sampler": "uniform"}


def _fingerprint(config: Config, hashes: list[str]) -> ledger.Fingerprint:
    tree = {
        "denoiser": deciding_settings(config.denoiser),
        "data": {"resize": config.data.resize},
        "run": {"seed": config.run.seed},
    }
    return ledger.Fingerprint(config=tree, weights="", input=digest(sorted(hashes)), engine_version=ENGINE_VERSION)


def _run_training(config: Config, store: Store, images: MixedSet, fingerprint: str) -> None:
    curves = open_curves(config.run.loggers, store.url, fingerprint)
    total, every = config.denoiser.iterations, config.run.progress_seconds
    with ProgressLine("train", "iterations", total, every, phase=reaching(config)) as line:
        resources = connect(config)
        workers, use_gpu = _workers(config, resources)
        require_cpus(resources, workers, f"training with denoiser.num_workers={workers}")
        require_gpus(resources, workers * use_gpu, f"denoiser.use_gpu with denoiser.num_workers={workers}")
        require_place(resources, 1, float(use_gpu), "a worker of the training")
        board = start_board()
        line.phase = f"starting {workers} worker{'s' * (workers > 1)}"
        trainer = ray.train.torch.TorchTrainer(
            _train_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                # One buffer, which every worker of a node reads in place.
                "pixels": ray.put(images.pixels),
                "sizes": images.sizes.tolist(),
                "hashes": images.hashes,
                "fingerprint": fingerprint,
                "threads": 0 if use_gpu else max(1, resources.cores // workers),
                "board": board,
            },
            scaling_config=ScalingConfig(
                # On a cluster, one worker is enough to go on with while a lost node is replaced.
                num_workers=workers if resources.local else (1, workers),
                use_gpu=use_gpu,
                resources_per_worker={"CPU": 1},
            ),
            run_config=RunConfig(
                name=fingerprint,
                storage_path=store.path("_eclipse/train") if store.local else f"{store.url}/_eclipse/train",
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                failure_config=FailureConfig(max_failures=3),
                callbacks=[TrainLogger(curves)] if config.run.loggers else [],
            ),
        )
        watch = Watch("training", "iteration", config.run.watchdog_seconds)
        with BoardWatcher(board, lambda entry: _show(line, entry), watch):
            result = on_a_thread(trainer.fit, watch)
    if result.error is not None:
        raise brought_home(result.error, watch.what)
    if result.checkpoint is None:
        raise InterruptedRunError("training stopped without a checkpoint; run the same command again to resume")
    _publish(result.checkpoint, store)


class TrainLogger(UserCallback):
    """Hands what the first worker reports to the curves, in the process that controls the training."""

    def __init__(self, curves: Curves) -> None:
        self.curves = curves

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Log one report; called by Ray Train when all workers have made it."""
        values = {key: value for key, value in metrics[0].items() if key != "iteration"}
        self.curves.log(values, int(metrics[0]["iteration"]))


def _workers(config: Config, resources: Resources) -> tuple[int, bool]:
    """Return how many workers train and whether each has a GPU; the batch is divided among them."""
    denoiser = config.denoiser
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
    images = _shared_images(settings)
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
        card = _card(config, state, len(images), settings["hashes"], settings["fingerprint"])
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
    )


def _shared_images(settings: dict[str, Any]) -> ImageBuffer:
    with warnings.catch_warnings():
        # The object store hands out read-only memory; torch warns of writes, and nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        pixels = torch.from_numpy(ray.get(settings["pixels"]))
    return image_buffer(pixels, torch.tensor(settings["sizes"], dtype=torch.int64))


def _restore(fit: training.Fit) -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        fit.restore(torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True))


def _card(config: Config, fit: training.Fit, images: int, hashes: list[str], fingerprint: str) -> Card:
    last = fit.history[-1] if fit.history else {"denoise_psnr": 0.0, "noisy_psnr": 0.0}
    denoiser = config.denoiser
    return Card(
        t_max=denoiser.t_max or denoiser.num_train_timesteps,
        t_star=denoiser.t_star,
        num_inference_steps=denoiser.num_inference_steps,
        sampler=denoiser.sampler,
        timestep_scale=timestep_scale(denoiser),
        iterations=fit.iteration,
        denoise_psnr=last["denoise_psnr"],
        noisy_psnr=last["noisy_psnr"],
        sparse_images=images,
        sparse_hashes=sorted(hashes),
        fingerprint=fingerprint,
        settings={**denoiser.model_dump(mode="json"), "seed": config.run.seed},
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
