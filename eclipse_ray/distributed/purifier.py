"""The actor of the denoising pool; apart from the other stages, which need no torch."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import torch

from eclipse_ray import compensation
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.model import default_device
from eclipse_ray.diffusion.sampler import purify_images
from eclipse_ray.distributed.fetch import local_denoiser
from eclipse_ray.distributed.stages import Job, Pixels, pack, same_size_batches, unpack
from eclipse_ray.errors import InputError


class Purifier:
    """The actor of the pool: holds a denoiser on its device and purifies shard after shard."""

    def __init__(self, job: Job) -> None:
        # One thread each, whatever the number of actors: threads change how sums are split, hence bytes.
        torch.set_num_threads(1)
        self.job = job
        self.denoiser = load_denoiser(local_denoiser(job.denoiser), default_device())
        self.denoiser.precision = job.precision

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the shard with its images purified; those that are too small fail."""
        if batch["fatal"][0].as_py():
            return batch
        started = time.monotonic()
        job = self.job
        table, images, failures = unpack(batch)
        ids: list[str] = table["id"].to_pylist()
        done: dict[int, Pixels] = {}
        for indices in same_size_batches(images, job.batch_size, job.batch_pixels):
            names = [ids[index] for index in indices]
            stack = np.stack([images[index] for index in indices])
            try:
                done.update(zip(indices, self._purify(stack, names), strict=True))
            except InputError as error:
                failures += [{"id": name, "key": "", "error": str(error)} for name in names]
        kept = sorted(done)
        columns = {
            "shard": batch["shard"].to_pylist(),
            "input_sha256": batch["input_sha256"].to_pylist(),
            "seconds": [batch["seconds"][0].as_py() + time.monotonic() - started],
        }
        return pack(columns, table.take(kept), [done[index] for index in kept], failures)

    def _purify(self, images: Pixels, ids: list[str]) -> Pixels:
        job = self.job
        purified = purify_images(
            images,
            self.denoiser,
            t_star=job.t_star,
            num_inference_steps=job.num_inference_steps,
            sampler=job.sampler,
            seed=job.seed,
            ids=ids,
            tile=job.tile,
            tile_overlap=job.tile_overlap,
            batch_pixels=job.batch_pixels,
        )
        if job.compensation.mode == "baked":
            purified = compensation.bake(purified, ids, job.compensation, job.seed)
        return purified.numpy()
