"""The stages of a shard in their order: read and decode, denoise, encode and commit; and its form between them.

One row of an Arrow table is one shard. Columns carry only strings, numbers and contiguous buffers, never Python
objects (Ray would pickle them): `task` and `failures` are JSON, `table` is an Arrow stream of ids, labels and
extra columns, `pixels` one uint8 buffer of all images in order, `shapes` their (height, width) as int32 pairs.

Torch is imported by the denoising actor alone, so that CPU workers of the other stages start in a second or two.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eclipse_ray import ledger
from eclipse_ray.cluster import metrics
from eclipse_ray.cluster.connect import open_denoiser
from eclipse_ray.config import BATCH_PIXELS, CompensationConfig, PurifyConfig, content_hash
from eclipse_ray.datasets.formats import Source, read_parts
from eclipse_ray.datasets.images import ImageError, LargeImageError, decode_stored, encode_image, resize_image
from eclipse_ray.datasets.table import canonical_table, image_bytes, refuse_repeated, table_to_parquet
from eclipse_ray.errors import EclipseError, InputError, StorageError, note_of_error
from eclipse_ray.storage.store import Store

if TYPE_CHECKING:
    import torch

    from eclipse_ray.diffusion.network import Denoiser

Pixels = NDArray[np.uint8]
# Seconds that an actor of the pool spent on the shard.
BUSY_COLUMN = "busy_seconds"


@dataclass(frozen=True)
class Job:
    """What every worker must know; small, so that it travels with each task."""

    source: Source
    """The source without its parts, its classes those of the plan."""
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
                f"{self.source.url}: image {name} is in the sparse clean set that the "
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


Outcome = Pixels | Failure
"""Purified pixels (H, W, 3), or why there are none."""


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


# What waits beside the pixels while they travel: the image's own file name, its object and row in the source, and
# how far it was changed.
PATH_COLUMN, KEY_COLUMN, ROW_COLUMN = ".image_path", ".key", ".row"
CHANGE_COLUMNS = ("psnr", "ssim")
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
        packed = _nothing(fatal=note_of_error(error))
    packed = packed.append_column("task", batch["task"])
    packed = packed.append_column("seconds", pa.array([time.monotonic() - started]))
    return packed.append_column(BUSY_COLUMN, pa.array([0.0]))


def _read_and_decode(task: Task, job: Job, attempt: int) -> pa.Table:
    table, spans, failures = _read(task, job)
    places = [(span.key, row) for span in spans for row in range(span.start, span.stop)]
    encoded, order, labels = image_bytes(table), table["id"].to_pylist(), _labels(table)
    metrics.count("read_bytes", sum(map(len, encoded)), job.run)
    refuse_repeated(job.source.url, order)
    state = hashlib.sha256()
    for data in encoded:
        state.update(len(data).to_bytes(8, "little") + data)
    before = _done_before(job, task)
    done = set(before["id"].to_pylist()) if before else set()
    rows = [row for row, name in enumerate(order) if name not in done]
    pixels: list[Pixels] = []
    kept: list[int] = []
    for index, image in zip(rows, _decoded(job, task, attempt, [encoded[row] for row in rows]), strict=True):
        if isinstance(image, Failure):
            if job.source.data.on_error == "stop":
                raise InputError(
                    f"{job.source.url}: image {order[index]}: {image.error}; mend it, leave it out, "
                    "or set data.on_error=row"
                )
            failures.append(image.row(order[index], labels[index], places[index][0]))
            continue
        # Before it is resized: hashes are of images as they are stored, whatever size either run works at.
        if job.sparse_hashes:
            job.refuse_leakage(order[index], content_hash(image))
        pixels.append(resize_image(image, job.source.data.resize))
        kept.append(index)
    paths = pc.struct_field(table["image"], "path")
    table = table.drop_columns(["image"]).append_column(PATH_COLUMN, paths)
    keys, numbers = zip(*places, strict=True) if places else ((), ())
    table = table.append_column(KEY_COLUMN, pa.array(keys, pa.string()))
    table = table.append_column(ROW_COLUMN, pa.array(numbers, pa.int64()))
    columns = {"input_sha256": [state.hexdigest()], "order": [json.dumps(order if task.generation else [])]}
    return pack(columns, take_rows(table, kept), pixels, failures)


def _read(task: Task, job: Job) -> tuple[pa.Table, list[ledger.Span], list[FailureRow]]:
    """Return the rows of a shard, the spans they come from, and error rows for spans that cannot be read."""

    def read(spans: Sequence[ledger.Span]) -> pa.Table:
        places = [(span.key, span.start, span.stop) for span in spans]
        return read_parts(job.source, places)

    spans = list(task.shard.spans)
    try:
        return read(spans), spans, []
    except InputError:
        # A retry knows the images that it did not reach before, so it must see all of them.
        if job.source.data.on_error == "stop" or task.generation:
            raise
    good: list[ledger.Span] = []
    failures: list[FailureRow] = []
    for span in spans:
        try:
            read([span])
            good.append(span)
        except InputError as error:
            failures += _unread(job, span, Failure(str(error)))
    return (read(good) if good else _EMPTY), good, failures


def _unread(job: Job, span: ledger.Span, failure: Failure) -> list[FailureRow]:
    """Return error rows for images that could not be read, so that only the ids of a folder are known."""
    return [
        failure.row(span.key if job.source.format == "folder" else f"{span.key}#{row}", None, span.key)
        for row in range(span.start, span.stop)
    ]


def _decoded(job: Job, task: Task, attempt: int, encoded: Sequence[bytes]) -> Iterator[Outcome]:
    """Yield each image, or why it cannot be had."""
    killers, _ = _killers(job, task, "decode", attempt, len(encoded), lambda row: _decode(job, encoded[row]))
    for row, data in enumerate(encoded):
        yield killers[row] if row in killers else _decode(job, data)


def _killers(
    job: Job, task: Task, stage: str, attempt: int, images: int, alone: Callable[[int], object]
) -> tuple[dict[int, Outcome], ledger.Care]:
    """Return the failures of images that killed the worker of earlier attempts, and how to process the others."""
    blamed, care = ledger.try_alone(
        job.store(), task.shard.name, task.generation, job.stage(stage), attempt, images, alone
    )
    doing, hint = {"decode": ("decoding", "; lower purify.shard_images"), "purify": ("purifying", "")}[stage]
    found: dict[int, Outcome] = {}
    if care is ledger.Care.GIVE_UP:
        reason = f"{doing} its shard kills the worker, though no image does so alone{hint}"
        found = dict.fromkeys(range(images), Failure(reason, "killed"))
    killer = Failure(f"{doing} this image kills the worker, also when tried alone", "killed")
    return found | dict.fromkeys(blamed, killer), care


def _decode(job: Job, data: bytes) -> Outcome:
    try:
        return decode_stored(data, job.source.data)
    except ImageError as error:
        return Failure(str(error), "large" if isinstance(error, LargeImageError) else "undecodable")


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
    failure = Failure("reading its shard kills the worker, before any image is decoded", "killed")
    return _nothing(failures=[row for span in task.shard.spans for row in _unread(job, span, failure)])


def _nothing(failures: Sequence[FailureRow] = (), fatal: str = "") -> pa.Table:
    columns = {"input_sha256": [""], "order": ["[]"]}
    return pack(columns, pa.table({"id": pa.array([], pa.string())}), [], list(failures), fatal)


def purify_batch(
    denoiser: Denoiser, images: Pixels, ids: Sequence[str], settings: PurifyConfig, seed: int
) -> torch.Tensor:
    """Return uint8 images (B, H, W, 3) of one size purified as `settings` say. Raises InputError if too small."""
    from eclipse_ray.diffusion.sampling import purify_images

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


class DenoisingActor:
    """Holds a denoiser on its device. An error for people becomes `fatal` of a row, because Ray would lose it."""

    def __init__(self, url: str, settings: PurifyConfig) -> None:
        import torch

        # One thread each, because threads change how sums are split, and so the bytes.
        torch.set_num_threads(1)
        self.refused = ""
        try:
            self.denoiser = open_denoiser(url, settings.precision)
        except EclipseError as error:
            self.refused = note_of_error(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return what `handle` makes of a row, or the same row with an error that ends the run."""
        fatal = batch["fatal"][0].as_py() or self.refused
        if not fatal:
            try:
                return self.handle(batch)
            except EclipseError as error:
                fatal = note_of_error(error)
        return batch.set_column(batch.schema.get_field_index("fatal"), "fatal", pa.array([fatal]))

    def handle(self, batch: pa.Table) -> pa.Table:
        """Return the row with its images denoised."""
        raise NotImplementedError


class Purifier(DenoisingActor):
    """The actor of the pool: purifies shard after shard."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.denoiser, job.purify)
        self.job = job
        self.note = ""
        self.idle_since = time.monotonic()
        self._tell("", 0)

    def handle(self, batch: pa.Table) -> pa.Table:
        """Return the shard with its images purified; those that are too small or kill the actor fail."""
        started = time.monotonic()
        waited = started - self.idle_since
        table, images, failures = unpack(batch)
        ids: list[str] = table["id"].to_pylist()
        self.note = ""
        outcomes = self._outcomes(task_of(batch), images, ids)
        kept: list[int] = []
        done: list[Pixels] = []
        labels = _labels(table)
        for place, outcome in sorted(outcomes.items(), key=lambda item: item[0]):
            if isinstance(outcome, Failure):
                failures.append(outcome.row(ids[place], labels[place]))
            else:
                kept.append(place)
                done.append(outcome)
        table = take_rows(table, kept)
        for name, values in self._changes([images[place] for place in kept], done).items():
            table = table.append_column(f".{name}", pa.array(values, pa.float32(), from_pandas=True))
        columns = {name: batch[name].to_pylist() for name in ("task", "input_sha256", "order")}
        took = time.monotonic() - started
        columns["seconds"] = [batch["seconds"][0].as_py() + took]
        self.idle_since = started + took
        metrics.observe({"denoise_seconds": took, "input_wait_seconds": waited}, self.job.run)
        columns[BUSY_COLUMN] = [took]
        return pack(columns, table, done, failures, note=self.note)

    def _changes(self, before: Sequence[Pixels], after: Sequence[Pixels]) -> dict[str, NDArray[np.float32]]:
        """Return how far each image was changed: PSNR in dB and SSIM, which is NaN for a very small image."""
        import torch

        from eclipse_ray.quality import changes

        found = {name: np.zeros(len(after), np.float32) for name in CHANGE_COLUMNS}
        device, settings = self.denoiser.alphas_cumprod.device, self.job.purify
        for places in same_size_batches(after, settings.batch_size, settings.batch_pixels):
            one, other = (
                torch.from_numpy(np.stack([each[place] for place in places])).to(device)
                for each in (after, before)
            )
            for name, values in zip(CHANGE_COLUMNS, changes(one, other), strict=True):
                found[name][places] = values.cpu().numpy()
        return found

    def _outcomes(self, task: Task, images: Sequence[Pixels], ids: Sequence[str]) -> dict[int, Outcome]:
        """Return what became of every image; those that kill this actor are found by its earlier lives."""
        job, shard = self.job, task.shard.name

        def alone(place: int) -> object:
            return self._batch([place], images, ids)

        attempt = ledger.begin(job.store(), shard, task.generation, job.stage("purify"))
        killers, care = _killers(job, task, "purify", attempt, len(images), alone)
        outcomes = dict(killers)
        size = job.purify.batch_size if care is ledger.Care.USUAL else 1
        for places in same_size_batches(images, size, job.purify.batch_pixels):
            outcomes |= self._batch([place for place in places if place not in killers], images, ids)
            self._tell(shard, len(outcomes))
        return outcomes

    def _tell(self, shard: str, images: int) -> None:
        if self.job.board is not None:
            self.job.board.post.remote({"shard": shard, "images": images})

    def _batch(self, places: Sequence[int], images: Sequence[Pixels], ids: Sequence[str]) -> dict[int, Outcome]:
        """Purify some images of one size at once, or in halves where there is too little memory for that."""
        import torch

        from eclipse_ray.diffusion.tiling import MIN_SIDE

        if not places:
            return {}
        try:
            done = self._purify(np.stack([images[place] for place in places]), [ids[place] for place in places])
            return dict(zip(places, done, strict=True))
        except InputError as error:
            return dict.fromkeys(places, Failure(str(error), "small"))
        except (MemoryError, torch.OutOfMemoryError):
            pass
        except RuntimeError:
            # Torch has no class for want of memory on a CPU. Any other error occurs with the smallest image, too.
            self._purify(np.zeros((1, MIN_SIDE, MIN_SIDE, 3), np.uint8), ["smallest"])
        if len(places) == 1:
            alone = Failure("too little memory for this image alone; lower purify.tile", "memory")
            return dict.fromkeys(places, alone)
        middle = len(places) // 2
        self.note = self.note or f"too little memory for batches of {len(places)} images; lower purify.batch_size"
        return self._batch(places[:middle], images, ids) | self._batch(places[middle:], images, ids)

    def _purify(self, images: Pixels, ids: Sequence[str]) -> Pixels:
        from eclipse_ray import compensation

        job = self.job
        purified = purify_batch(self.denoiser, images, ids, job.purify, job.seed)
        if job.compensation.mode == "baked":
            purified = compensation.bake(purified, ids, job.compensation, job.seed)
        return purified.numpy()


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
            fatal = note_of_error(error)
    found = {
        "shard": task.shard.name,
        "ok": ok,
        "failed": failed,
        BUSY_COLUMN: batch[BUSY_COLUMN][0].as_py(),
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
    # Before the commit, so that a committed shard has them.
    ledger.write_changes(job.store(), task.shard.name, task.generation, _changes_of(table, failures))
    status = ledger.commit_shard(
        job.store(),
        task.shard,
        ok=data,
        ok_count=done.num_rows if done else 0,
        errors=[ledger.ImageFailure(failure["id"], failure["key"], failure["error"]) for failure in failures],
        input_sha256=batch["input_sha256"][0].as_py(),
        seconds=batch["seconds"][0].as_py() + time.monotonic() - started,
        generation=task.generation,
    )
    metrics.count("shards", 1, job.run)
    metrics.count("images", table.num_rows, job.run)
    metrics.count("written_bytes", len(data or b""), job.run)
    for kind, number in Counter(failure["kind"] for failure in failures).items():
        metrics.count("failures", number, job.run, kind)
    return status


def _changes_of(table: pa.Table, failures: Sequence[FailureRow]) -> pa.Table:
    """Return one row per image that this generation did, with how far it was changed, and one per failure."""
    columns = ("id", "label", KEY_COLUMN, ROW_COLUMN, *(f".{name}" for name in CHANGE_COLUMNS))
    done = table.select([name for name in columns if name in table.column_names])
    rows = done.rename_columns([name.removeprefix(".") for name in done.column_names]).to_pylist()
    return pa.Table.from_pylist([*rows, *failures], ledger.CHANGES_SCHEMA)


def _labels(table: pa.Table) -> list[int | None]:
    return table["label"].to_pylist() if "label" in table.column_names else [None] * table.num_rows


def _encoded(table: pa.Table, images: Sequence[Pixels], job: Job) -> pa.Table:
    encoded = [encode_image(image, job.source.data.encoding) for image in images]
    labels = _labels(table) if "label" in table.column_names else None
    paths = [_renamed(path, job.source.data.encoding) for path in table[PATH_COLUMN].to_pylist()]
    waiting = (PATH_COLUMN, KEY_COLUMN, ROW_COLUMN, *(f".{name}" for name in CHANGE_COLUMNS))
    extras = table.drop_columns([name for name in ("id", "label", *waiting) if name in table.column_names])
    return canonical_table(table["id"].to_pylist(), encoded, labels, extras, job.source.classes, paths)


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
