"""Write a poisoned copy of a dataset: an optimised poison is fitted on one Ray task, chunks go to all workers.

Draws are keyed by image id or class, so chunks are free. A closed form needs no cluster for a small dataset.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError

from eclipse_ray import ledger
from eclipse_ray.config import Config, digest, to_yaml
from eclipse_ray.data.dataset import refuse_existing, write_dataset
from eclipse_ray.data.formats import UNFINISHED, Source, chunk_spans, open_source, read_tables
from eclipse_ray.data.note import NOTE
from eclipse_ray.data.store import Store
from eclipse_ray.data.table import Span, with_classes
from eclipse_ray.diffusion.checkpoint import weights_digest
from eclipse_ray.distributed.cluster import Resources, connect, refuse_process_local, require_place
from eclipse_ray.distributed.fetch import local_denoiser
from eclipse_ray.distributed.poison_work import (
    FIT_KEY,
    PoisonJob,
    chunk_key,
    fit_stored,
    largest_norm,
    poison_chunk,
)
from eclipse_ray.distributed.progress import BoardWatcher, start_board
from eclipse_ray.distributed.shards import fatal_error, fatal_note
from eclipse_ray.errors import ConfigError, EclipseError, InputError
from eclipse_ray.log import say
from eclipse_ray.poisons.costs import resolved_poison, variant_of
from eclipse_ray.progress import ProgressLine
from eclipse_ray.results import DatasetResult

RESULT_KEY = "_eclipse/poison/result.json"
# Changes of the poisons that give other pixels for the same settings; fits of another one are not resumed.
POISON_VERSION = 1
CHUNK_IMAGES, CHUNK_BYTES = 2048, 64 * 2**20
# Starting a cluster takes as long as some ten chunks of a closed-form poison on one core.
SPREAD_CHUNKS = 16
# Settings that say where, when and how fast; all others of these sections decide what is written.
UNBOUND_DATA = {"source", "output", "clean", "test", "encoding", "allow_lossy", "on_error"}
UNBOUND_POISON = {"save_seconds"}


def poison(config: Config) -> DatasetResult:
    """Poison data.source into data.output; images are stored losslessly, labels, ids and extra columns stay.

    An optimised poison that was interrupted goes on where it was; the same command after its end returns at once.
    Raises InputError for missing labels, an undecodable image, or an output that already holds data, ResumeError
    for an output that was begun with other settings.
    """
    source_url, output = config.data.source, config.data.output
    if not source_url or not output:
        raise ConfigError("poison needs a source and an output: eclipse-ray poison NAME SRC DST")
    config = config.model_copy(update={"poison": resolved_poison(config.poison)})
    source = open_source(source_url, config.data)
    job = _job(config, source, source_url, output)
    if not job.optimised:
        refuse_existing(Store(output))
        spans = _spans(source, CHUNK_IMAGES)
        return _write(config, job, spans, _spread_or_not(config, job, len(spans)))
    return _optimised(config, job, source)


def _optimised(config: Config, job: PoisonJob, source: Source) -> DatasetResult:
    """Fit, poison and write, each part skipped as far as it is done."""
    store = Store(job.output)
    for place in (store, Store(job.source)):
        refuse_process_local(place.url, place.in_this_process_only)
    ledger.claim(store, _fingerprint(config, source), to_yaml(config))
    if store.exists(NOTE) and store.exists(RESULT_KEY):
        say(f"{job.output}: already poisoned with these settings and images")
        return DatasetResult(**json.loads(store.read(RESULT_KEY)))
    store.write(UNFINISHED, b"")
    spans = _spans(source, config.poison.chunk_images)
    resources = connect(config)
    state = _fit(config, job, resources)
    result = _write(config, job, spans, _spread(job, resources, state), resume=True)
    store.write(RESULT_KEY, json.dumps(vars(result)).encode())
    for key in (FIT_KEY, *(chunk_key(number) for number in range(len(spans)))):
        store.delete(key)
    return result


Tables = Callable[[Sequence[Sequence[Span]]], Iterator[pa.Table]]
"""Spans of all chunks to their poisoned tables, in order."""


def _write(
    config: Config, job: PoisonJob, spans: Sequence[Sequence[Span]], tables: Tables, *, resume: bool = False
) -> DatasetResult:
    norms: list[dict[str, Any]] = []
    total = sum(stop - start for chunk in spans for _, start, stop in chunk)
    line = ProgressLine(f"poison {job.poison.name}", "images", total, config.run.progress_seconds)

    def watched() -> Iterator[pa.Table]:
        for table in tables(spans):
            norms.append(largest_norm(table))
            line.advance(table.num_rows)
            yield with_classes(table, job.classes)

    with line:
        images = write_dataset(job.output, watched(), classes=job.classes, source=job.source, resume=resume)
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


def _spread_or_not(config: Config, job: PoisonJob, chunks: int) -> Tables:
    local = Store(job.source).in_this_process_only or Store(job.output).in_this_process_only
    if local or chunks < SPREAD_CHUNKS:
        return lambda spans: (poison_chunk(job, number, chunk, None) for number, chunk in enumerate(spans))
    return _spread(job, connect(config), None)


def _spread(job: PoisonJob, resources: Resources, state: Any) -> Tables:
    """Return what poisons chunks on all GPUs, or all cores for poisons that need no network."""
    gpus = resources.gpus if job.optimised else 0
    workers = gpus or max(1, resources.cpus // resources.cpus_per_core)
    task = ray.remote(num_cpus=resources.cpus_per_core, num_gpus=1 if gpus else 0, max_retries=3)(_chunk_task)
    shared = ray.put(job)

    def tables(spans: Sequence[Sequence[Span]]) -> Iterator[pa.Table]:
        pending: deque[Any] = deque()
        for number, chunk in enumerate(spans):
            pending.append(task.options(num_returns=2).remote(shared, number, chunk, state))
            # Two a worker: one to compute, one to wait; more would only fill memory.
            if len(pending) >= 2 * workers:
                yield _outcome(*pending.popleft())
        while pending:
            yield _outcome(*pending.popleft())

    return tables


def _fit(config: Config, job: PoisonJob, resources: Resources) -> Any:
    """Fit on one task, with a GPU if there is one, else with all cores; return a reference to the state."""
    threads, cpus = _fit_share(resources)
    require_place(resources, cpus, min(1, resources.gpus), "the fit of a poison")
    board, fitting = start_board(), _Fitting(f"fit {job.poison.name}", config.run.progress_seconds)
    task = ray.remote(num_cpus=cpus, num_gpus=1 if resources.gpus else 0, max_retries=3)(_fit_task)
    try:
        with BoardWatcher(board, fitting.show):
            note, state = task.options(num_returns=2).remote(job, threads, board)
            _refuse(note)
    finally:
        fitting.close()
    return state


def fits_at_once(resources: Resources) -> int:
    """Return how many poisons can be fitted at the same time: one a GPU, else one a machine."""
    return resources.gpus or max(1, resources.cpus // _fit_share(resources)[1])


def _fit_share(resources: Resources) -> tuple[int, int]:
    """Return (threads, logical CPUs) of a fit."""
    threads = 1 if resources.gpus else resources.cores
    return threads, max(1, min(resources.cpus, threads * resources.cpus_per_core))


class _Fitting:
    """A progress line that learns from the first report how long the work is and where it began."""

    def __init__(self, what: str, every: float) -> None:
        self.what, self.every = what, every
        self.line: ProgressLine | None = None

    def show(self, entry: dict[str, Any]) -> None:
        """Show one report of a fit; one that Ray had to start again may report a step twice."""
        if self.line is None:
            self.line = ProgressLine(self.what, "steps", entry["total"], self.every, entry["done"])
        self.line.advance(max(0, entry["done"] - self.line.done), note=entry["note"])

    def close(self) -> None:
        """Give the screen back; a fit may be good enough before its last step."""
        if self.line is not None:
            self.line.close()


def _fit_task(job: PoisonJob, threads: int, board: Any) -> tuple[str, Any]:
    torch.set_num_threads(threads)

    def report(done: int, total: int, note: str) -> None:
        board.post.remote({"done": done, "total": total, "note": note})

    return _guarded(lambda: fit_stored(job, report))


def _chunk_task(job: PoisonJob, number: int, spans: Sequence[Span], state: Any) -> tuple[str, Any]:
    torch.set_num_threads(1)
    return _guarded(lambda: poison_chunk(job, number, spans, state))


def _guarded(work: Callable[[], Any]) -> tuple[str, Any]:
    # An error for people crosses as text: Ray would wrap it in its own and a stack of calls.
    try:
        return "", work()
    except EclipseError as error:
        return fatal_note(error), None


def _outcome(note: Any, value: Any) -> Any:
    _refuse(note)
    return ray.get(value)


def _refuse(note: Any) -> None:
    try:
        text = ray.get(note)
    except RayError as error:
        raise EclipseError(
            f"a poison's worker failed: {str(error).splitlines()[-1]}; the same command goes on where it was"
        ) from None
    if text:
        raise fatal_error(text)


def _job(config: Config, source: Source, source_url: str, output: str) -> PoisonJob:
    return PoisonJob(
        source_url,
        source.url,
        source.format,
        source.classes,
        _class_count(source, config),
        config.data,
        output,
        config.poison,
        config.run.seed,
    )


def _spans(source: Source, images: int) -> list[list[Span]]:
    return list(chunk_spans(source.parts, images, CHUNK_BYTES))


def _fingerprint(config: Config, source: Source) -> ledger.Fingerprint:
    tree = {
        "poison": config.poison.model_dump(mode="json", exclude=UNBOUND_POISON),
        "data": config.data.model_dump(mode="json", exclude=UNBOUND_DATA),
        "run": {"seed": config.run.seed},
    }
    denoiser = config.poison.denoiser
    weights = weights_digest(local_denoiser(denoiser)) if denoiser else ""
    return ledger.Fingerprint(tree, weights, digest([list(part) for part in source.parts]), POISON_VERSION)


def _class_count(source: Source, config: Config) -> int:
    """Number of classes: the named ones, or one more than the largest label."""
    largest = -1
    for table in read_tables(source, config.data):
        if "label" not in table.column_names or table["label"].null_count:
            raise InputError(f"{source.url}: a poison needs a label for every image; add them or name the column")
        largest = max(largest, int(table["label"].to_numpy().max()))
    return max(largest + 1, len(source.classes or []))
