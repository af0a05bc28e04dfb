"""Decoded images in memory: a whole dataset, or a stratified sample of one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, content_hash
from eclipse_ray.datasets.formats import (
    Source,
    chunk_spans,
    likely_labels,
    open_source,
    read_labels,
    read_parts,
    read_tables,
)
from eclipse_ray.datasets.images import centre_crop, decode_required, resize_image
from eclipse_ray.datasets.table import Part, Span, image_bytes, labels_or_none, refuse_repeated
from eclipse_ray.errors import InputError
from eclipse_ray.log import counted, say_once

# Largest number of images and of stored bytes in one chunk.
CHUNK_IMAGES, CHUNK_BYTES = 1024, 64 * 2**20
# Rows that are read per image of the sample. More rows meet more classes; the cost is the same for any dataset.
CANDIDATES = 20
# Most classes that are named in a line.
_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class ImageSet:
    """Decoded images: ids (N), images uint8 (N, H, W, 3), labels int64 (N) or None, class names or None.

    `stored` (N) are content hashes of the images as they are stored, before data.resize, 32 hex digits each.
    """

    ids: list[str]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: Sequence[str] | None
    stored: list[str]

    def hashes(self) -> list[str]:
        """Return the content hash of every image as it is stored, whatever its size in memory."""
        return self.stored

    def take(self, places: Sequence[int] | NDArray[np.int64]) -> ImageSet:
        """Return the images at `places`, in that order."""
        return ImageSet(
            [self.ids[place] for place in places],
            self.images[places],
            None if self.labels is None else self.labels[places],
            self.classes,
            [self.stored[place] for place in places],
        )


def require_classes(
    url: str, source: Source, least: int = 1, *, partly: bool = False, show: bool = True
) -> NDArray[np.int64]:
    """Say (if `show`) which classes the dataset at `url` has, and return its labels (N), before any image is read.

    Raises InputError for fewer than `least` classes, a label that no class has, and a missing label: all of them,
    or one unless `partly`.
    """
    labels = read_labels(source)
    if labels is None or not (labels >= 0).any():
        likely = likely_labels(source) or "NAME"
        raise InputError(
            f"{url}: has no labels (no column {source.data.label_column!r}, no class folders); name the column "
            f"with --set data.label_column={likely}, sort the images into one folder per class, or name a file "
            "with the labels: --set data.labels=FILE"
        )
    if not partly and (labels < 0).any():
        row = int(np.flatnonzero(labels < 0)[0])
        raise InputError(f"{url}: {_place(source.parts, row)} has no label; label it or leave it out")
    top = int(labels.max())
    names = source.classes or [f"label {label}" for label in range(top + 1)]
    counts = np.bincount(labels[labels >= 0], minlength=len(names)).tolist()
    present = int(np.count_nonzero(counts))
    if present < least:
        raise InputError(
            f"{url}: all {len(labels):,} images are of one class, {names[top]}, where at least {least} classes "
            "are needed; if its folders are the classes, name that folder instead"
        )
    if show:
        say_once(f"{url}: {_classes_line(names, counts, source.classes is not None)}")
    return labels


def _place(parts: Sequence[Part], row: int) -> str:
    for part in parts:
        if row < part.rows:
            return f"image {part.key}" if part.rows == 1 else f"row {row} of {part.key}"
        row -= part.rows
    raise IndexError(row)


def _classes_line(names: Sequence[str], counts: Sequence[int], named: bool) -> str:
    """Return a line on the classes of a set: how many, their names, and the images of each.

    Without names in the set (not `named`) the classes are the labels that occur. They are not renumbered, because
    a subset or a test set may lack one; those that are skipped are named.
    """
    found = {name: count for name, count in zip(names, counts, strict=True) if named or count}
    shown = [f"{name} {count:,}" for name, count in found.items()][:_CLASSES_SHOWN]
    line = f"{counted(len(found), 'class')} in {counted(sum(counts), 'image')}: {', '.join(shown)}"
    if len(found) > _CLASSES_SHOWN:
        least, most = min(found.values()), max(found.values())
        line += f" and {len(found) - _CLASSES_SHOWN:,} more, each {least:,} to {most:,}"
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty and not named:
        some = ", ".join(empty[:5]) + " ..." * (len(empty) > 5)
        return (
            f"{line}; no image has {some}: labels are kept as they are, so "
            f"a classifier gets {len(names):,} classes; if that is not meant, number them from 0 without gaps"
        )
    return f"{line}; {len(empty)} without images, such as {empty[0]}" if empty else line


def load_images(url: str, data_config: DataConfig, *, limit: int | None = None) -> ImageSet:
    """Return all images at `url`, or the first `limit`, decoded and, if data.resize is set, resized.

    A missing label is -1. Raises InputError for an image that cannot be decoded, for images of two sizes, and for
    an id that occurs twice.
    """
    source = open_source(url, data_config)
    count = source.images if limit is None else min(limit, source.images)
    if count < 1:
        raise InputError(f"{url}: limit {limit} leaves no images; ask for at least one")
    ids: list[str] = []
    labels: list[int] = []
    hashes: list[str] = []
    images: NDArray[np.uint8] | None = None
    labelled = False
    for table in read_tables(source, max_images=min(count, 2048)):
        wanted = table.slice(0, count - len(ids))
        ids += wanted["id"].to_pylist()
        labels += labels_or_none(wanted)
        labelled = labelled or "label" in wanted.column_names
        for _, pixels, content in _decoded(url, wanted, data_config):
            if images is None:
                images = np.empty((count, *pixels.shape), np.uint8)
            elif pixels.shape != images.shape[1:]:
                raise InputError(
                    f"{url}: images differ in size: {ids[0]} is {images.shape[2]}x{images.shape[1]} and "
                    f"{ids[len(hashes)]} is {pixels.shape[1]}x{pixels.shape[0]} pixels; bring them to one size "
                    "with data.resize"
                )
            images[len(hashes)] = pixels
            hashes.append(content)
        if len(ids) == count:
            break
    assert images is not None
    refuse_repeated(url, ids)
    return ImageSet(ids, images, np.array(labels, np.int64) if labelled else None, source.classes, hashes)


@dataclass(frozen=True)
class MixedSet:
    """Decoded images of any sizes: ids (N), pixels uint8 (total,) in order, sizes int64 (N, 2), hashes (N).

    A size is (height, width). A hash is that of the image as stored, before data.resize.
    """

    ids: list[str]
    pixels: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    hashes: list[str]


def load_mixed(url: str, data_config: DataConfig) -> MixedSet:
    """Return all images at `url` in one buffer, decoded and resized. Raises InputError as load_images does."""
    # Labels are not needed, so nothing is asked about them.
    data_config = data_config.model_copy(update={"labels": "none"})
    source = open_source(url, data_config)
    ids: list[str] = []
    hashes: list[str] = []
    sizes: list[tuple[int, ...]] = []
    pixels = bytearray()
    for table in read_tables(source):
        ids += table["id"].to_pylist()
        for _, image, content in _decoded(url, table, data_config):
            hashes.append(content)
            sizes.append(image.shape[:2])
            pixels += image.data
    refuse_repeated(url, ids)
    return MixedSet(ids, np.frombuffer(pixels, np.uint8), np.array(sizes, np.int64).reshape(-1, 2), hashes)


def load_squares(
    url: str, data_config: DataConfig, side: int, most: int, seed: int
) -> tuple[ImageSet, dict[str, list[int]]]:
    """Return the central squares of at most `most` labelled images, and the labels of all images by content hash.

    The squares are `side` pixels wide, of images chosen by `seed`. A hash is that of an image as it is stored.
    Images that cannot be decoded or are smaller are left out. Raises InputError for a missing label, an id that
    occurs twice, or no image that is large enough.
    """
    source = open_source(url, data_config)
    labels = require_classes(url, source, 2).tolist()
    chosen = set(np.random.default_rng(seed).permutation(source.images)[:most].tolist())
    ids: list[str] = []
    squares: dict[int, tuple[NDArray[np.uint8], str]] = {}
    known: dict[str, list[int]] = defaultdict(list)
    for table in read_tables(source):
        for row, image, content in _decoded(url, table, data_config, skip=True):
            place = len(ids) + row
            known[content].append(labels[place])
            if place in chosen and min(image.shape[:2]) >= side:
                squares[place] = centre_crop(image, side), content
        ids += table["id"].to_pylist()
    refuse_repeated(url, ids)
    if not squares:
        raise InputError(
            f"{url}: no image has {side}x{side} pixels, on which the denoiser trains; "
            f"lower denoiser.image_size, or enlarge them with --resize {side}"
        )
    pixels, hashes = np.stack([square for square, _ in squares.values()]), [one for _, one in squares.values()]
    taken = np.array([labels[place] for place in squares], np.int64)
    return ImageSet([ids[place] for place in squares], pixels, taken, source.classes, hashes), known


def random_chunks(parts: Sequence[Part], count: int, seed: int) -> list[list[Span]]:
    """Return randomly chosen chunks of rows, in stored order, that hold at least CANDIDATES times `count` rows."""
    chunks = list(chunk_spans(parts, CHUNK_IMAGES, CHUNK_BYTES))
    found, chosen = 0, []
    for number in np.random.default_rng(seed).permutation(len(chunks)).tolist():
        if found >= CANDIDATES * count:
            break
        chosen.append(number)
        found += rows_in(chunks[number])
    return [chunks[number] for number in sorted(chosen)]


def rows_in(spans: Iterable[Span]) -> int:
    """Return the total number of rows in `spans`."""
    return sum(stop - start for _, start, stop in spans)


def load_sample(url: str, data_config: DataConfig, count: int, seed: int) -> ImageSet:
    """Return at most `count` images of `url`, stratified by label, chosen by `seed` and id, in stored order.

    They come from `random_chunks`, so that a large dataset that is sorted by label does not give images of all
    classes. Images that cannot be decoded are left out. Raises InputError for an id that occurs twice, images of
    two sizes, or no readable image.
    """
    source = open_source(url, data_config)
    chunks = random_chunks(source.parts, count, seed)
    ids: list[str] = []
    labels: list[int] = []
    for table in _tables(source, chunks):
        ids += table["id"].to_pylist()
        labels += labels_or_none(table)
    refuse_repeated(url, ids)
    chosen = np.ones(len(ids), np.bool_)
    if count < len(ids):
        chosen = choose_clean(list(ids), list(labels), count, seed)
    label_of = {name: label for name, label, take in zip(ids, labels, chosen, strict=True) if take}
    found: dict[str, NDArray[np.uint8]] = {}
    hashes: list[str] = []
    for table in _tables(source, chunks):
        wanted = table.filter(pa.array([name in label_of for name in table["id"].to_pylist()], pa.bool_()))
        names = wanted["id"].to_pylist()
        for row, image, content in _decoded(url, wanted, data_config, skip=True):
            found[names[row]] = image
            hashes.append(content)
    sizes = sorted({image.shape[:2] for image in found.values()})
    if len(sizes) != 1:
        raise InputError(f"{url}: expected readable images of one size, found {sizes}; set data.resize")
    taken = np.array([label_of[name] for name in found], np.int64)
    return ImageSet(list(found), np.stack(list(found.values())), taken, source.classes, hashes)


def choose_clean(hashes: list[str | None], labels: list[int | None], clean: int, seed: int) -> NDArray[np.bool_]:
    """Return bool (N) with at most `clean` chosen rows, stratified by label; rows of equal hash stay together.

    A row whose hash is None is never chosen. Rows are ranked by a hash of `seed` and their content hash, so the
    choice does not depend on their order.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, content in enumerate(hashes):
        if content is not None:
            groups[content].append(row)
    strata: dict[int | None, list[str]] = defaultdict(list)
    for content, rows in groups.items():
        strata[min((labels[row] for row in rows), key=_label_order)].append(content)
    for contents in strata.values():
        contents.sort(key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).digest())
    quotas = _quotas({label: sum(len(groups[c]) for c in strata[label]) for label in strata}, clean)
    chosen = np.zeros(len(hashes), np.bool_)
    for label in sorted(strata, key=_label_order):
        _take(chosen, groups, strata[label], quotas[label])
    # Groups of copies may not fill a quota exactly. Other groups then fill the rest if they fit.
    leftover = [content for label in sorted(strata, key=_label_order) for content in strata[label]]
    _take(chosen, groups, leftover, clean - int(chosen.sum()))
    return chosen


def _take(chosen: NDArray[np.bool_], groups: dict[str, list[int]], contents: list[str], room: int) -> None:
    for content in contents:
        rows = groups[content]
        if len(rows) <= room and not chosen[rows[0]]:
            chosen[rows] = True
            room -= len(rows)


def _quotas(sizes: dict[int | None, int], clean: int) -> dict[int | None, int]:
    # Method of largest remainders: each class gets its share rounded down, and those that lost most get one more.
    total = sum(sizes.values())
    shares = {label: Fraction(clean * size, total) for label, size in sizes.items()}
    quotas = {label: int(share) for label, share in shares.items()}
    by_loss = sorted(shares, key=lambda label: (quotas[label] - shares[label], _label_order(label)))
    for label in by_loss[: clean - sum(quotas.values())]:
        quotas[label] += 1
    return quotas


def _label_order(label: int | None) -> tuple[bool, int]:
    return label is None, label or 0


def decode_resized(url: str, name: str, data: bytes, data_config: DataConfig) -> NDArray[np.uint8]:
    """Return an image as uint8 (H, W, 3), resized to data.resize. Raises InputError if it cannot be decoded."""
    return resize_image(decode_required(f"{url}: image {name}", data, data_config), data_config.resize)


def _decoded(
    url: str, table: pa.Table, data_config: DataConfig, *, skip: bool = False
) -> Iterator[tuple[int, NDArray[np.uint8], str]]:
    """Yield row, pixels resized to data.resize, and hash as stored; with `skip` none for a damaged image."""
    for row, (name, data) in enumerate(zip(table["id"].to_pylist(), image_bytes(table), strict=True)):
        try:
            stored = decode_required(f"{url}: image {name}", data, data_config)
        except InputError:
            if skip:
                continue
            raise
        yield row, resize_image(stored, data_config.resize), content_hash(stored)


def _tables(source: Source, chunks: list[list[Span]]) -> Iterator[pa.Table]:
    for spans in chunks:
        yield read_parts(source, spans)
