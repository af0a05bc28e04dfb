"""The plan of a run, which says which rows each shard holds, and the claim of the run on its output folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml
from pydantic import ValidationError

from eclipse_ray import __version__
from eclipse_ray.config import Config, difference, digest, recorded_config
from eclipse_ray.datasets.table import Part
from eclipse_ray.errors import InputError, ResumeError
from eclipse_ray.ledger import layout
from eclipse_ray.log import counted
from eclipse_ray.storage.store import Store

SCHEMA = layout.columns("shard:string key:string start:int64 stop:int64 size:int64 version:string")
_NOTE = b"eclipse_ray"
_NOTE_KEYS = {"shard_images", "classes"}
# Most changed source objects that an error message lists.
_EXAMPLES = 5


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of the source object `key`, with the object's size and version."""

    key: str
    start: int
    stop: int
    size: int
    version: str

    def row(self) -> tuple[str, int, int, int, str]:
        """Return the fields in order; dataclasses.astuple would copy deeply, which is slow on large plans."""
        return self.key, self.start, self.stop, self.size, self.version


@dataclass(frozen=True)
class Shard:
    """The unit of work, retry, resume and commit."""

    name: str
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """Number of images in the shard."""
        return sum(span.stop - span.start for span in self.spans)


@dataclass(frozen=True)
class Plan:
    """The work of a run: the shards of the first plan, and those of each later extension.

    `shard_images` is the largest number of images per shard, and `classes` are the class names that labels index.
    Both are stored so that an extension is cut and labelled in the same way.
    """

    base: tuple[Shard, ...]
    shard_images: int
    classes: tuple[str, ...] | None = None
    later: tuple[tuple[Shard, ...], ...] = ()

    @property
    def shards(self) -> list[Shard]:
        """All shards, in plan order."""
        return [*self.base, *itertools.chain.from_iterable(self.later)]


def plan_shards(parts: Sequence[Part], shard_images: int, first: int = 0) -> list[Shard]:
    """Cut `parts`, in their order, into shards of at most `shard_images` rows, numbered from `first`.

    Raises InputError if two parts have the same key.
    """
    if shard_images < 1:
        raise ValueError(f"shard_images must be at least 1, got {shard_images}")
    _check_keys(parts)
    return [Shard(f"{index:06d}", spans) for index, spans in enumerate(_groups(parts, shard_images), first)]


def plan_source(
    store: Store, parts: Sequence[Part], shard_images: int, classes: Sequence[str] | None, extend: bool = False
) -> Plan:
    """Return the plan for a listed source: a new one, or the source cut in the same way as the plan in `store`.

    With `extend`, new objects of the source become an extension of the plan. Raises InputError as `plan_shards`
    does and for a damaged plan. Raises ResumeError if the source has new objects and `extend` is not set, or if
    they have other classes than the plan.
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
        # In the order of the listing. A stored plan that was cut in another way then differs and is refused.
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
    """Return 16 hex digits that identify the plan and so the input."""
    return digest([digest([shard.name, *(span.row() for span in shard.spans)]) for shard in shards])


def plan_bytes(shards: Sequence[Shard], shard_images: int, classes: Sequence[str] | None = None) -> bytes:
    """Return the plan as Parquet, one row per span; everything else is metadata."""
    rows = [(shard.name, *span.row()) for shard in shards for span in shard.spans]
    columns = zip(*rows, strict=True) if rows else ([] for _ in SCHEMA.names)
    note = {"shard_images": shard_images, "classes": classes and list(classes), "made_by": __version__}
    schema = SCHEMA.with_metadata({_NOTE: json.dumps(note).encode()})
    return layout.table_bytes(
        pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=schema)
    )


def read_plan(store: Store) -> Plan:
    """Return the plan of the run in `store`. Raises InputError if the plan is missing or damaged."""
    plan = read_plan_if_any(store)
    if plan is None:
        layout.require_run(store)
        raise InputError(f"{store.url}: the run stopped before it was planned; run the same command again")
    return plan


def read_plan_if_any(store: Store) -> Plan | None:
    """Return the plan in `store`, or None if there is none yet. Raises InputError if the plan is damaged."""
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
    found = f"the source has {counted(len(fresh), 'object')} that the plan lacks, such as {min(fresh)}"
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


def _check_keys(parts: Sequence[Part]) -> None:
    seen: set[str] = set()
    for part in parts:
        if part.key in seen:
            raise InputError(f"{part.key}: the source lists this name twice; rename or remove one of the two")
        seen.add(part.key)


def _groups(parts: Sequence[Part], shard_images: int) -> Iterator[tuple[Span, ...]]:
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


def _span(part: Part, start: int, stop: int) -> Span:
    return Span(part.key, start, stop, part.size, part.version)


@dataclass(frozen=True)
class Fingerprint:
    """All that decides the output pixels: settings, weights, input (see `plan_digest`), engine version."""

    config: dict[str, Any]
    weights: str
    input: str
    engine_version: int

    @property
    def value(self) -> str:
        """Hash over all fields, 16 hex digits."""
        return digest(self._tree())

    def to_json(self) -> str:
        """Return the fingerprint as JSON, which `read_fingerprint` reads back."""
        return json.dumps({**self._tree(), "value": self.value}, indent=2, sort_keys=True) + "\n"

    def differences(self, other: Fingerprint) -> list[str]:
        """Return one line "a.b: old -> new" per setting in which `other` differs from this fingerprint."""
        old, new = self._tree(), other._tree()
        return [*difference(old.pop("config"), new.pop("config")), *difference(old, new)]

    def _tree(self) -> dict[str, Any]:
        # Converted to JSON and back, because a tuple becomes a list in JSON and must not count as a difference.
        loaded: dict[str, Any] = json.loads(json.dumps(vars(self)))
        return loaded


def open_run(store: Store, plan: Plan, fingerprint: Fingerprint, config_yaml: str) -> None:
    """Claim the output folder for a plan, or resume the run that owns it. Raises what `claim` raises.

    Also raises ResumeError if an extension of the stored plan differs from that of `plan`.
    """
    if fingerprint.input != plan_digest(plan.base):
        raise ValueError("fingerprint.input must be plan_digest(plan.base)")
    claim(store, fingerprint, config_yaml, plan.shards)
    if not store.exists(layout.PLAN):
        store.create(layout.PLAN, plan_bytes(plan.base, plan.shard_images, plan.classes))
    for number, piece in enumerate(plan.later, 1):
        key = layout.extension_key(number)
        if piece and not store.exists(key):
            # The manifest is deleted before the plan grows, so that no reader believes the folder is finished.
            store.delete(layout.MANIFEST)
            store.create(key, plan_bytes(piece, plan.shard_images, plan.classes))
    if plan.later and read_plan(store).later != plan.later:
        raise ResumeError(
            f"{store.url}: the source no longer holds what was planned; undo the changes below to resume it, or "
            "choose another output:\n" + "\n".join(f"  {line}" for line in _input_changes(store, plan.shards))
        )


def claim(store: Store, fingerprint: Fingerprint, config_yaml: str, shards: Sequence[Shard] = ()) -> None:
    """Claim the folder for this run, unless it is this run's already.

    Raises ResumeError if the folder holds other data or belongs to a run with another fingerprint (the message
    names the source objects in which `shards` differ). Raises InputError if it is a file or its fingerprint is
    damaged, and StorageError if the store does not support put-if-absent.
    """
    if not check_claim(store, fingerprint, shards):
        store.probe()
        if not store.create(layout.FINGERPRINT, fingerprint.to_json().encode()):
            check_claim(store, fingerprint, shards)
    if not store.exists(layout.CONFIG):
        store.create(layout.CONFIG, config_yaml.encode())


def check_claim(store: Store, fingerprint: Fingerprint, shards: Sequence[Shard] = ()) -> bool:
    """Return whether this run owns the folder, False if nobody does. Raises what `claim` raises."""
    if store.is_file():
        raise InputError(f"{store.url}: this is a file; choose a folder as output")
    found = layout.read_optional(store, layout.FINGERPRINT)
    if found is None:
        _refuse_foreign(store)
        return False
    _refuse_difference(store, _parse(store, found), fingerprint, shards)
    return True


def read_fingerprint(store: Store) -> Fingerprint:
    """Return the fingerprint of the run in `store`. Raises InputError if it is missing or damaged."""
    data = layout.read_optional(store, layout.FINGERPRINT)
    if data is None:
        raise InputError(f"{store.path(layout.FINGERPRINT)}: missing; the folder does not say what made it")
    return _parse(store, data)


def recorded_settings(store: Store) -> Config | None:
    """Return the settings of the finished run in the folder, or None if there is no finished run.

    Raises InputError if they are missing, and as `read_settings` does.
    """
    if store.is_file() or not store.exists(layout.MANIFEST):
        return None
    found = read_settings(store)
    if found is None:
        raise InputError(f"{store.path(layout.CONFIG)}: missing; run the command of purify again to write it")
    return found


def read_settings(store: Store, key: str = layout.CONFIG) -> Config | None:
    """Return the settings of the run in `store`, None if none are recorded.

    Settings that this version no longer has are left out. Raises InputError for a value that it does not know.
    """
    text = layout.read_optional(store, key)
    if text is None:
        return None
    try:
        return recorded_config(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{store.path(key)}: not settings of this version ({reason})") from error


def _parse(store: Store, data: bytes) -> Fingerprint:
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        tree = json.loads(data)
        value = tree.pop("value")
        fingerprint = Fingerprint(**tree)
        if fingerprint.value == value and isinstance(fingerprint.config, dict):
            return fingerprint
    raise InputError(f"{store.path(layout.FINGERPRINT)}: damaged; restore it from a copy or choose another output")


def _refuse_foreign(store: Store) -> None:
    found = [*store.list(), *(e for e in store.list(layout.PRIVATE) if not e.key.startswith(layout.PROBES))]
    # A run that claimed the folder during the listing is not foreign. Its fingerprint is compared next.
    if found and layout.read_optional(store, layout.FINGERPRINT) is None:
        raise ResumeError(
            f"{store.url}: holds data that this command did not write ({found[0].key} and "
            f"{len(found) - 1} more objects); choose an empty folder as output"
        )


def _refuse_difference(store: Store, old: Fingerprint, new: Fingerprint, shards: Sequence[Shard]) -> None:
    lines = old.differences(new)
    if not lines:
        return
    if old.input != new.input:
        lines += _input_changes(store, shards)
    raise ResumeError(
        f"{store.url}: belongs to a run with other settings, weights or input; undo the changes below to "
        "resume it, or choose another output:\n" + "\n".join(f"  {line}" for line in lines)
    )


def _input_changes(store: Store, shards: Sequence[Shard]) -> list[str]:
    try:
        old, new = _objects(read_plan(store).shards), _objects(shards)
    except InputError:
        return []
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [f"input {key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in changed[:_EXAMPLES]]
    more = len(changed) - len(lines)
    return [*lines, f"and {more} more source objects"] if more > 0 else lines


def _objects(shards: Sequence[Shard]) -> dict[str, str]:
    rows: dict[str, int] = {}
    text: dict[str, str] = {}
    for shard in shards:
        for span in shard.spans:
            rows[span.key] = rows.get(span.key, 0) + span.stop - span.start
            text[span.key] = f"{rows[span.key]} rows in {span.size} bytes, version {span.version}"
    return text
