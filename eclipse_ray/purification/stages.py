"""What CPU workers do to a shard: read and decode it before the denoiser, encode and commit it afterwards."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from eclipse_ray import ledger
from eclipse_ray.cluster import metrics
from eclipse_ray.datasets.formats import read_parts
from eclipse_ray.datasets.images import ImageError, content_hash, decode_stored, encode_image, resize_image
from eclipse_ray.datasets.table import canonical_table, image_bytes, table_to_parquet
from eclipse_ray.errors import EclipseError, InputError, StorageError
from eclipse_ray.purification.shard import (
    BUSY_COLUMN,
    Job,
    Pixels,
    Task,
    fatal_note,
    pack,
    take_rows,
    task_of,
    unpack,
)

# Where the image's own file name waits while its pixels travel.
PATH_COLUMN = ".image_path"
_EMPTY = canonical_table([], [])


def read_and_decode(batch: pa.Table, job: Job) -> pa.Table:
    """Read a shard's rows and decode them; undecodable images become failures.

    What makes the whole run impossible (a store that stays away, an image of the sparse set) travels on as
    `fatal`: an exception would reach the driver as text only.
    """
    started = time.monotonic()
    task = task_of(batch)
    store, name, generation, stage = job.store(), task.shard.name, task.generation, job.stage("decode")
    try:
        attempt = ledger.begin(store, name, generation, stage)
        if ledger.hopeless(store, name, generation, stage, attempt):
            packed = _given_up(task, job)
        else:
            packed = _read_and_decode(task, job, attempt)
    except EclipseError as error:
        packed = _nothing(fatal=fatal_note(error))
    columns = {"task": batch["task"], "seconds": pa.array([time.monotonic() - started])}
    for column, value in columns.items():
        packed = packed.append_column(column, value)
    return packed


def _read_and_decode(task: Task, job: Job, attempt: int) -> pa.Table:
    table, spans, failures = _read(task, job)
    keys = [span.key for span in spans for _ in range(span.start, span.stop)]
    encoded, order = image_bytes(table), table["id"].to_pylist()
    metrics.count("read_bytes", sum(map(len, encoded)), job.run)
    _refuse_repeated_ids(job, order)
    state = hashlib.sha256()
    for data in encoded:
        state.update(len(data).to_bytes(8, "little") + data)
    rows = _rows_to_do(job, task, order)
    pixels: list[Pixels] = []
    kept: list[int] = []
    for index, image in zip(rows, _decoded(job, task, attempt, [encoded[row] for row in rows]), strict=True):
        if isinstance(image, str):
            if job.data.on_error == "stop":
                raise InputError(
                    f"{job.source}: image {order[index]}: {image}; mend it, leave it out, or set data.on_error=row"
                )
            failures.append({"id": order[index], "key": keys[index], "error": image})
            continue
        # Before it is resized: hashes are of images as they are stored, whatever size either run works at.
        _refuse_leakage(job, order[index], image)
        pixels.append(resize_image(image, job.data.resize))
        kept.append(index)
    paths = pc.struct_field(table["image"], "path")
    table = table.drop_columns(["image"]).append_column(PATH_COLUMN, paths)
    columns = {"input_sha256": [state.hexdigest()], "order": [json.dumps(order if task.generation else [])]}
    return pack(columns, take_rows(table, kept), pixels, failures)


def _read(task: Task, job: Job) -> tuple[pa.Table, list[ledger.Span], list[dict[str, str]]]:
    """Return the rows of a shard, the spans they come from, and error rows for spans that cannot be read."""

    def read(spans: Sequence[ledger.Span]) -> pa.Table:
        places = [(span.key, span.start, span.stop) for span in spans]
        return read_parts(job.source, job.format, job.classes, places, job.data)

    spans = list(task.shard.spans)
    try:
        return read(spans), spans, []
    except InputError:
        # A retry knows the images that it did not reach before, so it must see all of them.
        if job.data.on_error == "stop" or task.generation:
            raise
    good: list[ledger.Span] = []
    failures: list[dict[str, str]] = []
    for span in spans:
        try:
            read([span])
            good.append(span)
        except InputError as error:
            failures += _unread(job, span, str(error))
    return (read(good) if good else _EMPTY), good, failures


def _unread(job: Job, span: ledger.Span, reason: str) -> list[dict[str, str]]:
    """Return error rows for images that nobody could read, so that only a folder's ids are known."""
    return [
        {"id": span.key if job.format == "folder" else f"{span.key}#{row}", "key": span.key, "error": reason}
        for row in range(span.start, span.stop)
    ]


def _decoded(job: Job, task: Task, attempt: int, encoded: Sequence[bytes]) -> Iterator[Pixels | str]:
    """Yield each image, or why it cannot be had; those that kill their worker are found by earlier attempts."""
    store, name, stage = job.store(), task.shard.name, job.stage("decode")
    blamed, care = ledger.try_alone(
        store, name, task.generation, stage, attempt, len(encoded), lambda row: _decode(job, encoded[row])
    )
    for row, data in enumerate(encoded):
        if row in blamed:
            yield "decoding this image kills the worker, also when tried alone"
        elif care is ledger.Care.GIVE_UP:
            yield "decoding its shard kills the worker, though no image does so alone; lower purify.shard_images"
        else:
            yield _decode(job, data)


def _decode(job: Job, data: bytes) -> Pixels | str:
    try:
        return decode_stored(data, job.data)
    except ImageError as error:
        return str(error)


def _rows_to_do(job: Job, task: Task, order: Sequence[str]) -> list[int]:
    """Return the rows of a shard that a task is about: all, or those not done in the generation before."""
    before = _done_before(job, task)
    done = set() if before is None else set(before["id"].to_pylist())
    return [row for row, name in enumerate(order) if name not in done]


def _done_before(job: Job, task: Task) -> pa.Table | None:
    """Return the images that the generation before this task's has done, None if there are none."""
    if not task.generation:
        return None
    store = job.store()
    status = ledger.read_status(store, task.shard.name, task.generation - 1)
    if status is None:
        raise StorageError(
            f"{store.url}: generation {task.generation - 1} of shard {task.shard.name} has gone; run the same "
            "command again"
        )
    return ledger.read_object(store, status)


def _given_up(task: Task, job: Job) -> pa.Table:
    reason = "reading its shard kills the worker, before any image is decoded"
    return _nothing(failures=[row for span in task.shard.spans for row in _unread(job, span, reason)])


def _nothing(failures: Sequence[dict[str, str]] = (), fatal: str = "") -> pa.Table:
    columns = {"input_sha256": [""], "order": ["[]"]}
    return pack(columns, pa.table({"id": pa.array([], pa.string())}), [], list(failures), fatal)


def _refuse_repeated_ids(job: Job, ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"{job.source}: two images have the id {twice}; give every image an id of its own")


def _refuse_leakage(job: Job, name: str, image: Pixels) -> None:
    if job.sparse_hashes and content_hash(image) in job.sparse_hashes:
        raise InputError(
            f"{job.source}: image {name} is in the sparse clean set that the "
            f"denoiser {job.denoiser} was trained on; purify images that are disjoint from it"
        )


def encode_and_commit(batch: pa.Table, job: Job) -> pa.Table:
    """Encode a purified shard and commit it; return one row of what now stands.

    Its columns: shard, ok, failed, busy_seconds, fatal, note.
    """
    task = task_of(batch)
    fatal, ok, failed = batch["fatal"][0].as_py(), 0, 0
    if not fatal:
        try:
            status = _encode_and_commit(batch, task, job)
            ok, failed = status.ok, status.failed
        except EclipseError as error:
            fatal = fatal_note(error)
    found = {
        "shard": task.shard.name,
        "ok": ok,
        "failed": failed,
        BUSY_COLUMN: batch[BUSY_COLUMN][0].as_py() if BUSY_COLUMN in batch.column_names else 0.0,
        "fatal": fatal,
        "note": batch["note"][0].as_py(),
    }
    return pa.Table.from_pylist([found])


def _encode_and_commit(batch: pa.Table, task: Task, job: Job) -> ledger.Status:
    started = time.monotonic()
    table, images, failures = unpack(batch)
    done = _encoded(table, images, job) if table.num_rows else None
    if task.generation:
        done = _merged(_done_before(job, task), done, json.loads(batch["order"][0].as_py()))
    data = table_to_parquet(done) if done else None
    status = ledger.commit_shard(
        job.store(),
        task.shard,
        ok=data,
        ok_count=done.num_rows if done else 0,
        errors=[ledger.ImageFailure(**failure) for failure in failures],
        input_sha256=batch["input_sha256"][0].as_py(),
        seconds=batch["seconds"][0].as_py() + time.monotonic() - started,
        generation=task.generation,
    )
    metrics.count("shards", 1, job.run)
    metrics.count("images", table.num_rows, job.run)
    metrics.count("written_bytes", len(data or b""), job.run)
    metrics.count_failures([failure["error"] for failure in failures], job.run)
    return status


def _encoded(table: pa.Table, images: Sequence[Pixels], job: Job) -> pa.Table:
    encoded = [encode_image(image, job.data.encoding) for image in images]
    labels = table["label"].to_pylist() if "label" in table.column_names else None
    paths = [_renamed(path, job.data.encoding) for path in table[PATH_COLUMN].to_pylist()]
    extras = table.drop_columns([name for name in ("id", "label", PATH_COLUMN) if name in table.column_names])
    return canonical_table(table["id"].to_pylist(), encoded, labels, extras, job.classes, paths)


def _merged(before: pa.Table | None, done: pa.Table | None, order: Sequence[str]) -> pa.Table | None:
    """Return the images that were already done, their bytes untouched, and the new ones, in the shard's order."""
    if before is None or done is None:
        return done if before is None else before
    both = pa.concat_tables([before, done], promote_options="default")
    both = both.replace_schema_metadata(before.schema.metadata)
    place = {name: row for row, name in enumerate(both["id"].to_pylist())}
    return take_rows(both, [place[name] for name in order if name in place])


def _renamed(path: str | None, encoding: str) -> str | None:
    # The bytes are in another format now, and some readers go by the name's ending.
    if path is None:
        return None
    return str(PurePosixPath(path).with_suffix("." + encoding.partition("-")[0].partition(":")[0]))
