"""Write a poisoned copy of a dataset: an optimised poison is fitted on one Ray task, chunks go to all workers.

Random draws are keyed by image id or class, so that the division into chunks does not matter. A poison in closed
form needs no cluster for a small dataset.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import safetensors.torch
import torch
from numpy.typing import NDArray

from eclipse_ray import ledger
from eclipse_ray.cluster.connect import Resources, connect, local_denoiser, refuse_process_local, require_place
from eclipse_ray.cluster.work import BoardWatcher, Tasks, Watch, reaching, run_tasks, start_board
from eclipse_ray.config import Config, PoisonConfig, digest, to_yaml
from eclipse_ray.datasets.formats import UNFINISHED, Source, chunk_spans, open_source, read_parts
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import decode_resized, load_images, require_classes
from eclipse_ray.datasets.table import (
    NOTE,
    Span,
    canonical_table,
    extra_columns,
    image_bytes,
    table_to_parquet,
    with_classes,
)
from eclipse_ray.datasets.write import refuse_existing, write_dataset
from eclipse_ray.diffusion.checkpoint import load_denoiser, read_card, weights_digest
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.log import say
from eclipse_ray.poisons import (
    OPTIMISED,
    attacks_denoiser,
    budget,
    fit_poison,
    poison_fitted,
    poison_images,
    resolved_poison,
    variant_of,
)
from eclipse_ray.poisons.adp import Adp, check_attacked
from eclipse_ray.poisons.interface import LabelledImages, Session, State
from eclipse_ray.progress import ProgressLine
from eclipse_ray.purification.stages import same_size_batches
from eclipse_ray.results import DatasetResult
from eclipse_ray.storage.store import Store

FIT_KEY, STATE_KEY = "_eclipse/poison/fit.safetensors", "_eclipse/poison/state.safetensors"
NORM_KEY = b"poison_norm"
PERTURBATION = "perturbation"
"""Extra column: the stored image minus the clean one, raw int16 in C order (H, W, 3), little-endian."""

Report = Callable[[int, int, str], None]
Arrays = dict[str, NDArray[Any]]
Chunks = Sequence[Sequence[Span]]
"""The spans of each chunk, in order."""


@dataclass(frozen=True)
class PoisonJob:
    """What every worker must know.

    `listing` is the source as it was named, a pattern maybe, and `source` has no parts; `poison` is resolved;
    `num_classes` counts labels.
    """

    listing: str
    source: Source
    num_classes: int
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
    loaded = load_images(job.listing, job.source.data)
    assert loaded.labels is not None, "they were checked when the job was made"
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
    table = read_parts(job.source, spans)
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
        decode_resized(job.source.url, name, data, job.source.data)
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
    result = canonical_table(ids, encoded, table["label"], extras, job.source.classes)
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
            f"{job.source.url}: has a column {PERTURBATION!r} already; leave it out with --set "
            "data.extra_columns=drop"
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


RESULT_KEY = "_eclipse/poison/result.json"
# Changes of the poisons that give other pixels for the same settings; fits of another one are not resumed.
POISON_VERSION = 1
CHUNK_IMAGES, CHUNK_BYTES = 2048, 64 * 2**20
# Starting a cluster takes as long as some ten chunks of a closed-form poison on one core.
SPREAD_CHUNKS = 16
# Settings that say where, when and how fast; all others of these sections decide what is written.
UNBOUND_DATA = {"source", "output", "clean", "test", "encoding", "allow_lossy", "on_error", "labels", "strict"}
UNBOUND_POISON = {"save_seconds"}


def poison(config: Config, *, show_classes: bool = True) -> DatasetResult:
    """Poison data.source into data.output; images are stored losslessly, labels, ids and extra columns stay.

    The classes of the source are said first, unless it is part of an experiment that said them. An optimised
    poison that was interrupted goes on where it was; the same command after its end returns at once. Raises
    InputError for missing labels, an undecodable image, or an output that already holds data, ResumeError for an
    output that was begun with other settings.
    """
    source_url, output = config.data.source, config.data.output
    if not source_url or not output:
        raise ConfigError("poison needs a source and an output: eclipse-ray poison NAME SRC DST")
    config = config.model_copy(update={"poison": resolved_poison(config.poison)})
    if attacks_denoiser(config.poison):
        # Before Ray starts, where the fit would refuse the same.
        folder = config.poison.denoiser
        t_max = read_card(local_denoiser(folder)).t_max if folder else None
        check_attacked(Adp.model_validate(config.poison.own()), t_max)
    source = open_source(source_url, config.data)
    labels = require_classes(source_url, source, 2, show=show_classes)
    # The named classes, or one more than the largest label.
    classes = max(int(labels.max()) + 1, len(source.classes or []))
    alone = replace(source, parts=())
    job = PoisonJob(source_url, alone, classes, output, config.poison, config.run.seed)
    if not job.optimised:
        refuse_existing(Store(output))
        chunks = _chunks(source, CHUNK_IMAGES)
        return _write(config, job, chunks, _spread_or_not(config, job, chunks))
    return _optimised(config, job, source)


def _optimised(config: Config, job: PoisonJob, source: Source) -> DatasetResult:
    """Fit, poison and write, each part skipped as far as it is done."""
    store = Store(job.output)
    for place in (store, Store(job.source.url)):
        refuse_process_local(place.url, place.in_this_process_only)
    ledger.claim(store, _fingerprint(config, source), to_yaml(config))
    if store.exists(NOTE) and store.exists(RESULT_KEY):
        say(f"{job.output}: already poisoned with these settings and images")
        return DatasetResult(**json.loads(store.read(RESULT_KEY)))
    store.write(UNFINISHED, b"")
    chunks = _chunks(source, config.poison.chunk_images)
    every = config.run.progress_seconds
    with ProgressLine(f"fit {job.poison.name}", "steps", 0, every, phase=reaching(config)) as line:
        resources = connect(config)
        line.phase = "first step"
        state = _fit(config, job, resources, line)
    result = _write(config, job, chunks, _spread(config, job, chunks, resources, state), resume=True)
    store.write(RESULT_KEY, json.dumps(vars(result)).encode())
    for key in (FIT_KEY, *(chunk_key(number) for number in range(len(chunks)))):
        store.delete(key)
    return result


def _write(
    config: Config, job: PoisonJob, chunks: Chunks, tables: Iterator[pa.Table], *, resume: bool = False
) -> DatasetResult:
    norms: list[dict[str, Any]] = []
    total = sum(stop - start for chunk in chunks for _, start, stop in chunk)
    line = ProgressLine(f"poison {job.poison.name}", "images", total, config.run.progress_seconds)

    def watched() -> Iterator[pa.Table]:
        for table in tables:
            norms.append(largest_norm(table))
            line.advance(table.num_rows)
            yield with_classes(table, job.source.classes)

    with line:
        classes, source = job.source.classes, job.source.url
        images = write_dataset(job.output, watched(), classes=classes, source=source, resume=resume)
    return DatasetResult(images, job.output, _details(job, norms))


def _details(job: PoisonJob, norms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say what the images went through: poison and variant, bound and largest norm in 1/255, cost."""
    bounds = [each["eps_255"] for each in norms]
    return {
        "poison": job.poison.name,
        "classes": job.num_classes,
        "variant": variant_of(job.poison),
        "scope": job.poison.scope,
        "norm": norms[0]["norm"],
        "eps_255": None if None in bounds else max(bounds),
        "largest_norm_255": max(each["largest_norm_255"] for each in norms),
        "cost": job.poison.cost if job.optimised else "closed form",
    }


def _spread_or_not(config: Config, job: PoisonJob, chunks: Chunks) -> Iterator[pa.Table]:
    local = Store(job.source.url).in_this_process_only or Store(job.output).in_this_process_only
    if local or len(chunks) < SPREAD_CHUNKS:
        return (poison_chunk(job, number, chunk, None) for number, chunk in enumerate(chunks))
    return _spread(config, job, chunks, connect(config), None)


def _spread(
    config: Config, job: PoisonJob, chunks: Chunks, resources: Resources, state: Any
) -> Iterator[pa.Table]:
    """Yield chunks, poisoned on all GPUs, or on all cores by poisons that need no network, in order."""
    gpus = resources.gpus if job.optimised else 0
    workers = gpus or max(1, resources.cpus // resources.cpus_per_core)
    # Two per worker: one to compute, one to wait; more would only fill memory.
    tasks = Tasks(_chunk_task, 2 * workers, resources.cpus_per_core, 1 if gpus else 0)
    shared = ray.put(job)
    watch = Watch(f"poison {job.poison.name}", "chunk", config.run.watchdog_seconds)
    arguments = ((shared, number, chunk, state) for number, chunk in enumerate(chunks))
    return (done.value() for done in run_tasks(tasks, arguments, watch, in_order=True))


def _fit(config: Config, job: PoisonJob, resources: Resources, line: ProgressLine) -> Any:
    """Fit on one task, with a GPU if there is one, else with all cores; return a reference to the state."""
    threads, cpus = _fit_share(resources)
    require_place(resources, cpus, min(1, resources.gpus), "the fit of a poison")
    board, watch = start_board(), Watch(line.what, "step", config.run.watchdog_seconds)
    tasks = Tasks(_fit_task, 1, cpus, 1 if resources.gpus else 0)
    with BoardWatcher(board, partial(_show, line), watch):
        (done,) = run_tasks(tasks, [(job, threads, board)], watch)
    if done.error is not None:
        raise done.error
    return done.reference


def fits_at_once(resources: Resources) -> int:
    """Return how many poisons can be fitted at the same time: one per GPU, else one on each machine."""
    return resources.gpus or max(1, resources.cpus // _fit_share(resources)[1])


def _fit_share(resources: Resources) -> tuple[int, int]:
    """Return (threads, logical CPUs) of a fit."""
    threads = 1 if resources.gpus else resources.cores
    return threads, max(1, min(resources.cpus, threads * resources.cpus_per_core))


def _show(line: ProgressLine, entry: dict[str, Any]) -> None:
    """Show one report of a fit; one that Ray had to start again may report a step twice."""
    if not line.total:
        line.total = entry["total"]
        line.begin(entry["done"])
    line.advance(max(0, entry["done"] - line.done), note=entry["note"])


def _fit_task(job: PoisonJob, threads: int, board: Any) -> Arrays:
    torch.set_num_threads(threads)

    def report(done: int, total: int, note: str) -> None:
        board.post.remote({"done": done, "total": total, "note": note})

    return fit_stored(job, report)


def _chunk_task(job: PoisonJob, number: int, spans: Sequence[Span], state: Arrays | None) -> pa.Table:
    torch.set_num_threads(1)
    return poison_chunk(job, number, spans, state)


def _chunks(source: Source, images: int) -> Chunks:
    return list(chunk_spans(source.parts, images, CHUNK_BYTES))


def _fingerprint(config: Config, source: Source) -> ledger.Fingerprint:
    tree = {
        "poison": config.poison.model_dump(mode="json", exclude=UNBOUND_POISON),
        "data": {**config.data.model_dump(mode="json", exclude=UNBOUND_DATA), **config.data.deciding_labels()},
        "run": {"seed": config.run.seed},
    }
    denoiser = config.poison.denoiser
    weights = weights_digest(local_denoiser(denoiser)) if denoiser else ""
    return ledger.Fingerprint(tree, weights, digest([list(part) for part in source.parts]), POISON_VERSION)
