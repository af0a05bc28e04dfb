"""Poisoned images that were published without labels or ids, matched with the clean images they were made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, Layout
from eclipse_ray.datasets.formats import Source, open_source, read_tables
from eclipse_ray.datasets.images import Pixels, check_encoding, decode_required
from eclipse_ray.datasets.memory import require_classes
from eclipse_ray.datasets.table import canonical_table, extra_columns, image_bytes
from eclipse_ray.datasets.write import converted, refuse_existing, write_dataset
from eclipse_ray.errors import InputError
from eclipse_ray.log import counted, say
from eclipse_ray.storage.store import Store

_POOL = 8
# So many nearest clean images are looked at; more copies of one image than this are no dataset.
_NEAREST = 8
# The second nearest clean image must be this many times farther away (squared) than the nearest one.
_MARGIN = 1.5
# Squared distance of pooled images below which two clean images with one label are copies of each other.
_COPY = 200.0
_CHUNK = 512


@dataclass(frozen=True)
class Matched:
    """Images that got a label, and the least squared distance by which the second nearest image was farther."""

    images: int
    margin: float
    output: str


def labels_from(
    source: str, clean: str, output: str, data_config: DataConfig, layout: Layout = "parquet"
) -> Matched:
    """Write the images of `source` with the labels of `clean`, matched by content; return how many matched.

    Both are averaged to 8x8x3 and each image takes the label of its nearest clean image. Labels that `source` has
    are replaced; ids, bytes and extra columns are kept. If `data.resize` is set, images are resized after the
    match. Raises InputError unless every image has one such clean image: much nearer than the next one, except for
    copies with the same label, and not shared with another image.
    """
    check_encoding(data_config.encoding, data_config.allow_lossy)
    doing = f"convert {Store(source).url} with labels from {Store(clean).url}"
    refuse_existing(Store(output), doing)
    poisoned, known = open_source(source, data_config), open_source(clean, data_config)
    labels = require_classes(clean, known)
    (ids, pooled), (_, clean_pooled) = _pooled(poisoned), _pooled(known)
    nearest, margins, unique = match(pooled, clean_pooled, labels)
    _refuse_doubtful(source, clean, ids, unique)
    found = labels[nearest]

    def tables() -> Iterator[pa.Table]:
        start = 0
        for table in converted(poisoned):
            names = table["id"].to_pylist()
            chosen = found[start : start + len(names)]
            yield canonical_table(names, image_bytes(table), chosen, extra_columns(table), known.classes)
            start += len(names)

    images = write_dataset(
        output,
        tables(),
        classes=known.classes,
        source=source,
        layout=layout,
        data_config=data_config,
        doing=doing,
        passed_over=poisoned.passed_over,
    )
    margin = float(margins.min())
    say(
        f"{output}: {images:,} of {counted(images, 'image')} matched, each nearer than the next by at "
        f"least {margin:,.0f}"
    )
    return Matched(images, margin, output)


def partners(source: str, clean: str, data_config: DataConfig, trusted: str | None) -> dict[str, str]:
    """Return the id of the image of `source` that was made of each image of `clean`, by the id there, and say so.

    Images that were made of the `trusted` ones are left out. Raises InputError unless every image of `source` has
    one clean image of its own, as `labels_from` does.
    """
    poisoned, known = open_source(source, data_config), open_source(clean, data_config)
    labels = require_classes(clean, known, show=False)
    (ids, pooled), (names, clean_pooled) = _pooled(poisoned), _pooled(known)
    if trusted:
        _, more = _pooled(open_source(trusted, data_config))
        clean_pooled = np.concatenate([clean_pooled, more])
        labels = np.concatenate([labels, np.full(len(more), -1, labels.dtype)])
    nearest, margins, unique = match(pooled, clean_pooled, labels)
    taken: dict[int, int] = {}
    for image, row in enumerate(nearest.tolist()):
        if row in taken:
            # Copies of one image with one label: any of them will do.
            copies = (((clean_pooled - clean_pooled[row]) ** 2).sum(axis=1) <= _COPY) & (labels == labels[row])
            row = next((copy for copy in np.flatnonzero(copies).tolist() if copy not in taken), row)
        unique[image] &= row not in taken
        taken[row] = image
    _refuse_doubtful(source, clean, ids, unique)
    made_of = {names[row]: ids[image] for row, image in taken.items() if row < len(names)}
    left_out = f"; {len(ids) - len(made_of):,} were made of images of {trusted} and are left out"
    say(
        f"{source}: {len(made_of):,} of {counted(len(ids), 'image')} matched with those of {clean} by their "
        f"content, each nearer than the next by at least {float(margins.min()):,.0f}"
        + (left_out if len(made_of) < len(ids) else "")
    )
    return made_of


def _refuse_doubtful(source: str, clean: str, ids: list[str], unique: NDArray[np.bool_]) -> None:
    if unique.all():
        return
    first = int(np.flatnonzero(~unique)[0])
    raise InputError(
        f"{source}: {int(unique.sum()):,} of {len(ids):,} images match exactly one image of {clean}; others "
        f"do not, such as {ids[first]}; name the clean set from which these images were made"
    )


def match(
    images: NDArray[np.float32], clean: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return the nearest clean row (N), by how much the next is farther (N), and whether it is the only one (N).

    `images` and `clean` are float32 (N, 192) and (M, 192); distances are squared.
    """
    count = min(_NEAREST, len(clean))
    squares = (clean**2).sum(axis=1)

    def look(some: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
        rough = some @ clean.T
        # In place, and a few times the least one: a tenth of the time of np.argpartition.
        rough *= -2
        rough += squares
        near = np.empty((len(some), count), np.int64)
        for place in range(count):
            near[:, place] = rough.argmin(axis=1)
            np.put_along_axis(rough, near[:, place, None], np.inf, axis=1)
        distances = ((clean[near].astype(np.float64) - some[:, None]) ** 2).sum(axis=2)
        order = np.argsort(distances, axis=1, kind="stable")
        near, distances = np.take_along_axis(near, order, 1), np.take_along_axis(distances, order, 1)
        apart = ((clean[near].astype(np.float64) - clean[near[:, :1]]) ** 2).sum(axis=2)
        same = (apart <= _COPY) & (labels[near] == labels[near[:, :1]])
        second = np.where(same, np.inf, distances).min(axis=1)
        least = distances[:, 0]
        return near[:, 0], second - least, second > _MARGIN * least, same.sum(axis=1)

    chunks = [look(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
    nearest, margins, unique, copies = (np.concatenate(each) for each in zip(*chunks, strict=True))
    claims = np.bincount(nearest[unique], minlength=len(clean))[nearest]
    return nearest, margins, unique & (claims <= copies)


def pool(pixels: Pixels) -> NDArray[np.float32]:
    """Return uint8 (H, W, 3) `pixels`, H and W at least 8, averaged over 8x8 fields as float32 (192)."""
    values = pixels.astype(np.float64)
    for axis in (0, 1):
        edges = np.arange(_POOL + 1) * pixels.shape[axis] // _POOL
        shape = [1, 1, 1]
        shape[axis] = _POOL
        values = np.add.reduceat(values, edges[:-1], axis=axis) / np.diff(edges).reshape(shape)
    return values.astype(np.float32).ravel()


def _pooled(source: Source) -> tuple[list[str], NDArray[np.float32]]:
    ids: list[str] = []
    pooled = np.empty((source.images, 3 * _POOL * _POOL), np.float32)
    for table in read_tables(source):
        for name, data in zip(table["id"].to_pylist(), image_bytes(table), strict=True):
            pixels = decode_required(f"{source.url}: image {name}", data, source.data)
            if min(pixels.shape[:2]) < _POOL:
                raise InputError(
                    f"{source.url}: image {name} is smaller than {_POOL}x{_POOL} pixels; leave it out"
                )
            pooled[len(ids)] = pool(pixels)
            ids.append(name)
    return ids, pooled
