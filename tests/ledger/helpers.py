"""A small source, its commits, and a store that fails on command."""

import uuid
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from eclipse_ray.datasets.table import Part
from eclipse_ray.ledger import (
    Fingerprint,
    ImageFailure,
    Manifest,
    Plan,
    Shard,
    Status,
    commit_shard,
    finalise,
    open_run,
    pending,
    plan_digest,
    plan_shards,
    read_statuses,
)
from eclipse_ray.storage.store import Store

CONFIG = {"purify": {"t_star": 100, "levels": (1, 2)}, "run": {"seed": 0}}


class CrashError(Exception):
    """Replaces the death of a process."""


class CrashingStore(Store):
    """Raises CrashError at the n-th change, counted from 0, before or after the change takes effect."""

    def __init__(self, url: str, at: int | None = None, after: bool = False) -> None:
        super().__init__(url)
        self.at, self.after, self.changes = at, after, 0

    def _due(self, after: bool) -> None:
        if self.at == self.changes and self.after == after:
            raise CrashError

    def write(self, key: str, data: bytes) -> None:
        self._before(key)
        super().write(key, data)
        self._done()

    def create(self, key: str, data: bytes) -> bool:
        self._before(key)
        created = super().create(key, data)
        self._done()
        return created

    def delete(self, key: str) -> None:
        self._due(after=False)
        super().delete(key)
        self._done()

    def _before(self, key: str) -> None:
        if self.at == self.changes and not self.after:
            folder = key.rpartition("/")[0]
            self.fs.pipe_file(self.path(f"{folder}/.tmp-torn"), b"half") if self.exists(folder) else None
        self._due(after=False)

    def _done(self) -> None:
        self._due(after=True)
        self.changes += 1


def part(key: str, rows: int = 1, size: int = 10, version: str = "v1") -> Part:
    return Part(key, rows, size, version)


def memory_store() -> Store:
    return Store(f"memory://ledger-{uuid.uuid4().hex}")


def make_shards(images: int = 10, shard_images: int = 4) -> list[Shard]:
    return plan_shards([part(f"img-{i:04d}.png") for i in range(images)], shard_images)


def plan_of(shards: list[Shard]) -> Plan:
    return Plan(tuple(shards), shard_images=4, classes=("cat", "dog"))


def make_fingerprint(shards: list[Shard], **changes: object) -> Fingerprint:
    values = {"config": CONFIG, "weights": "w1", "input": plan_digest(shards), "engine_version": 1}
    return Fingerprint(**{**values, **changes})  # type: ignore[arg-type]


def table(ids: list[str], salt: int = 0) -> bytes:
    sink = pa.BufferOutputStream()
    columns = {"id": ids, "label": [len(i or "") + salt for i in ids]}
    pq.write_table(pa.table(columns), sink, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def start(store: Store, shards: list[Shard]) -> None:
    open_run(store, plan_of(shards), make_fingerprint(shards), "run: {}\n")


def commit(store: Store, shard: Shard, salt: int = 0, generation: int = 0, mended: bool = False) -> Status:
    """Commit a shard whose ids are its keys; the first image of every odd shard fails unless `mended`."""
    ids = [span.key for span in shard.spans]
    bad = ids[:1] if int(shard.name) % 2 and not mended else []
    good = ids[len(bad) :]
    return commit_shard(
        store,
        shard,
        ok=table(good, salt) if good else None,
        ok_count=len(good),
        errors=[ImageFailure(i, i, "not an image") for i in bad],
        input_sha256="0" * 64,
        seconds=0.5 + salt,
        generation=generation,
    )


def commit_ids(
    store: Store, shard: Shard, good: bytes | list[str], bad: Sequence[str] = (), **options: int
) -> Status:
    """Commit a shard whose images are the ids `good`, or whose table is, and whose `bad` ones failed."""
    ok = good if isinstance(good, bytes) else table(good)
    count = shard.rows - len(bad)
    errors = [ImageFailure(each, each, "no") for each in bad]
    return commit_shard(store, shard, ok=ok, ok_count=count, errors=errors, input_sha256="0", seconds=1, **options)


def complete(store: Store, shards: list[Shard]) -> Manifest:
    """Do what a driver does: open or resume, commit the missing shards, finalise."""
    start(store, shards)
    for shard in pending(shards, read_statuses(store)):
        commit(store, shard)
    return finalise(store)


def written(store: Store) -> dict[str, bytes]:
    """Return every object of the output, with leftovers, except the probes of the store."""
    keys = [entry.key for entry in store.list(hidden=True) if "/probe-" not in entry.key]
    return {key: store.read(key) for key in keys}
