"""The end of a run, which removes leftovers and writes the manifest, and `verify`, which checks a whole folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.ledger import layout
from eclipse_ray.ledger.plan import Shard, plan_digest, read_fingerprint, read_plan
from eclipse_ray.ledger.status import (
    Status,
    newest_generations,
    pending,
    read_status,
    read_statuses,
    scan_statuses,
)
from eclipse_ray.log import counted
from eclipse_ray.results import VerifyResult
from eclipse_ray.storage.store import Store

# `seconds` is left out, so that two runs that did the same work write the same manifest.
SCHEMA = layout.columns(
    "shard:string generation:int64 object:string sha256:string bytes:int64 ok:int64 failed:int64 "
    "errors_object:string errors_sha256:string input_sha256:string"
)
_FINGERPRINT = b"fingerprint"
# Rows of a data object that `verify` decodes at a time.
_BATCH = 256


@dataclass(frozen=True)
class Manifest:
    """A finished run: its fingerprint and the status of each shard, in plan order."""

    fingerprint: str
    statuses: tuple[Status, ...]

    @property
    def ok(self) -> int:
        """Number of purified images."""
        return sum(status.ok for status in self.statuses)

    @property
    def failed(self) -> int:
        """Number of images that became an error row."""
        return sum(status.failed for status in self.statuses)


def finalise(store: Store) -> Manifest:
    """Remove leftovers, then write the manifest. Calling it again changes nothing.

    Raises InputError if there is no run or a shard is missing, StorageError if a status is damaged, contradicts
    the plan or names an object that is gone.
    """
    fingerprint = read_fingerprint(store).value
    while True:
        collect(store)
        shards = read_plan(store).shards
        statuses = read_statuses(store)
        _require_complete(store, shards, statuses)
        lost = _lost(store, statuses)
        manifest = Manifest(fingerprint, tuple(statuses[shard.name] for shard in shards))
        data = layout.table_bytes(manifest_table(manifest))
        if layout.read_optional(store, layout.MANIFEST) != data:
            store.write(layout.MANIFEST, data)
        # Another driver may have retried or extended the run and written its manifest just before this one.
        settled = newest_generations(store) == {s.shard: s.generation for s in statuses.values()}
        settled = settled and len(read_plan(store).shards) == len(shards)
        if settled and not lost:
            return manifest
        store.delete(layout.MANIFEST)
        if settled:
            raise StorageError(lost[0])


def collect(store: Store, idle: bool = False) -> int:
    """Delete the leftovers of workers that died or lost a race; return the number of deleted objects.

    While other drivers may be writing, an object is deleted only if its generation of its shard is committed, so
    that no status can name it later. `idle` states that nobody is writing; then every object that no status names
    is deleted. Raises InputError if there is no run, because all files would then be leftovers. Raises
    StorageError if a status is damaged.
    """
    layout.require_run(store)
    # The listing comes before the statuses, so that an object named by a newer status is not taken for a leftover.
    entries = [*store.list(layout.DATA, hidden=True), *store.list(layout.PRIVATE, hidden=True)]
    statuses = read_statuses(store)
    named = {key for status in statuses.values() for key in (status.object, status.errors_object)}
    orphans = [e.key for e in entries if e.key not in named and _is_leftover(e.key, statuses, idle)]
    for key in orphans:
        store.delete(key)
    return len(orphans)


def manifest_table(manifest: Manifest) -> pa.Table:
    """Return the manifest as a table, one row per shard, with the fingerprint in its metadata."""
    rows = [status.model_dump(include=set(SCHEMA.names)) for status in manifest.statuses]
    schema = SCHEMA.with_metadata({_FINGERPRINT: manifest.fingerprint.encode()})
    return pa.Table.from_pylist(rows, schema=schema)


def _require_complete(store: Store, shards: Sequence[Shard], statuses: Mapping[str, Status]) -> None:
    missing = pending(shards, statuses)
    if missing:
        raise InputError(
            f"{store.url}: {len(missing)} of {len(shards)} shards are not done; run the same command again"
        )
    for shard in shards:
        for problem in _miscounted(store, shard, statuses[shard.name]):
            raise StorageError(problem)


def _lost(store: Store, statuses: Mapping[str, Status]) -> list[str]:
    """Return a sentence on each object that a status names and that is gone."""
    there = {entry.key for folder in (layout.DATA, layout.ERRORS) for entry in store.list(folder, hidden=True)}
    named = ((key, status.shard) for status in statuses.values() for key in (status.object, status.errors_object))
    return [_missing(store, key, shard) for key, shard in named if key is not None and key not in there]


def _missing(store: Store, key: str, shard: str) -> str:
    return f"{store.path(key)}: missing; {layout.redo(shard)}"


def _miscounted(store: Store, shard: Shard, status: Status) -> list[str]:
    if status.ok + status.failed == shard.rows:
        return []
    path = store.path(layout.status_key(shard.name, status.generation))
    counts = f"{status.ok} ok + {status.failed} failed, the plan {shard.rows}"
    return [f"{path}: counts {counts}; delete it and run the same command again"]


def _is_leftover(key: str, statuses: Mapping[str, Status], idle: bool) -> bool:
    # Only names that this package makes are deleted. `verify` reports all other files.
    if key.rpartition("/")[2].startswith(".tmp-"):
        return True
    if key.startswith((f"{layout.ATTEMPTS}/", layout.PROBES)):
        return idle
    match = layout.OBJECT_KEY.fullmatch(key)
    if match is None:
        return False
    status = statuses.get(match[1])
    # The generation of the object has its status, and a generation gets no second one.
    return idle or (status is not None and int(match[2] or 0) <= status.generation)


def verify(store: Store) -> VerifyResult:
    """Read and hash every object, count every id, and report each problem in one sentence.

    Raises InputError only if the store holds no run. Damage is reported, not raised.
    """
    layout.require_run(store)
    shards, fingerprint, problems = _read_claim(store)
    statuses, damaged = scan_statuses(store)
    problems += damaged
    seen: set[bytes] = set()
    images = failed = 0
    for shard in shards:
        if (status := statuses.get(shard.name)) is not None:
            problems += _miscounted(store, shard, status)
            images += _check_object(store, status.object, status.sha256, status.ok, seen, problems)
            failed += _check_object(
                store, status.errors_object, status.errors_sha256, status.failed, seen, problems
            )
    problems += _check_folder(store, shards, statuses)
    if fingerprint and not pending(shards, statuses):
        manifest = Manifest(fingerprint, tuple(statuses[shard.name] for shard in shards))
        problems += _check_manifest(store, manifest)
    planned = sum(shard.rows for shard in shards)
    return VerifyResult(not problems, planned, images, failed, problems)


def _read_claim(store: Store) -> tuple[list[Shard], str | None, list[str]]:
    plan, fingerprint = None, None
    problems: list[str] = []
    try:
        plan = read_plan(store)
    except InputError as error:
        problems.append(str(error))
    try:
        fingerprint = read_fingerprint(store)
    except InputError as error:
        problems.append(str(error))
    if plan and fingerprint and fingerprint.input != plan_digest(plan.base):
        path = store.path(layout.PLAN)
        problems.append(f"{path}: not the plan that the fingerprint names; delete it and run again")
    return plan.shards if plan else [], fingerprint.value if fingerprint else None, problems


def _check_object(
    store: Store, key: str | None, sha256: str | None, rows: int, seen: set[bytes], problems: list[str]
) -> int:
    """Check one object, append its problems to `problems`, and return its number of images."""
    if key is None:
        return 0
    try:
        ids = _read_ids(store, key, sha256)
    except StorageError as error:
        problems.append(str(error))
        return 0
    path = store.path(key)
    if len(ids) != rows:
        problems.append(f"{path}: holds {counted(len(ids), 'image')}, its status says {rows}")
    _check_ids(path, ids, seen, problems)
    return len(ids)


def _read_ids(store: Store, key: str, sha256: str | None) -> list[object]:
    """Return the ids in an object. Raises StorageError if it is missing, damaged or cannot be read."""
    shard = key.rpartition("/")[2].partition("-")[0]
    path, advice = store.path(key), layout.redo(shard)
    try:
        data = store.read(key)
    except FileNotFoundError as error:
        raise StorageError(_missing(store, key, shard)) from error
    except InputError as error:
        raise StorageError(f"{error}; then {advice}") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}; check the store, or {advice}") from error
    if layout.hash_of(data) != sha256:
        raise StorageError(f"{path}: its bytes have changed since it was written; {advice}")
    try:
        # All columns are read, so that the checksum of every page is verified.
        batches = layout.open_parquet(data).iter_batches(batch_size=_BATCH)
        return [value for batch in batches for value in batch.column("id").to_pylist()]
    except layout.DAMAGE as error:
        raise StorageError(f"{path}: not a readable table with an `id` column ({error}); {advice}") from error


def _check_ids(path: str, ids: Sequence[object], seen: set[bytes], problems: list[str]) -> None:
    nulls, doubled = 0, []
    for value in ids:
        if value is None:
            nulls += 1
            continue
        # A hash of 16 bytes per id, so that a million ids of any length fit in memory.
        short = hashlib.blake2b(str(value).encode(), digest_size=16).digest()
        if short in seen:
            doubled.append(value)
        seen.add(short)
    if nulls:
        problems.append(f"{path}: {counted(nulls, 'image')} without an id")
    if doubled:
        problems.append(f"{path}: {len(doubled)} ids occur elsewhere in the output too, such as {doubled[0]!r}")


def _check_manifest(store: Store, manifest: Manifest) -> list[str]:
    path = store.path(layout.MANIFEST)
    try:
        data = layout.read_optional(store, layout.MANIFEST)
        if data is None:
            return [f"{path}: missing; run the same command again to finish the run"]
        table = layout.read_table(data, SCHEMA)
    except InputError as error:
        return [str(error)]
    except layout.DAMAGE as error:
        return [f"{path}: damaged ({error}); run the same command again to rewrite it"]
    stored = (table.schema.metadata or {}).get(_FINGERPRINT)
    if stored != manifest.fingerprint.encode() or not table.equals(manifest_table(manifest)):
        return [f"{path}: does not agree with the statuses; run the same command again to rewrite it"]
    return []


def _check_folder(store: Store, shards: Sequence[Shard], statuses: Mapping[str, Status]) -> list[str]:
    problems = []
    missing = pending(shards, statuses)
    if missing:
        problems.append(
            f"{store.url}: {len(missing)} of {len(shards)} shards are not done, the first of them "
            f"{missing[0].name}; run the same command again"
        )
    # A folder in the place of a status is in no listing; those that are listed have been read.
    listed = newest_generations(store) if missing and store.local else None
    for shard in missing:
        if listed is not None and shard.name not in listed:
            try:
                read_status(store, shard.name, 0)
            except (InputError, StorageError) as error:
                problems.append(str(error))
    for name in sorted(statuses.keys() - {shard.name for shard in shards}):
        problems.append(f"{store.path(layout.STATUS)}/{name}: the plan has no such shard")
    named = {status.object for status in statuses.values()}
    for entry in store.list(layout.DATA):
        if entry.key not in named:
            problems.append(
                f"{store.path(entry.key)}: no status names this object; have leftovers removed with "
                f"`eclipse-ray gc --idle {store.url}`, or move it elsewhere if it is yours"
            )
    return problems
