"""The plan: which rows of which source objects make up each shard."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from eclipse_ray import __version__
from eclipse_ray.config import digest
from eclipse_ray.errors import InputError, ResumeError
from eclipse_ray.ledger import layout
from eclipse_ray.storage.store import Store

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
_NOTE = b"eclipse_ray"
_NOTE_KEYS = {"shard_images", "classes"}


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


@dataclass(frozen=True)
class Plan:
    """What a run has to do: the shards it began with, and those of each later extension.

    `shard_images` is the size at which they were cut and `classes` what their labels count through, so that
    an extension of the source is cut and labelled alike.
    """

    base: tuple[Shard, ...]
    shard_images: int
    classes: tuple[str, ...] | None = None
    later: tuple[tuple[Shard, ...], ...] = ()

    @property
    def shards(self) -> list[Shard]:
        """All shards, in order."""
        return [*self.base, *itertools.chain.from_iterable(self.later)]


def plan_shards(parts: Sequence[PartLike], shard_images: int, first: int = 0) -> list[Shard]:
    """Cut `parts`, in their order, into shards of at most `shard_images` rows, numbered from `first`.

    Raises InputError if two parts have one key, or a key is not valid Unicode.
    """
    if shard_images < 1:
        raise ValueError(f"shard_images must be at least 1, got {shard_images}")
    _check_keys(parts)
    return [Shard(f"{index:06d}", spans) for index, spans in enumerate(_groups(parts, shard_images), first)]


def plan_source(
    store: Store, parts: Sequence[PartLike], shard_images: int, classes: Sequence[str] | None, extend: bool = False
) -> Plan:
    """Return the plan for a listed source: new, or cut as the plan in `store` was, which it may extend.

    Raises InputError as `plan_shards` does and for a damaged plan, ResumeError if the source has objects that
    the stored plan lacks, unless `extend`, or other classes than it.
    """
    stored = read_plan_if_any(store)
    if stored is None:
        names = None if classes is None else tuple(classes)
        return Plan(tuple(plan_shards(parts, shard_images)), shard_images, names)
    _check_keys(parts)
    fresh = {part.key: part for part in parts}
    pieces: list[tuple[Shard, ...]] = []
    count = 0
    for piece in (stored.base, *stored.later):
        keys = {span.key for shard in piece for span in shard.spans}
        # In the order of the listing: a stored plan that was cut otherwise then differs, and is refused.
        kept = [part for part in parts if part.key in keys]
        for part in kept:
            fresh.pop(part.key, None)
        pieces.append(tuple(plan_shards(kept, stored.shard_images, count)))
        count += len(piece)
    if fresh:
        _refuse_growth(store, stored, list(fresh), classes, extend)
        pieces.append(tuple(plan_shards(list(fresh.values()), stored.shard_images, count)))
    return Plan(pieces[0], stored.shard_images, stored.classes, tuple(pieces[1:]))


def plan_digest(shards: Sequence[Shard]) -> str:
    """Return 16 hex digits that identify the plan, and with it the input."""
    return digest([digest([shard.name, *(span.row() for span in shard.spans)]) for shard in shards])


def plan_bytes(shards: Sequence[Shard], shard_images: int, classes: Sequence[str] | None = None) -> bytes:
    """Return the plan as Parquet, one row a span; the rest is metadata."""
    rows = [(shard.name, *span.row()) for shard in shards for span in shard.spans]
    columns = zip(*rows, strict=True) if rows else ([] for _ in SCHEMA.names)
    made = {"shard_images": shard_images, "classes": classes and list(classes), "made_by": __version__}
    note = json.dumps(made)
    schema = SCHEMA.with_metadata({_NOTE: note.encode()})
    return layout.table_bytes(
        pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=schema)
    )


def read_plan(store: Store) -> Plan:
    """Return the plan of the run in `store`. Raises InputError if it has none or a damaged one."""
    plan = read_plan_if_any(store)
    if plan is None:
        layout.require_run(store)
        raise InputError(f"{store.url}: the run stopped before it was planned; run the same command again")
    return plan


def read_plan_if_any(store: Store) -> Plan | None:
    """Return the plan in `store`, None if there is none yet. Raises InputError if it is damaged."""
    base = _read_piece(store, layout.PLAN)
    if base is None:
        return None
    shards, note = base
    later: list[tuple[Shard, ...]] = []
    while (piece := _read_piece(store, layout.extension_key(len(later) + 1))) is not None:
        later.append(piece[0])
    classes = note["classes"]
    return Plan(shards, note["shard_images"], classes and tuple(classes), tuple(later))


def _read_piece(store: Store, key: str) -> tuple[tuple[Shard, ...], dict[str, Any]] | None:
    data = layout.read_optional(store, key)
    if data is None:
        return None
    try:
        table = layout.open_parquet(data).read()
        note = json.loads((table.schema.metadata or {}).get(_NOTE, b"{}"))
        if not table.schema.equals(SCHEMA, check_metadata=False) or not note.keys() >= _NOTE_KEYS:
            raise InputError(_other_version(store, key, note))
        rows = zip(*table.to_pydict().values(), strict=True)
        shards = tuple(
            Shard(name, tuple(Span(*row[1:]) for row in group))
            for name, group in itertools.groupby(rows, key=lambda row: row[0])
        )
        return shards, {"shard_images": int(note["shard_images"]), "classes": note["classes"]}
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{store.path(key)}: damaged ({error}); delete it and run the same command again"
        ) from error


def _other_version(store: Store, key: str, note: dict[str, Any]) -> str:
    made_by = f"eclipse_ray {note['made_by']}" if "made_by" in note else "an eclipse_ray older than 0.1.0"
    return (
        f"{store.path(key)}: made by {made_by}, whose plans eclipse_ray {__version__} cannot read; its images "
        f"stay readable ({store.path('data')}/*.parquet), but to resume or verify it use that version, or "
        "purify into another folder"
    )


def _refuse_growth(
    store: Store, stored: Plan, fresh: list[str], classes: Sequence[str] | None, extend: bool
) -> None:
    found = f"the source has {len(fresh)} objects that the plan lacks, such as {min(fresh)}"
    if not extend:
        raise ResumeError(
            f"{store.url}: {found}; add --extend to purify them too, or take them out of the source to resume"
        )
    if stored.classes != (None if classes is None else tuple(classes)):
        raise ResumeError(
            f"{store.url}: {found}, and its classes are now {', '.join(classes or ['not named'])}, not "
            f"{', '.join(stored.classes or ['not named'])}: labels would change their meaning; purify the "
            "new objects into an output of their own"
        )


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
