"""An audit of an output folder from its bytes: every planned image exactly once, nothing changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.ledger import layout
from eclipse_ray.ledger.manifest import Manifest, manifest_problem
from eclipse_ray.ledger.plan import Plan, Shard, plan_digest, read_plan
from eclipse_ray.ledger.run import read_fingerprint
from eclipse_ray.ledger.status import Status, pending, scan_statuses
from eclipse_ray.results import VerifyResult
from eclipse_ray.storage.store import Store

_BATCH = 256


def verify(store: Store) -> VerifyResult:
    """Re-read and hash every object, count every id, and say what is wrong, one sentence each.

    Raises InputError only if the store holds no run; damage of any kind is reported, not raised.
    """
    layout.require_run(store)
    shards, fingerprint, problems = _read_claim(store)
    statuses, damaged = scan_statuses(store)
    problems += damaged
    seen: set[bytes] = set()
    images = failed = 0
    for shard in shards:
        if shard.name in statuses:
            good, bad = _check_shard(store, shard, statuses[shard.name], seen, problems)
            images, failed = images + good, failed + bad
    problems += _check_folder(store, shards, statuses)
    if fingerprint and not pending(shards, statuses):
        manifest = Manifest(fingerprint, tuple(statuses[shard.name] for shard in shards))
        problem = manifest_problem(store, manifest)
        problems += [problem] if problem else []
    planned = sum(shard.rows for shard in shards)
    return VerifyResult(not problems, planned, images, failed, problems)


def _read_claim(store: Store) -> tuple[list[Shard], str | None, list[str]]:
    plan: Plan | None = None
    problems: list[str] = []
    try:
        plan = read_plan(store)
    except InputError as error:
        problems.append(str(error))
    try:
        fingerprint = read_fingerprint(store)
    except InputError as error:
        return plan.shards if plan else [], None, [*problems, str(error)]
    if plan and fingerprint.input != plan_digest(plan.base):
        path = store.path(layout.PLAN)
        problems.append(f"{path}: not the plan that the fingerprint names; delete it and run again")
    return plan.shards if plan else [], fingerprint.value, problems


def _check_shard(
    store: Store, shard: Shard, status: Status, seen: set[bytes], problems: list[str]
) -> tuple[int, int]:
    if status.ok + status.failed != shard.rows:
        problems.append(
            f"{store.path(layout.status_key(shard.name, status.generation))}: counts {status.ok} ok + "
            f"{status.failed} failed, but {shard.rows} images were planned"
        )
    good = _check_object(store, status.object, status.sha256, status.ok, seen, problems)
    bad = _check_object(store, status.errors_object, status.errors_sha256, status.failed, seen, problems)
    return good, bad


def _check_object(
    store: Store,
    key: str | None,
    sha256: str | None,
    rows: int,
    seen: set[bytes],
    problems: list[str],
) -> int:
    """Check one object, append what is wrong with it to `problems`, and return its number of images."""
    if key is None:
        return 0
    path = store.path(key)
    try:
        data = store.read(key)
    except FileNotFoundError:
        problems.append(f"{path}: missing; {_redo(key)}")
        return 0
    except (OSError, StorageError) as error:
        problems.append(f"{path}: cannot be read: {error}")
        return 0
    if layout.hash_of(data) != sha256:
        problems.append(f"{path}: its bytes have changed since it was written; {_redo(key)}")
        return 0
    try:
        ids = _read_ids(data)
    except layout.DAMAGE as error:
        problems.append(f"{path}: not a readable table with an `id` column ({error}); {_redo(key)}")
        return 0
    if len(ids) != rows:
        problems.append(f"{path}: holds {len(ids)} images, its status says {rows}")
    _check_ids(path, ids, seen, problems)
    return len(ids)


def _redo(key: str) -> str:
    shard = key.rpartition("/")[2].partition("-")[0]
    return f"delete {layout.STATUS}/{shard} and run the same command again to redo the shard"


def _read_ids(data: bytes) -> list[object]:
    ids: list[object] = []
    # All columns, so that the checksum of every page is checked.
    for batch in layout.open_parquet(data).iter_batches(batch_size=_BATCH):
        ids += batch.column("id").to_pylist()
    return ids


def _check_ids(path: str, ids: Sequence[object], seen: set[bytes], problems: list[str]) -> None:
    nulls, doubled = 0, []
    for value in ids:
        if value is None:
            nulls += 1
            continue
        # 16 bytes an id, whatever its length, so that a million ids fit in memory.
        short = hashlib.blake2b(str(value).encode(), digest_size=16).digest()
        if short in seen:
            doubled.append(value)
        seen.add(short)
    if nulls:
        problems.append(f"{path}: {nulls} images have no id")
    if doubled:
        problems.append(f"{path}: {len(doubled)} ids occur elsewhere in the output too, such as {doubled[0]!r}")


def _check_folder(store: Store, shards: Sequence[Shard], statuses: Mapping[str, Status]) -> list[str]:
    problems = []
    missing = pending(shards, statuses)
    if missing:
        problems.append(
            f"{store.url}: {len(missing)} of {len(shards)} shards are not done, the first of them "
            f"{missing[0].name}; run the same command again"
        )
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
