"""Statuses, the only commit point. A shard is done when its status exists, and a status never changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.ledger import layout
from eclipse_ray.ledger.plan import Shard, read_plan
from eclipse_ray.results import StatusResult
from eclipse_ray.storage.store import Store

ERRORS_SCHEMA = layout.columns("id:string key:string error:string")
CHANGES_SCHEMA = layout.columns("id:string label:int64 key:string row:int64 psnr:float32 ssim:float32")
"""How far each image was changed; without a psnr it failed. `key` and `row` say where it lies in the source."""
# Threads that read statuses.
_READERS = 16


@dataclass(frozen=True)
class ImageFailure:
    """One image that could not be purified: its id, the key of its source object, and the reason."""

    id: str
    key: str
    error: str


class Status(BaseModel):
    """The outcome of one shard: its objects, their hashes, and the numbers of purified and failed images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str = Field(pattern="^[0-9]{6,}$")
    generation: int = Field(ge=0)
    object: str | None
    sha256: str | None
    bytes: int = Field(ge=0)
    ok: int = Field(ge=0)
    failed: int = Field(ge=0)
    errors_object: str | None
    errors_sha256: str | None
    input_sha256: str
    seconds: float = Field(ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self) -> Status:
        # Objects are opened by these names, so a forged or damaged name must not lead out of the folder.
        expected = (
            layout.object_key(layout.DATA, self.shard, self.generation, self.sha256),
            layout.object_key(layout.ERRORS, self.shard, self.generation, self.errors_sha256),
        )
        if (self.object, self.errors_object) != expected:
            raise ValueError("objects are not named by shard and hash")
        if bool(self.ok) != bool(self.object) or bool(self.failed) != bool(self.errors_object):
            raise ValueError("counts and objects contradict each other")
        return self


def commit_shard(
    store: Store,
    shard: Shard,
    *,
    ok: bytes | None,
    ok_count: int,
    errors: Sequence[ImageFailure],
    input_sha256: str,
    seconds: float,
    generation: int = 0,
) -> Status:
    """Write the objects of a shard, then its status; return the status that won, ours or that of another driver.

    `ok` is Parquet with `ok_count` rows, None if there are none. Raises ValueError if the numbers of rows do not
    add up to the plan, StorageError if the winning status is damaged.
    """
    _check_counts(shard, ok, ok_count, len(errors))
    failed = _errors_bytes(errors) if errors else None
    sha256, errors_sha256 = (layout.hash_of(data) if data else None for data in (ok, failed))
    status = Status(
        shard=shard.name,
        generation=generation,
        object=layout.object_key(layout.DATA, shard.name, generation, sha256),
        sha256=sha256,
        bytes=len(ok or b""),
        ok=ok_count,
        failed=len(errors),
        errors_object=layout.object_key(layout.ERRORS, shard.name, generation, errors_sha256),
        errors_sha256=errors_sha256,
        input_sha256=input_sha256,
        seconds=seconds,
    )
    key = layout.status_key(shard.name, generation)
    winner = layout.read_optional(store, key)
    if winner is None:
        _write_object(store, status.object, ok)
        _write_object(store, status.errors_object, failed)
        if store.create(key, status.model_dump_json().encode()):
            return status
        winner = store.read(key)
    return _parse(store, shard.name, generation, winner)


def _errors_bytes(errors: Sequence[ImageFailure]) -> bytes:
    # An error may quote a file name that is not Unicode. It is escaped, because the row must not be lost.
    rows = [
        {name: text.encode("utf-8", "backslashreplace").decode() for name, text in vars(error).items()}
        for error in errors
    ]
    return layout.table_bytes(pa.Table.from_pylist(rows, ERRORS_SCHEMA))


def read_statuses(store: Store) -> dict[str, Status]:
    """Return the newest status of each shard. Raises StorageError if one is damaged."""
    statuses, problems = scan_statuses(store)
    if problems:
        raise StorageError(problems[0])
    return statuses


def newest_generations(store: Store) -> dict[str, int]:
    """Return the highest generation of each shard that has a status, from the listing only."""
    newest: dict[str, int] = {}
    for entry in store.list(layout.STATUS):
        match = layout.STATUS_KEY.fullmatch(entry.key)
        if match:
            newest[match[1]] = max(int(match[2]), newest.get(match[1], 0))
    return newest


def scan_statuses(store: Store) -> tuple[dict[str, Status], list[str]]:
    """Return the newest status of each shard, and one sentence per unreadable status."""
    newest = newest_generations(store)
    with ThreadPoolExecutor(min(_READERS, len(newest) or 1)) as pool:
        found = list(pool.map(lambda item: _read(store, *item), newest.items()))
    statuses = {status.shard: status for status in found if isinstance(status, Status)}
    return statuses, [problem for problem in found if isinstance(problem, str)]


def read_status(store: Store, shard: str, generation: int) -> Status | None:
    """Return one status, or None if it does not exist. Raises StorageError if it is damaged."""
    data = layout.read_optional(store, layout.status_key(shard, generation))
    return None if data is None else _parse(store, shard, generation, data)


def pending(shards: Iterable[Shard], statuses: Mapping[str, Status]) -> list[Shard]:
    """Return the shards that have no status yet, in plan order."""
    return [shard for shard in shards if shard.name not in statuses]


def retriable(shards: Iterable[Shard], statuses: Mapping[str, Status]) -> list[Shard]:
    """Return the shards that are done but have failed images, in plan order."""
    return [shard for shard in shards if shard.name in statuses and statuses[shard.name].failed]


def read_object(store: Store, status: Status) -> pa.Table | None:
    """Return the purified images of a shard, None if it has none. Raises StorageError if the object is damaged."""
    if status.object is None:
        return None
    try:
        return layout.open_parquet(_unchanged(store, status.object, status.sha256)).read()
    except layout.DAMAGE as error:
        advice = layout.redo(status.shard)
        raise StorageError(f"{store.path(status.object)}: cannot be read ({error}); {advice}") from error


def read_failures(store: Store, status: Status) -> list[ImageFailure]:
    """Return the failed images of a shard with their reasons. Raises StorageError if the object is damaged."""
    if status.errors_object is None:
        return []
    try:
        data = _unchanged(store, status.errors_object, status.errors_sha256)
        rows = layout.read_table(data, ERRORS_SCHEMA).to_pylist()
    except layout.DAMAGE as error:
        path = store.path(status.errors_object)
        raise StorageError(f"{path}: cannot be read ({error}); {layout.redo(status.shard)}") from error
    return [ImageFailure(**row) for row in rows]


def _unchanged(store: Store, key: str, sha256: str | None) -> bytes:
    data = store.read(key)
    if layout.hash_of(data) != sha256:
        raise ValueError("its bytes have changed since it was written")
    return data


def write_changes(store: Store, shard: str, generation: int, table: pa.Table) -> None:
    """Write how far the images of one generation of a shard were changed, before that generation is committed.

    For reports only: no reader of images needs it, so it is not part of the commit, and a racing driver may
    write it again.
    """
    store.write(layout.changes_key(shard, generation), layout.table_bytes(table))


def read_changes(store: Store, statuses: Sequence[Status]) -> pa.Table:
    """Return the changes of the images of committed shards, with the column `shard`; failures only of the newest.

    Shards of which none are recorded are left out. Raises StorageError if some are damaged.
    """

    def of_shard(status: Status) -> list[pa.Table]:
        tables = []
        for generation in range(status.generation + 1):
            key = layout.changes_key(status.shard, generation)
            data = layout.read_optional(store, key)
            if data is None:
                return []
            try:
                table = layout.read_table(data, CHANGES_SCHEMA)
            except layout.DAMAGE as error:
                raise StorageError(f"{store.path(key)}: cannot be read ({error}); delete it") from error
            # An image that failed was tried again in the next generation.
            tables.append(table if generation == status.generation else table.filter(table["psnr"].is_valid()))
        found = pa.concat_tables(tables)
        return [found.append_column("shard", pa.array([status.shard] * len(found), pa.string()))]

    with ThreadPoolExecutor(_READERS) as pool:
        found = [table for tables in pool.map(of_shard, statuses) for table in tables]
    empty = CHANGES_SCHEMA.append(pa.field("shard", pa.string())).empty_table()
    return pa.concat_tables([empty, *found])


def summarise(store: Store) -> StatusResult:
    """Return the progress of the run in `store`. Raises InputError if there is no run or no plan yet."""
    shards = read_plan(store).shards
    statuses = read_statuses(store)
    done = [statuses[shard.name] for shard in shards if shard.name in statuses]
    return StatusResult(
        planned=sum(shard.rows for shard in shards),
        ok=sum(status.ok for status in done),
        failed=sum(status.failed for status in done),
        shards=len(shards),
        shards_done=len(done),
    )


def _check_counts(shard: Shard, ok: bytes | None, ok_count: int, failed: int) -> None:
    if ok_count < 0 or ok_count + failed != shard.rows:
        raise ValueError(f"shard {shard.name}: {ok_count} ok + {failed} failed != {shard.rows} planned")
    rows = layout.open_parquet(ok).metadata.num_rows if ok else 0
    if rows != ok_count or (ok is not None and not rows):
        raise ValueError(f"shard {shard.name}: {rows} rows of Parquet, but {ok_count} images are ok")


def _write_object(store: Store, key: str | None, data: bytes | None) -> None:
    if key is None or data is None or store.create(key, data):
        return
    # The object was left by a driver that died or lost the race. It is rewritten only if it was damaged since.
    if layout.read_optional(store, key) != data:
        store.write(key, data)


def _read(store: Store, shard: str, generation: int) -> Status | str:
    key = layout.status_key(shard, generation)
    try:
        return _parse(store, shard, generation, store.read(key))
    except (InputError, StorageError) as error:
        return str(error)
    except OSError as error:
        return f"{store.path(key)}: cannot be read: {error}; check the store, and run this command again"


def _parse(store: Store, shard: str, generation: int, data: bytes) -> Status:
    with suppress(ValidationError):
        status = Status.model_validate_json(data)
        if (status.shard, status.generation) == (shard, generation):
            return status
    path = store.path(layout.status_key(shard, generation))
    raise StorageError(f"{path}: damaged; delete this file and run the same command again to redo the shard")
