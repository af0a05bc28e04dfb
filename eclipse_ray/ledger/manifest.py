"""The end of a run: what no status names is removed, then the manifest is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.ledger import layout
from eclipse_ray.ledger.plan import Shard, read_plan
from eclipse_ray.ledger.run import read_fingerprint
from eclipse_ray.ledger.status import Status, newest_generations, pending, read_statuses
from eclipse_ray.storage.store import Entry, Store

# Without `seconds`: two runs that did the same work write the same manifest.
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("generation", pa.int64()),
        ("object", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("ok", pa.int64()),
        ("failed", pa.int64()),
        ("errors_object", pa.string()),
        ("errors_sha256", pa.string()),
        ("input_sha256", pa.string()),
    ]
)
_FINGERPRINT = b"fingerprint"


@dataclass(frozen=True)
class Manifest:
    """A finished run: its fingerprint and every shard's status, in plan order."""

    fingerprint: str
    statuses: tuple[Status, ...]

    @property
    def ok(self) -> int:
        """Purified images."""
        return sum(status.ok for status in self.statuses)

    @property
    def failed(self) -> int:
        """Images that became an error row."""
        return sum(status.failed for status in self.statuses)


def finalise(store: Store) -> Manifest:
    """Remove what no status names, then write the manifest; calling it again changes nothing.

    Raises InputError if there is no run or shards are missing, StorageError if a status is damaged or
    contradicts the plan.
    """
    fingerprint = read_fingerprint(store).value
    while True:
        collect(store)
        shards = read_plan(store).shards
        statuses = read_statuses(store)
        _require_complete(store, shards, statuses)
        manifest = Manifest(fingerprint, tuple(statuses[shard.name] for shard in shards))
        data = layout.table_bytes(manifest_table(manifest))
        if layout.read_optional(store, layout.MANIFEST) != data:
            store.write(layout.MANIFEST, data)
        # Another driver may have retried or extended the run and written its manifest just before this one's.
        settled = newest_generations(store) == {s.shard: s.generation for s in statuses.values()}
        if settled and len(read_plan(store).shards) == len(shards):
            return manifest
        store.delete(layout.MANIFEST)


def collect(store: Store, idle: bool = False) -> int:
    """Delete leftovers of workers that died or lost a race; return how many objects that were.

    While others may be writing, only objects go that can never be named any more, because their generation of
    their shard is committed. `idle` says that nobody is writing: then whatever no status names goes. Raises
    InputError where there is no run, whose files would all be leftovers, and StorageError if a status is damaged.
    """
    layout.require_run(store)
    # Listed before the statuses are read: an object that a status names by now is never taken for an orphan.
    entries = [*store.list(layout.DATA, hidden=True), *store.list(layout.PRIVATE, hidden=True)]
    statuses = read_statuses(store)
    removed = 0
    for key in _orphans(entries, statuses, idle):
        store.delete(key)
        removed += 1
    return removed


def manifest_table(manifest: Manifest) -> pa.Table:
    """Return the manifest as a table, one row a shard, the fingerprint in its metadata."""
    rows = [status.model_dump(include=set(SCHEMA.names)) for status in manifest.statuses]
    schema = SCHEMA.with_metadata({_FINGERPRINT: manifest.fingerprint.encode()})
    return pa.Table.from_pylist(rows, schema=schema)


def manifest_problem(store: Store, manifest: Manifest) -> str | None:
    """Return what is wrong with the stored manifest, given what it should say, or None."""
    path = store.path(layout.MANIFEST)
    data = layout.read_optional(store, layout.MANIFEST)
    if data is None:
        return f"{path}: missing; run the same command again to finish the run"
    try:
        table = layout.read_table(data, SCHEMA)
    except layout.DAMAGE as error:
        return f"{path}: damaged ({error}); run the same command again to rewrite it"
    stored = (table.schema.metadata or {}).get(_FINGERPRINT)
    if stored != manifest.fingerprint.encode() or not table.equals(manifest_table(manifest)):
        return f"{path}: does not agree with the statuses; run the same command again to rewrite it"
    return None


def _require_complete(store: Store, shards: Sequence[Shard], statuses: Mapping[str, Status]) -> None:
    missing = pending(shards, statuses)
    if missing:
        raise InputError(
            f"{store.url}: {len(missing)} of {len(shards)} shards are not done; run the same command again"
        )
    for shard in shards:
        status = statuses[shard.name]
        if status.ok + status.failed != shard.rows:
            raise StorageError(
                f"{store.path(layout.status_key(shard.name, status.generation))}: counts {status.ok} ok + "
                f"{status.failed} failed, the plan {shard.rows}; delete it and run the same command again"
            )


def _orphans(entries: Sequence[Entry], statuses: Mapping[str, Status], idle: bool) -> list[str]:
    named = {key for status in statuses.values() for key in (status.object, status.errors_object)}
    return [entry.key for entry in entries if entry.key not in named and _is_leftover(entry.key, statuses, idle)]


def _is_leftover(key: str, statuses: Mapping[str, Status], idle: bool) -> bool:
    # Only names of our own making: what somebody else put here is for verify to report, not ours to delete.
    if key.rpartition("/")[2].startswith(".tmp-"):
        return True
    if key.startswith((f"{layout.ATTEMPTS}/", layout.PROBES)):
        return idle
    match = layout.OBJECT_KEY.fullmatch(key)
    if match is None:
        return False
    status = statuses.get(match[1])
    # Its generation has a status, and there is never another one.
    return idle or (status is not None and int(match[2] or 0) <= status.generation)
