"""What a worker does for an audit: crops of a random part of the rows, and what a denoiser makes of them.

No Ray here. A crop is the middle of an image; whether a row is in the sample depends on (seed, id) alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from eclipse_ray.config import DataConfig, PurifyConfig
from eclipse_ray.data.formats import read_parts
from eclipse_ray.data.images import ImageError, centre_crop, decode_stored, resize_image
from eclipse_ray.data.table import image_bytes
from eclipse_ray.detection.features import GRID
from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.diffusion.tiling import MIN_SIDE
from eclipse_ray.distributed.fetch import open_denoiser
from eclipse_ray.distributed.purifier import purify_batch
from eclipse_ray.distributed.shards import Pixels, fatal_note, pack, same_size_batches, unpack
from eclipse_ray.errors import EclipseError

# Timestep of the draws that choose the sample, far from those of any poison.
AUDIT_T = 2**30 + 32 * 2**16


@dataclass(frozen=True)
class AuditJob:
    """What every worker must know; `keep` is the part of the rows that is looked at, 0-1."""

    source: str
    format: str
    classes: tuple[str, ...] | None
    data: DataConfig
    purify: PurifyConfig
    denoiser: str | None
    crop: int
    keep: float
    seed: int


def read_crops(batch: pa.Table, job: AuditJob) -> pa.Table:
    """Return crops of the chosen rows of one chunk: id, label (-1: none) and draw, packed as one row."""
    try:
        return _read_crops([tuple(span) for span in json.loads(batch["spans"][0].as_py())], job)
    except EclipseError as error:
        return pack({"read": [0]}, _rows([], [], []), [], [], fatal_note(error))


def _read_crops(spans: Sequence[tuple[str, int, int]], job: AuditJob) -> pa.Table:
    table = read_parts(job.source, job.format, job.classes, spans, job.data)
    ids: list[str] = table["id"].to_pylist()
    draws = uniform(job.seed, ids, AUDIT_T, (1,))[:, 0].tolist()
    known = "label" in table.column_names
    labels: list[int] = table["label"].fill_null(-1).to_pylist() if known else [-1] * len(ids)
    encoded = image_bytes(table)
    kept: list[int] = []
    crops: list[Pixels] = []
    failures: list[dict[str, str]] = []
    for row, draw in enumerate(draws):
        if draw >= job.keep:
            continue
        crop = _crop(encoded[row], job)
        if isinstance(crop, str):
            failures.append({"id": ids[row], "error": crop})
        else:
            kept.append(row)
            crops.append(crop)
    rows = _rows([ids[row] for row in kept], [labels[row] for row in kept], [draws[row] for row in kept])
    return pack({"read": [len(ids)]}, rows, crops, failures)


def _crop(encoded: bytes, job: AuditJob) -> Pixels | str:
    """Return the middle of an image, square, its side a multiple of GRID; or why it cannot be looked at."""
    try:
        image = resize_image(decode_stored(encoded, job.data), job.data.resize)
    except ImageError as error:
        return str(error)
    side = min(job.crop, *image.shape[:2]) // GRID * GRID
    if side < MIN_SIDE:
        return f"{image.shape[1]}x{image.shape[0]} pixels are too few to look at, {MIN_SIDE} a side are needed"
    return np.ascontiguousarray(centre_crop(image, side))


def _rows(ids: Sequence[str], labels: Sequence[int], draws: Sequence[float]) -> pa.Table:
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "label": pa.array(labels, pa.int64()),
            "draw": pa.array(draws, pa.float64()),
        }
    )


class Denoised:
    """The actor of an audit with a denoiser: adds to each crop what remains of it."""

    def __init__(self, job: AuditJob) -> None:
        torch.set_num_threads(1)
        assert job.denoiser is not None
        self.job = job
        self.denoiser = open_denoiser(job.denoiser, job.purify.precision)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the row with each crop followed, in a second half of the images, by its denoised form."""
        if batch["fatal"][0].as_py():
            return batch
        table, crops, failures = unpack(batch)
        ids: list[str] = table["id"].to_pylist()
        denoised: list[Pixels] = list(crops)
        settings = self.job.purify
        try:
            for places in same_size_batches(crops, settings.batch_size, settings.batch_pixels):
                images = np.stack([crops[place] for place in places])
                done = self._symmetric(images, [ids[place] for place in places])
                for place, image in zip(places, done, strict=True):
                    denoised[place] = image
        except EclipseError as error:
            return pack({"read": [0]}, _rows([], [], []), [], [], fatal_note(error))
        return pack({"read": batch["read"].to_pylist()}, table, [*crops, *denoised], failures)

    def _symmetric(self, images: Pixels, ids: Sequence[str]) -> Pixels:
        # The mean over both sides of the mirror, under the same noise, turns with the image: no network does by
        # itself, and the audit's null is about the mirror.
        straight = purify_batch(self.denoiser, images, ids, self.job.purify, self.job.seed)
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        turned = purify_batch(self.denoiser, mirrored, ids, self.job.purify, self.job.seed).flip(2)
        return ((straight.int() + turned.int() + 1) // 2).to(torch.uint8).numpy()
