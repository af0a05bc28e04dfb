"""The actor of the denoising pool; apart from the other stages, which need no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from eclipse_ray import compensation, ledger
from eclipse_ray.cluster import metrics
from eclipse_ray.cluster.fetch import open_denoiser
from eclipse_ray.config import PurifyConfig
from eclipse_ray.diffusion.network import Denoiser
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.purification.shard import (
    BUSY_COLUMN,
    Job,
    Pixels,
    Task,
    fatal_note,
    pack,
    same_size_batches,
    take_rows,
    task_of,
    unpack,
)

# Purified pixels (H, W, 3), or why there are none.
Outcome = Pixels | str


def purify_batch(
    denoiser: Denoiser, images: Pixels, ids: Sequence[str], settings: PurifyConfig, seed: int
) -> torch.Tensor:
    """Return uint8 images (B, H, W, 3) of one size purified as `settings` say."""
    return purify_images(
        images,
        denoiser,
        t_star=settings.t_star,
        num_inference_steps=settings.num_inference_steps,
        sampler=settings.sampler,
        seed=seed,
        ids=ids,
        tile=settings.tile,
        tile_overlap=settings.tile_overlap,
        batch_pixels=settings.batch_pixels,
    )


class Purifier:
    """The actor of the pool: holds a denoiser on its device and purifies shard after shard."""

    def __init__(self, job: Job) -> None:
        # One thread each, whatever the number of actors: threads change how sums are split, hence bytes.
        torch.set_num_threads(1)
        self.job = job
        self.note = ""
        self.idle_since = time.monotonic()
        self.denoiser = open_denoiser(job.denoiser, job.purify.precision)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the shard with its images purified; those that are too small or kill the actor fail."""
        if batch["fatal"][0].as_py():
            return batch
        started = time.monotonic()
        waited = started - self.idle_since
        table, images, failures = unpack(batch)
        ids: list[str] = table["id"].to_pylist()
        outcomes: dict[int, Outcome] = {}
        fatal, self.note = "", ""
        try:
            outcomes = self._outcomes(task_of(batch), images, ids)
        except StorageError as error:
            fatal = fatal_note(error)
        kept = [place for place in sorted(outcomes) if not isinstance(outcomes[place], str)]
        failures += [
            {"id": ids[place], "key": "", "error": outcome}
            for place, outcome in sorted(outcomes.items())
            if isinstance(outcome, str)
        ]
        columns = {name: batch[name].to_pylist() for name in ("task", "input_sha256", "order")}
        took = time.monotonic() - started
        columns["seconds"] = [batch["seconds"][0].as_py() + took]
        self.idle_since = started + took
        metrics.observe({"denoise_seconds": took, "input_wait_seconds": waited}, self.job.run)
        columns[BUSY_COLUMN] = [took]
        done = [outcome for place in kept if not isinstance(outcome := outcomes[place], str)]
        return pack(columns, take_rows(table, kept), done, failures, fatal, self.note)

    def _outcomes(self, task: Task, images: Sequence[Pixels], ids: Sequence[str]) -> dict[int, Outcome]:
        """Return what became of every image; those that kill this actor are found by its earlier lives."""
        store, shard, settings = self.job.store(), task.shard.name, self.job.purify
        stage = self.job.stage("purify")

        def alone(place: int) -> object:
            return self._batch([place], images, ids)

        attempt = ledger.begin(store, shard, task.generation, stage)
        blamed, care = ledger.try_alone(store, shard, task.generation, stage, attempt, len(images), alone)
        if care is ledger.Care.GIVE_UP:
            return dict.fromkeys(
                range(len(images)), "purifying its shard kills the worker, though no image does so alone"
            )
        outcomes: dict[int, Outcome] = dict.fromkeys(
            blamed, "purifying this image kills the worker, also when tried alone"
        )
        size = settings.batch_size if care is ledger.Care.USUAL else 1
        for places in same_size_batches(images, size, settings.batch_pixels):
            outcomes |= self._batch([place for place in places if place not in blamed], images, ids)
        return outcomes

    def _batch(self, places: Sequence[int], images: Sequence[Pixels], ids: Sequence[str]) -> dict[int, Outcome]:
        """Purify some images of one size at once, or in halves where there is too little memory for that."""
        if not places:
            return {}
        try:
            done = self._purify(np.stack([images[place] for place in places]), [ids[place] for place in places])
            return dict(zip(places, done, strict=True))
        except InputError as error:
            return dict.fromkeys(places, str(error))
        except (MemoryError, RuntimeError) as error:
            # On a CPU torch has no class of its own for this.
            if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)):
                raise
        if len(places) == 1:
            return dict.fromkeys(places, "too little memory for this image alone; lower purify.tile")
        middle = len(places) // 2
        self.note = self.note or f"too little memory for batches of {len(places)} images; lower purify.batch_size"
        return self._batch(places[:middle], images, ids) | self._batch(places[middle:], images, ids)

    def _purify(self, images: Pixels, ids: Sequence[str]) -> Pixels:
        job = self.job
        purified = purify_batch(self.denoiser, images, ids, job.purify, job.seed)
        if job.compensation.mode == "baked":
            purified = compensation.bake(purified, ids, job.compensation, job.seed)
        return purified.numpy()
