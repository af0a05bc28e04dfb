"""A shard on its way between stages. One row of an Arrow table is one shard.

Columns carry only strings, numbers and contiguous buffers, never Python objects (Ray would pickle them):
`task` and `failures` are JSON, `table` is an Arrow stream of ids, labels and extra columns, `pixels` one uint8
buffer of all images in order, `shapes` their (height, width) as int32 pairs. There is no torch here, so that CPU
workers start in a second or two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray import ledger
from eclipse_ray.config import BATCH_PIXELS, CompensationConfig, DataConfig, PurifyConfig
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

Pixels = NDArray[np.uint8]
# Seconds that an actor of the pool spent on the shard.
BUSY_COLUMN = "busy_seconds"


@dataclass(frozen=True)
class Job:
    """What every worker must know; small, so that it travels with each task."""

    source: str
    format: str
    classes: tuple[str, ...] | None
    data: DataConfig
    output: str
    denoiser: str
    purify: PurifyConfig
    seed: int
    compensation: CompensationConfig
    sparse_hashes: frozenset[str]
    session: str = ""
    """Name of the driver's session; the driver after one that hung takes it over (`ledger.session`)."""
    run: str = ""
    """The run's fingerprint, under which workers count."""
    board: Any = None
    """The actor to which the pool tells how far it is; None: to nobody."""

    def store(self) -> Store:
        """Open the output folder."""
        return Store(self.output, self.purify.single_writer)

    def refuse_leakage(self, name: str, content: str) -> None:
        """Raise InputError if the image `name` with this content hash is one that the denoiser was trained on."""
        if content in self.sparse_hashes:
            raise InputError(
                f"{self.source}: image {name} is in the sparse clean set that the "
                f"denoiser {self.denoiser} was trained on; purify images that are disjoint from it"
            )

    def stage(self, name: str) -> str:
        """Return the key under which starts of a stage are counted, so that a killed driver blames no shard."""
        return f"{self.session}-{name}"


@dataclass(frozen=True)
class Task:
    """A shard to be done: generation 0 the whole of it, a later one the images that failed in the one before."""

    shard: ledger.Shard
    generation: int = 0


def task_rows(tasks: Sequence[Task]) -> list[pa.Table]:
    """Return one table of one row for each task, so that Ray gives every shard a task of its own."""
    return [pa.table({"task": [json.dumps(asdict(task))]}) for task in tasks]


def task_of(batch: pa.Table) -> Task:
    """Return the task of a one-row batch."""
    tree = json.loads(batch["task"][0].as_py())
    spans = tuple(ledger.Span(**span) for span in tree["shard"]["spans"])
    return Task(ledger.Shard(tree["shard"]["name"], spans), tree["generation"])


Kind = Literal["killed", "memory", "small", "large", "undecodable"]
"""Why an image has no pixels, as dashboards show it."""


FailureRow = dict[str, Any]


class Failure(NamedTuple):
    """Why an image became an error row: a sentence for people, and its kind."""

    error: str
    kind: Kind = "undecodable"

    def row(self, image_id: str, label: int | None, key: str = "") -> FailureRow:
        """Return the error row of an image that came from the source object `key`; `label` is None if unknown."""
        return {"id": image_id, "label": label, "key": key, **self._asdict()}


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


def pack(
    columns: dict[str, list[Any]],
    table: pa.Table,
    images: Sequence[Pixels],
    failures: list[FailureRow],
    fatal: str = "",
    note: str = "",
) -> pa.Table:
    """Return a shard between two stages as one row; `table` holds everything but the images.

    `fatal` is the note of an error that ends the run (`errors.error_of_note`); `note` is for people, said once.
    """
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
        "note": pa.array([note]),
    }
    return pa.table({**{name: pa.array(values) for name, values in columns.items()}, **packed})


def _binary(buffer: pa.Buffer) -> pa.Array:
    # One value over the buffer as it is: no copy, and 64-bit offsets for shards of large images.
    offsets = pa.py_buffer(np.array([0, buffer.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])


def take_rows(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Return these rows. An empty list is given the type that pyarrow needs."""
    return table.take(pa.array(rows, pa.int64()))


def unpack(batch: pa.Table) -> tuple[pa.Table, list[Pixels], list[FailureRow]]:
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
