"""Ray Data streams shards through decode, the denoising actor pool, encode and commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any
from uuid import uuid4

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset

from eclipse_ray import ledger, log
from eclipse_ray.cluster.connect import Resources, connect, require_cpus, require_gpus, require_place
from eclipse_ray.cluster.work import BoardWatcher, NamedActor, Watch, pass_by_value, reaching, start_board, watched
from eclipse_ray.config import Config
from eclipse_ray.errors import error_of_note
from eclipse_ray.log import counted, say
from eclipse_ray.progress import ProgressLine
from eclipse_ray.purification.plan import Prepared, prepare, warn_if_unsuitable
from eclipse_ray.purification.stages import (
    BUSY_COLUMN,
    Job,
    Purifier,
    Task,
    encode_and_commit,
    read_and_decode,
    task_rows,
)
from eclipse_ray.results import PurifyResult

# Reading and encoding mostly wait. A share other than that of the actors keeps Ray from fusing them with these.
IO_CPUS = 0.5


def purify(config: Config, *, retry_failed: bool = False, extend: bool = False) -> PurifyResult:
    """Purify data.source into data.output with purify.denoiser; the same command resumes what it began.

    `retry_failed` does again what failed before, `extend` also does what the source has gained. Raises
    ConfigError or InputError before anything is written for unusable input, ResumeError if the output belongs to
    another run, InterruptedRunError if it stopped on the way.
    """
    prepared = prepare(config, extend=extend)
    prepared.claim()
    log.set_run("purify", prepared.fingerprint.value)
    store, shards = prepared.store, prepared.plan.shards
    statuses = ledger.read_statuses(store)
    tasks = [Task(shard) for shard in ledger.pending(shards, statuses)]
    if retry_failed:
        again = ledger.retriable(shards, statuses)
        tasks += [Task(shard, statuses[shard.name].generation + 1) for shard in again]
    rate = 0.0
    if tasks:
        crops = [sample.crop for sample in prepared.samples]
        warn_if_unsuitable(prepared.denoiser, crops, prepared.heldout_psnr, prepared.job.purify.t_star)
        rate = _run(prepared, tasks)
    done = ledger.finalise(store)
    return PurifyResult(done.ok + done.failed, done.ok, done.failed, float(f"{rate:.4g}"), store.url)


def _run(prepared: Prepared, tasks: list[Task]) -> float:
    """Stream the tasks; return images per second of this run."""
    config, shards = prepared.config, prepared.plan.shards
    total = sum(shard.rows for shard in shards)
    done = total - sum(task.shard.rows for task in tasks)
    if done:
        say(f"purify: resuming, {len(shards) - len(tasks)} of {counted(len(shards), 'shard')} already committed")
    every = config.run.progress_seconds
    with ProgressLine("purify", "images", total, every, done, phase=reaching(config)) as line:
        resources = connect(config)
        actors, gpus = pool(config, resources, len(tasks))
        line.begin(done)
        line.phase = f"loading the denoiser on {counted(actors, 'actor')}"
        session = ledger.session(prepared.store)
        name = f"board-{uuid4().hex}"
        board, named = start_board(name), NamedActor(name)
        job = replace(prepared.job, session=session, run=prepared.fingerprint.value, board=named)
        watch = Watch(
            "purify",
            "batch of images",
            config.run.watchdog_seconds,
            partial(ledger.hand_over, prepared.store, session),
        )
        shown = _Shown(line, "GPUs" if gpus else "actors", actors)
        with BoardWatcher(board, shown.under_way, watch):
            for row in watched(_stream(job, tasks, actors, gpus), watch):
                shown.committed(row)
        return line.rate


class _Shown:
    """Shows the images of committed shards and of those under way, and how busy the pool has been."""

    def __init__(self, line: ProgressLine, what: str, actors: int) -> None:
        self.line, self.what, self.actors = line, what, actors
        self.done, self.busy, self.start = line.done, 0.0, 0.0
        self.lock, self.closed, self.open = Lock(), set[str](), dict[str, int]()

    def under_way(self, entry: dict[str, Any]) -> None:
        """Count what an actor tells: that it has its denoiser, or how many images of a shard it has done."""
        self.line.phase = "first shard"
        with self.lock:
            if entry["shard"] not in self.closed:
                self.open[entry["shard"]] = entry["images"]
            self._show()

    def committed(self, row: dict[str, Any]) -> None:
        """Count a shard that is committed; see `encode_and_commit` for the row."""
        now = time.monotonic()
        self.start = self.start or now - row[BUSY_COLUMN]
        self.busy += row[BUSY_COLUMN]
        share = min(100, 100 * self.busy / max(1e-9, self.actors * (now - self.start)))
        self.line.note = f"{self.what} busy {share:.0f} %"
        self.line.failed += row["failed"]
        self.done += row["ok"] + row["failed"]
        with self.lock:
            self.closed.add(row["shard"])
            self.open.pop(row["shard"], None)
            self._show()

    def _show(self) -> None:
        self.line.reach(self.done + sum(self.open.values()))


def pool(config: Config, resources: Resources, shards: int) -> tuple[int, float]:
    """Return (actors, GPUs of each); never more actors than there are shards to keep them busy.

    Raises ConfigError if the cluster can never hold them.
    """
    gpus = config.purify.num_gpus
    if gpus is None:
        gpus = 1.0 if resources.gpus else 0.0
    require_gpus(resources, gpus, f"purify.num_gpus={gpus:g}")
    default = int(resources.gpus / gpus) if gpus else max(1, resources.cpus // 2)
    actors = min(config.purify.actors or default, shards)
    require_gpus(resources, actors * gpus, f"purify.actors={actors} with purify.num_gpus={gpus:g}")
    require_cpus(resources, actors + 1, f"purify with {actors} actors and a CPU task to read and encode")
    require_place(resources, 1, gpus, "an actor of purify")
    return actors, gpus


def dataset_of(rows: list[pa.Table]) -> Dataset:
    """Return a dataset of one block per table, which Ray Data streams silently and without its own timeout."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Off, because `watched` knows how long a shard takes here.
    context.execution_no_progress_timeout_s = -1
    pass_by_value()
    return ray.data.from_arrow(rows)


def on_actors(dataset: Dataset, actor: Callable[[Any], Any], job: Any, actors: int, gpus: float) -> Dataset:
    """Return the dataset with each block handled by a pool of `actor(job)`, each with one CPU or `gpus` GPUs."""
    return dataset.map_batches(
        actor,
        fn_constructor_args=(job,),
        compute=ActorPoolStrategy(size=actors),
        batch_size=1,
        batch_format="pyarrow",
        num_gpus=gpus or None,
        num_cpus=None if gpus else 1,
    )


def _stream(job: Job, tasks: list[Task], actors: int, gpus: float) -> Iterator[dict[str, Any]]:
    """Yield the row of each shard as it is committed."""
    dataset = dataset_of(task_rows(tasks)).map_batches(
        read_and_decode, fn_kwargs={"job": job}, batch_size=1, batch_format="pyarrow", num_cpus=IO_CPUS
    )
    # Reading has compared the images with the sparse set: the actors need no list of it.
    dataset = on_actors(dataset, Purifier, replace(job, sparse_hashes=frozenset()), actors, gpus)
    dataset = dataset.map_batches(
        encode_and_commit, fn_kwargs={"job": job}, batch_size=1, batch_format="pyarrow", num_cpus=IO_CPUS
    )
    noted: set[str] = set()
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            if row["note"] and row["note"] not in noted:
                noted.add(row["note"])
                say(f"note: {row['note']}")
            if row["fatal"]:
                raise error_of_note(row["fatal"])
            log.event("shard", shard=row["shard"], ok=row["ok"], failed=row["failed"])
            yield row
