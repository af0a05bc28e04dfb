"""One cell of a matrix on a worker: take what the driver made, train the victim, commit what it reached."""

from __future__ import annotations

import json
import time
from typing import Any

import ray
import torch
from ray import tune

from eclipse_ray.config import CompensationConfig, DefenseConfig, VictimConfig
from eclipse_ray.defenses import combine
from eclipse_ray.defenses.simple import privacy
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.errors import EclipseError
from eclipse_ray.storage.store import Store
from eclipse_ray.victims.training import train_victim


class Pantry:
    """An actor that holds references to the sets of one group of trials, and lets go of them together.

    Parameters handed to Tune stay in the object store until the driver ends.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.sets: dict[str, Any] = {}

    def fill(self, jobs: dict[str, dict[str, Any]], sets: dict[str, Any]) -> None:
        """Replace everything; `sets` are references by key."""
        self.jobs, self.sets = jobs, sets

    def take(self, cell: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a cell's job and references to what it needs."""
        job = self.jobs[cell]
        return job, {name: self.sets[key] for name, key in job["sets"].items()}


def run_trial(config: dict[str, Any], pantry: Any, board: Any) -> None:
    """Train the victim of one cell and commit what it reached."""
    key = config["cell"]
    job, refs = ray.get(pantry.take.remote(key))
    try:
        result = _train(key, job, {name: ray.get(ref) for name, ref in refs.items()}, board)
    except EclipseError as error:
        # Said rather than raised, because trying again would not help.
        tune.report({"error": str(error)})
        return
    Store(job["output"]).create(f"results/{key}.json", json.dumps(result, indent=1).encode())
    tune.report({"error": ""})


def _train(key: str, job: dict[str, Any], sets: dict[str, Any], board: Any) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    defense, settings = combine(job["defense"]), DefenseConfig.model_validate(job["settings"])
    victim, device = VictimConfig.model_validate(job["victim"]), default_device()

    def on_epoch(epoch: int, accuracy: float, _loss: float) -> None:
        last = epoch == victim.epochs
        board.post.remote({"cell": key, "epoch": epoch, "test_accuracy": accuracy, "last": last})

    test_images, test_labels = sets["test"]
    began = time.monotonic()
    run = train_victim(
        sets["images"],
        sets["labels"],
        test_images,
        test_labels,
        victim,
        CompensationConfig.model_validate(job["compensation"]),
        job["seed"],
        device,
        on_epoch,
        augmentations=[defense.augmentation(settings)] if defense.augmentation else [],
        privacy=privacy(settings) if defense.privacy else None,
        extra=sets.get("extra"),
    )
    return {
        "title": job["title"],
        "test_accuracy": run.test_accuracy,
        "train_loss": run.train_loss,
        "seconds": time.monotonic() - began,
        "device": device_name(device),
        "threads": job["threads"],
        "images": len(sets["labels"]),
        "victim": job["victim"],
        "compensation": job["compensation"],
        "seed": job["seed"],
    }


def device_name(device: torch.device) -> str:
    """Return what a result was computed on, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
