"""What several tests share: a small world of datasets and a denoiser, and the command line run in a process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eclipse_ray import cli, verbs
from eclipse_ray.config import CompensationConfig, DataConfig, DenoiserConfig, PurifyConfig, load_config
from eclipse_ray.datasets.formats import Source
from eclipse_ray.datasets.images import decode_image
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.synthetic import write_synthetic
from eclipse_ray.diffusion.checkpoint import Card, save_denoiser
from eclipse_ray.diffusion.network import Denoiser, build_denoiser, build_unet
from eclipse_ray.diffusion.training import run_fit, start_fit
from eclipse_ray.ledger import read_statuses
from eclipse_ray.purification.stages import Job
from eclipse_ray.results import MatrixPlan, MatrixResult, SweepPlan, SweepResult
from eclipse_ray.storage.store import Store

DEBUG = {"denoiser.preset": "debug"}
# The same size of a network of diffusers.
UNET = {"network": "unet2d", "block_out_channels": [8, 8], "norm_num_groups": 4}


@dataclass(frozen=True)
class World:
    """Folders of 16 px datasets and of a debug denoiser trained on `clean`."""

    root: Path
    clean: str
    rest: str
    poisoned: str
    test: str
    denoiser: str


@dataclass(frozen=True)
class OneRun:
    """A grid or a sweep that was run once: its settings, what was planned, and what came out."""

    settings: dict[str, object]
    plan: MatrixPlan | SweepPlan
    result: MatrixResult | SweepResult
    output: Path


def board_of(tell: Callable[[dict[str, object]], object]) -> SimpleNamespace:
    """Return a board of progress in this process, every entry of which is told to a function."""
    return SimpleNamespace(post=SimpleNamespace(remote=tell))


def make_world(root: Path) -> World:
    """Build the world: 240 images to purify, 20 sparse ones, 60 test images, and a denoiser."""
    write_synthetic(str(root / "source"), 260, 16, 0)
    write_synthetic(str(root / "test"), 60, 16, 1)
    verbs.split(str(root / "source"), clean=20, out=str(root / "split"), settings=DEBUG)
    verbs.poison("ar", str(root / "split/rest"), str(root / "poisoned"), settings=DEBUG)
    world = World(
        root,
        clean=str(root / "split/clean"),
        rest=str(root / "split/rest"),
        poisoned=str(root / "poisoned"),
        test=str(root / "test"),
        denoiser=str(root / "denoiser"),
    )
    train_denoiser(world.clean, world.denoiser)
    return world


def dotted(settings: dict[str, object]) -> dict[str, object]:
    """Return settings that were given as keywords, such as purify__t_star, under their own names."""
    return {key.replace("__", "."): value for key, value in settings.items()}


def change_json(file: Path, **values: object) -> None:
    """Set some keys of a JSON object in a file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def kept_by_experiment(output: Path) -> dict[str, int]:
    """Return when each result and each set of an experiment was written, in ns."""
    files = [*output.glob("results/*.json"), *output.glob("cache/*/*.json"), *output.glob("cache/defended/*.npy")]
    return {str(file.relative_to(output)): file.stat().st_mtime_ns for file in files}


def train_denoiser(clean: str, output: str, **settings: object) -> None:
    """Fit a debug denoiser in this process, without Ray."""
    config, images = debug_config(**settings), load_images(clean, DataConfig())
    pixels = torch.from_numpy(images.images)
    fit = start_fit(config, 0, torch.device("cpu"))
    run_fit(fit, pixels[4:], pixels[:4], 0, lambda _: None, lambda _: None)
    last = fit.history[-1]
    card = Card(
        t_max=config.t_max or 0,
        t_star=config.t_star,
        num_inference_steps=config.num_inference_steps,
        iterations=fit.iteration,
        denoise_psnr=last["denoise_psnr"],
        noisy_psnr=last["noisy_psnr"],
        sparse_images=len(images.ids),
        sparse_hashes=sorted(images.hashes()),
        fingerprint="test",
        settings={},
    )
    save_denoiser(output, fit.averaged(), card)


def read_output(folder: str | Path) -> pa.Table:
    """Return all purified rows of an output folder, sorted by id."""
    files = sorted(Path(folder, "data").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).sort_by("id")


def pixels_of(table: pa.Table) -> np.ndarray:
    """Return the decoded images of a table, uint8 (N, H, W, 3)."""
    return np.stack([decode_image(image["bytes"], 10**6) for image in table["image"].to_pylist()])


def run_cli(*arguments: str, check: int = 0) -> dict[str, object]:
    """Run `eclipse-ray ... --json` in a process of its own; return the object it prints. Ray must say nothing."""
    command = [sys.executable, "-m", "eclipse_ray", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == check, done.stderr
    noise = re.findall(r".*(?:\.cc:\d+|streaming_executor| INFO | WARNING ).*", done.stderr)
    assert not noise, f"of no use to a user: {noise}"
    lines = done.stdout.splitlines()
    assert len(lines) == 1, f"standard output must hold one JSON object, found: {done.stdout!r}"
    return json.loads(lines[0])


def call(monkeypatch, capfd, *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["eclipse-ray", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), *capfd.readouterr()


def debug_config(**settings: object) -> DenoiserConfig:
    """Return the debug preset with some settings of the denoiser changed."""
    return load_config(None, {**DEBUG, **{f"denoiser.{key}": value for key, value in settings.items()}}).denoiser


def job_of(source: Source, **own: object) -> Job:
    """Return a job of a worker that resumes nothing and knows no sparse set."""
    usual = {"output": f"{source.url}-out", "denoiser": "", "purify": PurifyConfig(), "seed": 0}
    usual |= {"compensation": CompensationConfig(), "sparse_hashes": frozenset()}
    return Job(source=replace(source, parts=(), classes=None), **{**usual, **own})


def untrained_denoiser(**settings: object) -> Denoiser:
    """Return a debug denoiser with drawn weights: what it does to an image is arbitrary, and repeatable."""
    config = debug_config(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_unet(config)
        with torch.no_grad():
            # Layers that begin as zeros would leave nothing to see.
            for parameter in network.parameters():
                if not bool(parameter.any()):
                    parameter.normal_(std=0.1)
    return build_denoiser(network, config).eval()


def assignments(settings: dict[str, object]) -> list[str]:
    """Return settings as words of the command line."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def object_names(output: str | Path) -> dict[str, str | None]:
    """Return the name of each shard's object, which tells its bytes by their hash."""
    return {shard: status.object for shard, status in read_statuses(Store(str(output))).items()}


def shards_done(output: Path) -> int:
    """Return how many statuses of shards a purification has written."""
    return sum(1 for _ in output.glob("_eclipse/status/*/*.json"))


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = 300, process: subprocess.Popen | None = None
) -> None:
    """Return once a condition holds; fail if that takes too long, or if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"{what}: the process ended before"
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def kill_and_go_on(arguments: list[str], output: Path, least: int, cells: int) -> dict[str, object]:
    """Kill an experiment of `cells` once `least` have a result, run it again; return the object it prints."""
    results, log = output / "results", output.parent / "log"
    kill_when(arguments, lambda: results.exists() and len(list(results.glob("*.json"))) >= least, log)
    # The victim in training at the kill may still have been committed by its own process.
    time.sleep(3)
    before = kept_by_experiment(output)
    kept = len([name for name in before if name.startswith("results/")])
    assert least <= kept < cells
    assert run_cli(*arguments, "--dry-run")["done"] == kept
    result = run_cli(*arguments)
    assert kept_by_experiment(output).items() >= before.items()
    assert json.loads(next(results.iterdir()).read_text())["test_accuracy"]
    return result


def kill_when(arguments: list[str], ready: Callable[[], bool], log: Path, seconds: float = 200) -> None:
    """Start `eclipse-ray ...`, SIGKILL it once `ready`; fail if it ended before or was never ready."""
    command = [sys.executable, "-m", "eclipse_ray", *arguments]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, (
            f"ended with {process.returncode} before the kill:\n{log.read_text()[-2000:]}"
        )
        assert time.monotonic() < deadline, f"not ready after {seconds} s:\n{log.read_text()[-2000:]}"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL, "the process ended by itself: no fault fired"
