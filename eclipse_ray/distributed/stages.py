"""What happens to a shard between plan and commit. One row of an Arrow table is one shard.

Columns carry only strings, numbers and contiguous buffers, never Python objects (Ray would pickle them):
`shard` and `failures` are JSON, `table` is an Arrow stream of ids, labels and extra columns, `pixels` one uint8
buffer of all images in order, `shapes` their (height, width) as int32 pairs. No torch here: CPU workers start in a
second or two without it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eclipse_ray import ledger
from eclipse_ray.config import BATCH_PIXELS, CompensationConfig, DataConfig, Precision, Sampler
from eclipse_ray.data.formats import read_parts
from eclipse_ray.data.images import ImageError, content_hash, decode_stored, encode_image, resize_image
from eclipse_ray.data.store import Store
from eclipse_ray.data.table import canonical_table, table_to_parquet
from eclipse_ray.errors import InputError

Pixels = NDArray[np.uint8]

# Where the image's own file name waits while its pixels travel.
PATH_COLUMN = ".image_path"


@dataclass(frozen=True)
class Job:
    """What every worker must know; small, so that it travels with each task."""

    source: str
    format: str
    classes: tuple[str, ...] | None
    data: DataConfig
    output: str
    denoiser: str
    t_star: int
    num_inference_steps: int
    sampler: Sampler
    batch_size: int
    batch_pixels: int
    precision: Precision
    tile: int
    tile_overlap: int
    seed: int
    compensation: CompensationConfig
    sparse_hashes: frozenset[str]


def shard_rows(shards: Sequence[ledger.Shard]) -> list[pa.Table]:
    """Return one table of one row for each shard, so that Ray gives every shard a task of its own."""
    return [pa.table({"shard": [json.dumps(asdict(shard))]}) for shard in shards]


def read_and_decode(batch: pa.Table, job: Job) -> pa.Table:
    """Read a shard's rows and decode them; undecodable images become failures.

    What makes the whole source unusable (a vanished object, an image of the sparse set) travels on as `fatal`:
    an exception would reach the driver as text only.
    """
    try:
        return _read_and_decode(batch, job)
    except InputError as error:
        columns = {"shard": batch["shard"].to_pylist(), "input_sha256": [""], "seconds": [0.0]}
        return pack(columns, pa.table({"id": pa.array([], pa.string())}), [], [], fatal=str(error))


def _read_and_decode(batch: pa.Table, job: Job) -> pa.Table:
    started = time.monotonic()
    shard = shard_of(batch)
    spans = [(span.key, span.start, span.stop) for span in shard.spans]
    table = read_parts(job.source, job.format, job.classes, spans, job.data)
    state = hashlib.sha256()
    pixels: list[Pixels] = []
    kept: list[int] = []
    failures: list[dict[str, str]] = []
    for index, (name, image) in enumerate(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True)):
        data = (image or {}).get("bytes") or b""
        state.update(len(data).to_bytes(8, "little") + data)
        try:
            image_pixels = decode_stored(data, job.data)
        except ImageError as error:
            if job.data.on_error == "stop":
                raise InputError(
                    f"{job.source}: image {name}: {error}; mend it, leave it out, or set data.on_error=row"
                ) from error
            failures.append({"id": name, "key": _key_of(shard, index), "error": str(error)})
            continue
        # Before it is resized: hashes are of images as they are stored, whatever size either run works at.
        _refuse_leakage(job, name, image_pixels)
        pixels.append(resize_image(image_pixels, job.data.resize))
        kept.append(index)
    columns = {
        "shard": batch["shard"].to_pylist(),
        "input_sha256": [state.hexdigest()],
        "seconds": [time.monotonic() - started],
    }
    paths = pc.struct_field(table["image"], "path")
    table = table.drop_columns(["image"]).append_column(PATH_COLUMN, paths)
    return pack(columns, table.take(kept), pixels, failures)


def shard_of(batch: pa.Table) -> ledger.Shard:
    """Return the shard of a one-row batch."""
    tree = json.loads(batch["shard"][0].as_py())
    return ledger.Shard(tree["name"], tuple(ledger.Span(**span) for span in tree["spans"]))


def _key_of(shard: ledger.Shard, index: int) -> str:
    for span in shard.spans:
        if index < span.stop - span.start:
            return span.key
        index -= span.stop - span.start
    raise IndexError(f"shard {shard.name} has fewer rows than were read")


def _refuse_leakage(job: Job, name: str, image: Pixels) -> None:
    if job.sparse_hashes and content_hash(image) in job.sparse_hashes:
        raise InputError(
            f"{job.source}: image {name} is in the sparse clean set that the "
            f"denoiser {job.denoiser} was trained on; purify images that are disjoint from it"
        )


def same_size_batches(
    images: Sequence[Pixels], batch_size: int, batch_pixels: int = BATCH_PIXELS
) -> list[list[int]]:
    """Return index lists of images of equal shape, in order within each shape.

    A list holds at most `batch_size` images and `batch_pixels` pixels, but always one image.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(index)
    batches: list[list[int]] = []
    for (height, width, _), indices in by_shape.items():
        size = max(1, min(batch_size, batch_pixels // (height * width)))
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches


def encode_and_commit(batch: pa.Table, job: Job) -> pa.Table:
    """Encode a purified shard and commit it; return one row {shard, ok, failed, fatal} of what now stands."""
    started = time.monotonic()
    shard = shard_of(batch)
    fatal = batch["fatal"][0].as_py()
    if fatal:
        return pa.table({"shard": [shard.name], "ok": [0], "failed": [0], "fatal": [fatal]})
    table, images, failures = unpack(batch)
    ids = table["id"].to_pylist()
    data: bytes | None = None
    if ids:
        encoded = [encode_image(image, job.data.encoding) for image in images]
        labels = table["label"].to_pylist() if "label" in table.column_names else None
        paths = [_renamed(path, job.data.encoding) for path in table[PATH_COLUMN].to_pylist()]
        extras = table.drop_columns([name for name in ("id", "label", PATH_COLUMN) if name in table.column_names])
        data = table_to_parquet(canonical_table(ids, encoded, labels, extras, job.classes, paths))
    status = ledger.commit_shard(
        Store(job.output),
        shard,
        ok=data,
        ok_count=len(ids),
        errors=[ledger.ImageFailure(**failure) for failure in failures],
        input_sha256=batch["input_sha256"][0].as_py(),
        seconds=batch["seconds"][0].as_py() + time.monotonic() - started,
    )
    return pa.table({"shard": [status.shard], "ok": [status.ok], "failed": [status.failed], "fatal": [""]})


def _renamed(path: str | None, encoding: str) -> str | None:
    # The bytes are in another format now, and some readers go by the name's ending.
    if path is None:
        return None
    return str(PurePosixPath(path).with_suffix("." + encoding.partition("-")[0].partition(":")[0]))


def pack(
    columns: dict[str, list[Any]],
    table: pa.Table,
    images: Sequence[Pixels],
    failures: list[dict[str, str]],
    fatal: str = "",
) -> pa.Table:
    """Return a shard between two stages as one row; `table` holds everything but the images."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    shapes = np.array([image.shape[:2] for image in images], dtype=np.int32).tobytes()
    pixels = np.concatenate([image.reshape(-1) for image in images]) if images else np.empty(0, np.uint8)
    packed = {
        "table": _binary(sink.getvalue()),
        "pixels": _binary(pa.py_buffer(pixels)),
        "shapes": _binary(pa.py_buffer(shapes)),
        "failures": pa.array([json.dumps(failures)]),
        "fatal": pa.array([fatal]),
    }
    return pa.table({**{name: pa.array(values) for name, values in columns.items()}, **packed})


def _binary(buffer: pa.Buffer) -> pa.Array:
    # One value over the buffer as it is: no copy, and 64-bit offsets for shards of large images.
    offsets = pa.py_buffer(np.array([0, buffer.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])


def unpack(batch: pa.Table) -> tuple[pa.Table, list[Pixels], list[dict[str, str]]]:
    """Return (table, images as views of the row's buffer, failures) of one packed row."""
    table = pa.ipc.open_stream(batch["table"][0].as_buffer()).read_all()
    shapes = np.frombuffer(batch["shapes"][0].as_buffer(), dtype=np.int32).reshape(-1, 2)
    flat = np.frombuffer(batch["pixels"][0].as_buffer(), dtype=np.uint8)
    ends = np.cumsum(shapes.astype(np.int64).prod(axis=1) * 3)
    images = [
        flat[end - height * width * 3 : end].reshape(height, width, 3)
        for (height, width), end in zip(shapes.tolist(), ends.tolist(), strict=True)
    ]
    return table, images, json.loads(batch["failures"][0].as_py())
