"""What a worker does for a poison: fit it with its state kept in the output, and poison one chunk of images.

No Ray here, so an interrupted fit is tested without it.

    DST/_eclipse/poison/fit.safetensors      the last saved state of a fit that is not finished
    DST/_eclipse/poison/state.safetensors    the finished fit
    DST/_eclipse/poison/chunk-00000.parquet  poisoned chunks, until the dataset is written from them
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, PoisonConfig
from eclipse_ray.data.dataset import decode_resized, load_images
from eclipse_ray.data.formats import read_parts
from eclipse_ray.data.images import encode_image
from eclipse_ray.data.store import Store
from eclipse_ray.data.table import Span, canonical_table, extra_columns, image_bytes, table_to_parquet
from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.model import default_device
from eclipse_ray.distributed.fetch import local_denoiser
from eclipse_ray.distributed.shards import same_size_batches
from eclipse_ray.errors import InputError
from eclipse_ray.poisons import (
    OPTIMISED,
    LabelledImages,
    Session,
    State,
    budget,
    fit_poison,
    poison_fitted,
    poison_images,
)

FIT_KEY, STATE_KEY = "_eclipse/poison/fit.safetensors", "_eclipse/poison/state.safetensors"
NORM_KEY = b"poison_norm"
PERTURBATION = "perturbation"
"""Extra column: the stored image minus the clean one, raw int16 in C order (H, W, 3), little-endian."""

Report = Callable[[int, int, str], None]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PoisonJob:
    """What every worker must know.

    `listing` is the source as it was named, a pattern maybe, and `source` the folder that keys are relative to;
    `poison` is resolved; `num_classes` counts labels, `classes` names them.
    """

    listing: str
    source: str
    format: str
    classes: list[str] | None
    num_classes: int
    data: DataConfig
    output: str
    poison: PoisonConfig
    seed: int

    @property
    def optimised(self) -> bool:
        """Whether the poison is fitted first, and its chunks are kept until all are there."""
        return self.poison.name in OPTIMISED


def chunk_key(number: int) -> str:
    """Return where a poisoned chunk is kept."""
    return f"_eclipse/poison/chunk-{number:05d}.parquet"


def fit_stored(job: PoisonJob, report: Report, device: torch.device | None = None) -> Arrays:
    """Return the state of an optimised poison as NumPy arrays: the finished one, else fitted and stored here.

    An interrupted fit goes on from what it saved last. Raises InputError for images of two sizes.
    """
    store = Store(job.output)
    if store.exists(STATE_KEY):
        return as_arrays(safetensors.torch.load(store.read(STATE_KEY)))
    loaded = load_images(job.listing, job.data, require_labels=True)
    data = LabelledImages(
        torch.from_numpy(loaded.images), torch.from_numpy(loaded.labels), loaded.ids, job.num_classes
    )
    session = stored_session(store, job.poison, device or default_device(), report)
    state = fit_poison(data, job.poison, job.seed, session)
    store.write(STATE_KEY, safetensors.torch.save(state))
    store.delete(FIT_KEY)
    return as_arrays(state)


def stored_session(store: Store, poison: PoisonConfig, device: torch.device, report: Report) -> Session:
    """Return a session that keeps its state in `store`, at most once in `save_seconds`; loads adp's denoiser."""
    denoiser = load_denoiser(local_denoiser(poison.denoiser), device) if poison.denoiser else None
    last = [time.monotonic()]

    def load() -> State | None:
        return safetensors.torch.load(store.read(FIT_KEY)) if store.exists(FIT_KEY) else None

    def save(state: State) -> None:
        # Any saved state leads to the same result, so one that is skipped costs time only.
        if time.monotonic() - last[0] >= poison.save_seconds:
            store.write(FIT_KEY, safetensors.torch.save(state))
            last[0] = time.monotonic()

    return Session(device, report, load, save, denoiser)


def as_arrays(state: State) -> Arrays:
    """Return a state in the form that Ray's workers share without copies."""
    return {key: value.numpy() for key, value in state.items()}


def poison_chunk(job: PoisonJob, number: int, spans: Sequence[Span], state: Arrays | None) -> pa.Table:
    """Return one chunk of the source poisoned; its schema says how far it moved, see `largest_norm`.

    Chunks of an optimised poison are stored too, and one that is stored already is not computed again.
    """
    store = Store(job.output)
    if job.optimised and store.exists(chunk_key(number)):
        return pq.read_table(pa.BufferReader(store.read(chunk_key(number))))
    table = read_parts(job.source, job.format, job.classes, spans, job.data)
    poisoned = _poisoned(job, table, state)
    if job.optimised:
        store.write(chunk_key(number), table_to_parquet(poisoned))
    return poisoned


def largest_norm(table: pa.Table) -> dict[str, Any]:
    """Return {"norm", "eps_255", "largest_norm_255"} of a chunk: its bound, and the most that storage moved."""
    found: dict[str, Any] = json.loads(table.schema.metadata[NORM_KEY])
    return found


def _poisoned(job: PoisonJob, table: pa.Table, state: Arrays | None) -> pa.Table:
    ids: list[str] = table["id"].to_pylist()
    labels = torch.from_numpy(table["label"].to_numpy().copy())
    decoded = [
        decode_resized(job.source, name, data, job.data)
        for name, data in zip(ids, image_bytes(table), strict=True)
    ]
    images: list[NDArray[np.uint8]] = list(decoded)
    for indices in same_size_batches(decoded, len(decoded)):
        pixels = torch.from_numpy(np.stack([decoded[index] for index in indices]))
        chosen = LabelledImages(pixels, labels[indices], [ids[index] for index in indices], job.num_classes)
        for index, image in zip(indices, _changed(job, chosen, state).numpy(), strict=True):
            images[index] = image
    extras = _with_perturbations(job, extra_columns(table), decoded, images)
    encoded = [encode_image(image, "png") for image in images]
    result = canonical_table(ids, encoded, table["label"], extras, job.classes)
    norm = json.dumps(_norm(job.poison, decoded, images)).encode()
    return result.replace_schema_metadata({**result.schema.metadata, NORM_KEY: norm})


def _changed(job: PoisonJob, data: LabelledImages, state: Arrays | None) -> torch.Tensor:
    if state is None:
        return poison_images(data.images, data.labels, data.ids, job.poison, job.seed, job.num_classes)
    # Ray's shared memory cannot be written to, of which torch would warn.
    tensors = {key: torch.from_numpy(value.copy()) for key, value in state.items()}
    return poison_fitted(data, tensors, job.poison, job.seed, default_device())


def _with_perturbations(
    job: PoisonJob, extras: pa.Table, clean: Sequence[NDArray[np.uint8]], images: Sequence[NDArray[np.uint8]]
) -> pa.Table:
    if not job.poison.store_perturbation:
        return extras
    if PERTURBATION in extras.column_names:
        raise InputError(
            f"{job.source}: has a column {PERTURBATION!r} already; leave it out with --set data.extra_columns=drop"
        )
    raw = [_difference(before, after).astype("<i2").tobytes() for before, after in zip(clean, images, strict=True)]
    column = pa.array(raw, pa.binary())
    return extras.append_column(PERTURBATION, column) if extras.num_columns else pa.table({PERTURBATION: column})


def _norm(
    poison: PoisonConfig, clean: Sequence[NDArray[np.uint8]], images: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    bounds = [budget(poison, image.shape) for image in clean]
    norm, bound = max(bounds, key=lambda each: each[1])
    order = 2 if norm == "l2" else np.inf
    moved = [
        np.linalg.norm(_difference(before, after).ravel().astype(np.float64), order)
        for before, after in zip(clean, images, strict=True)
    ]
    return {
        "norm": norm,
        "eps_255": None if norm == "none" else round(bound * 255, 4),
        "largest_norm_255": round(float(max(moved)), 4),
    }


def _difference(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.int16]:
    return after.astype(np.int16) - before.astype(np.int16)
