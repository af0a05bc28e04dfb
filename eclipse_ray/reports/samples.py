"""A few images of a purification, as they were and as they are: cheap however large the dataset is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray import ledger
from eclipse_ray.config import Config, DataConfig
from eclipse_ray.datasets.formats import FORMATS, Source, open_source, read_parts
from eclipse_ray.datasets.images import decode_required
from eclipse_ray.datasets.memory import decode_resized
from eclipse_ray.datasets.table import Span, image_bytes, read_note
from eclipse_ray.errors import EclipseError, InputError
from eclipse_ray.storage.store import Store

Pixels = NDArray[np.uint8]

SHARDS, IMAGES_OF_A_SHARD = 4, 16
"""So many shards, spread over the run, are opened, and so many images of each are compared."""


@dataclass(frozen=True)
class Sample:
    """One image (H, W, 3) before purification, after it, and, where somebody has it, clean; `label` in words."""

    id: str
    label: str
    before: Pixels
    after: Pixels
    clean: Pixels | None


@dataclass(frozen=True)
class Samples:
    """Sampled images of a run, and sentences on what could not be had."""

    images: Sequence[Sample]
    notes: Sequence[str]

    @property
    def paired(self) -> list[Sample]:
        """Those with a clean copy."""
        return [sample for sample in self.images if sample.clean is not None]


@dataclass(frozen=True)
class _Rows:
    """Rows of a shard: where its first one stands in the whole source, and the spans of the first few."""

    offset: int
    spans: list[Span]


def draw_samples(
    store: Store,
    config: Config,
    plan: ledger.Plan,
    statuses: Mapping[str, ledger.Status],
    origin: str | None,
) -> Samples:
    """Return images of at most SHARDS committed shards of the purification in `store`, with their sources.

    Clean copies are taken from `origin`, or from the dataset that the source was made from by `eclipse-ray poison`
    if that is still there. What cannot be read any more is left out and noted.
    """
    if not config.data.source:
        return Samples([], ["The settings of the run name no source, so no image can be shown as it was."])
    clean, notes = None, []
    try:
        clean = _clean_source(origin or _origin(config.data.source), config.data, plan)
    except (EclipseError, OSError) as error:
        notes.append(f"What the source was made from cannot be read any more: {error}.")
    found: list[Sample] = []
    for index in spread(len(plan.base), SHARDS):
        shard = plan.base[index]
        status = statuses.get(shard.name)
        if status is None or status.object is None:
            continue
        offset = sum(before.rows for before in plan.base[:index])
        try:
            found += _of_shard(store, config, plan.classes, status, _first_rows(shard, offset), clean)
        except (EclipseError, OSError) as error:
            notes.append(f"Images of shard {shard.name} cannot be shown: {error}.")
    if all(sample.clean is None or np.array_equal(sample.clean, sample.before) for sample in found):
        found = [replace(sample, clean=None) for sample in found]
        notes.append(
            "No clean copies of these images are known, as is usual for data from elsewhere: rows, curves and "
            "numbers that would need them are left out."
        )
    return Samples(found, notes)


def _of_shard(
    store: Store,
    config: Config,
    classes: Sequence[str] | None,
    status: ledger.Status,
    rows: _Rows,
    clean: Source | None,
) -> list[Sample]:
    base, name = _location(str(config.data.source), rows.spans[0][0])
    before = read_parts(base, name, classes, rows.spans, config.data)
    after = ledger.read_object(store, status)
    assert after is not None, "the caller looked"
    place = {id: row for row, id in enumerate(after["id"].to_pylist())}
    kept = [(row, place[id]) for row, id in enumerate(before["id"].to_pylist()) if id in place]
    purified = after.take([row for _, row in kept])
    originals = before.take([row for row, _ in kept])
    cleans = _clean_images(clean, config.data, rows, before)
    labels = originals["label"].to_pylist() if "label" in originals.column_names else [None] * len(kept)
    found = []
    for (row, _), id, label, old, new in zip(
        kept, originals["id"].to_pylist(), labels, image_bytes(originals), image_bytes(purified), strict=True
    ):
        sample = Sample(
            id=id,
            label=_class_name(label, classes),
            before=decode_resized(base, id, old, config.data),
            after=decode_required(f"{store.url}: image {id}", new, DataConfig()),
            clean=cleans[row] if cleans else None,
        )
        if sample.before.shape == sample.after.shape:
            fits = sample.clean is not None and sample.clean.shape == sample.before.shape
            found.append(sample if fits else replace(sample, clean=None))
    return found


def _clean_images(clean: Source | None, data: DataConfig, rows: _Rows, before: pa.Table) -> list[Pixels] | None:
    """Return the clean images that stand in the places of `before`, None unless their ids are the same."""
    if clean is None:
        return None
    wanted = before["id"].to_pylist()
    table = read_parts(clean.url, clean.format, clean.classes, _rows_at(clean, rows.offset, len(wanted)), data)
    if table["id"].to_pylist() != wanted:
        return None
    return [decode_resized(clean.url, i, b, data) for i, b in zip(wanted, image_bytes(table), strict=True)]


def _origin(source: str) -> str | None:
    """Return the location that `source` says it was made from, image by image; None if it says nothing."""
    store = Store(source)
    origin = None if store.is_file() else read_note(store).get("source")
    return origin if isinstance(origin, str) else None


def _clean_source(origin: str | None, data: DataConfig, plan: ledger.Plan) -> Source | None:
    opened = open_source(origin, data) if origin else None
    return opened if opened and opened.images == sum(shard.rows for shard in plan.base) else None


def _location(source: str, key: str) -> tuple[str, str]:
    """Return (folder, format) of the object `key` of a source, without listing it again."""
    name = next((name for name, each in FORMATS.items() if each.claims(key)), None)
    store = Store(source)
    if name is None:
        raise InputError(f"{store.path(key)}: of no format that can be read")
    if store.exists() and not store.is_file():
        return store.url, name
    # One file, or a pattern of file names: keys are relative to their folder.
    return store.url.rpartition("/")[0] or "/", name


def _first_rows(shard: ledger.Shard, offset: int) -> _Rows:
    spans: list[Span] = []
    left = IMAGES_OF_A_SHARD
    for span in shard.spans:
        if not left:
            break
        stop = min(span.stop, span.start + left)
        spans.append((span.key, span.start, stop))
        left -= stop - span.start
    return _Rows(offset, spans)


def _rows_at(source: Source, offset: int, count: int) -> list[Span]:
    spans: list[Span] = []
    for part in source.parts:
        start, stop = max(offset, 0), min(offset + count, part.rows)
        if start < stop:
            spans.append((part.key, start, stop))
        offset -= part.rows
    return spans


def _class_name(label: int | None, classes: Sequence[str] | None) -> str:
    if label is None or label < 0:
        return ""
    return classes[label] if classes is not None and label < len(classes) else f"class {label}"


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` places in 0 .. count - 1, the first one among them, evenly spread."""
    return sorted({index * count // wanted for index in range(wanted)}) if count else []
