"""The plan: which rows of which source objects make up each shard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from eclipse_ray.config import digest
from eclipse_ray.data.store import Store
from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout

SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("size", pa.int64()),
        ("version", pa.string()),
    ]
)


class PartLike(Protocol):
    """A source object: an image file (one row) or a table (many rows)."""

    @property
    def key(self) -> str:
        """Name within the source."""

    @property
    def rows(self) -> int:
        """How many images it holds."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def version(self) -> str:
        """What changes when its content does."""


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of the source object `key`, with the object's size and version."""

    key: str
    start: int
    stop: int
    size: int
    version: str

    def row(self) -> tuple[str, int, int, int, str]:
        """Return the fields in order; dataclasses.astuple copies deeply: seconds on a large plan."""
        return self.key, self.start, self.stop, self.size, self.version


@dataclass(frozen=True)
class Shard:
    """The unit of work, retry, resume and commit."""

    name: str
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """How many images the shard holds."""
        return sum(span.stop - span.start for span in self.spans)


def plan_shards(parts: Sequence[PartLike], shard_images: int) -> list[Shard]:
    """Cut `parts`, in their order, into shards of at most `shard_images` rows.

    Raises InputError if two parts have one key, or a key is not valid Unicode.
    """
    if shard_images < 1:
        raise ValueError(f"shard_images must be at least 1, got {shard_images}")
    _check_keys(parts)
    return [Shard(f"{index:06d}", spans) for index, spans in enumerate(_groups(parts, shard_images))]


def plan_digest(shards: Sequence[Shard]) -> str:
    """Return 16 hex digits that identify the plan, and with it the input."""
    return digest([digest([shard.name, *(span.row() for span in shard.spans)]) for shard in shards])


def plan_bytes(shards: Sequence[Shard]) -> bytes:
    """Return the plan as Parquet, one row a span."""
    rows = [(shard.name, *span.row()) for shard in shards for span in shard.spans]
    columns = zip(*rows, strict=True) if rows else ([] for _ in SCHEMA.names)
    return layout.table_bytes(
        pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)
    )


def read_plan(store: Store) -> list[Shard]:
    """Return the shards of the run in `store`. Raises InputError if it has no plan or a damaged one."""
    data = layout.read_optional(store, layout.PLAN)
    if data is None:
        layout.require_run(store)
        raise InputError(f"{store.url}: the run stopped before it was planned; run the same command again")
    try:
        rows = zip(*layout.read_table(data, SCHEMA).to_pydict().values(), strict=True)
        return [
            Shard(name, tuple(Span(*row[1:]) for row in group))
            for name, group in itertools.groupby(rows, key=lambda row: row[0])
        ]
    except layout.DAMAGE as error:
        raise InputError(
            f"{store.path(layout.PLAN)}: damaged ({error}); delete it and run the same command again"
        ) from error


def _check_keys(parts: Sequence[PartLike]) -> None:
    seen: set[str] = set()
    for part in parts:
        if part.key in seen:
            raise InputError(f"{part.key}: the source lists this name twice; rename or remove one of the two")
        seen.add(part.key)
        try:
            part.key.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{part.key!a}: the name is not valid Unicode; rename the file") from error


def _groups(parts: Sequence[PartLike], shard_images: int) -> Iterator[tuple[Span, ...]]:
    singles: list[Span] = []
    for part in parts:
        if part.rows == 1:
            singles.append(_span(part, 0, 1))
        if singles and (part.rows > 1 or len(singles) == shard_images):
            yield tuple(singles)
            singles = []
        if part.rows > 1:
            for start in range(0, part.rows, shard_images):
                yield (_span(part, start, min(start + shard_images, part.rows)),)
    if singles:
        yield tuple(singles)


def _span(part: PartLike, start: int, stop: int) -> Span:
    return Span(part.key, start, stop, part.size, part.version)
