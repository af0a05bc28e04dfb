"""Whole datasets: load one into memory, or write one so that an interrupted write cannot pass for done."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, Layout
from eclipse_ray.datasets import cifar_writer, npz_writer
from eclipse_ray.datasets import webdataset as webdataset_writer
from eclipse_ray.datasets.folder import folder_name
from eclipse_ray.datasets.formats import UNFINISHED, open_source, read_tables
from eclipse_ray.datasets.images import SUFFIXES, content_hash, decode_required, resize_image, suffix_of
from eclipse_ray.datasets.note import ESCAPED_KEYS, NOTE
from eclipse_ray.datasets.table import (
    FILE_BYTES,
    FILE_IMAGES,
    all_labels,
    extra_columns,
    image_bytes,
    regroup,
    table_to_parquet,
    with_classes,
)
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

Writer = Callable[[Store, Iterable[pa.Table], Sequence[str] | None, DataConfig], int]


@dataclass(frozen=True)
class ImageSet:
    """Decoded images: ids (N), images uint8 (N, H, W, 3), labels int64 (N) or None, class names or None.

    `stored` (N) are content hashes of the images as they are stored, before data.resize, 32 hex digits each.
    """

    ids: list[str]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    classes: list[str] | None
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


def load_images(
    url: str, data_config: DataConfig, *, require_labels: bool = False, limit: int | None = None
) -> ImageSet:
    """Return all images at `url` (or the first `limit`), decoded (and resized); they must share one size.

    A missing label is -1. Raises InputError for an image that cannot be decoded, for two sizes, for an id
    that occurs twice, and with `require_labels` for missing labels.
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
    for table in read_tables(source, data_config, max_images=min(count, 2048)):
        wanted = table.slice(0, count - len(ids))
        for name, data in zip(wanted["id"].to_pylist(), image_bytes(wanted), strict=True):
            stored = decode_required(f"{url}: image {name}", data, data_config)
            pixels = resize_image(stored, data_config.resize)
            hashes.append(content_hash(stored))
            if images is None:
                images = np.empty((count, *pixels.shape), np.uint8)
            elif pixels.shape != images.shape[1:]:
                raise _two_sizes(url, ids[0], images[0], name, pixels)
            images[len(ids)] = pixels
            ids.append(name)
        if "label" in wanted.column_names:
            labelled = True
            labels.extend(wanted["label"].fill_null(-1).to_pylist())
        else:
            labels.extend([-1] * wanted.num_rows)
        if len(ids) == count:
            break
    assert images is not None
    _refuse_repeated_ids(url, ids)
    if require_labels:
        _require_labels(url, ids, labels if labelled else None, source.classes, data_config)
    return ImageSet(ids, images, np.array(labels, np.int64) if labelled else None, source.classes, hashes)


@dataclass(frozen=True)
class MixedSet:
    """Decoded images of any sizes: ids (N), pixels uint8 (total,) in order, sizes int64 (N, 2), hashes (N).

    A size is (height, width); a hash is of the image as it is stored, before data.resize.
    """

    ids: list[str]
    pixels: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    hashes: list[str]


def load_mixed(url: str, data_config: DataConfig) -> MixedSet:
    """Return all images at `url`, decoded (and resized), in one buffer. Raises InputError as load_images does."""
    source = open_source(url, data_config)
    ids: list[str] = []
    hashes: list[str] = []
    sizes: list[tuple[int, ...]] = []
    pixels = bytearray()
    for table in read_tables(source, data_config, max_images=2048):
        for name, data in zip(table["id"].to_pylist(), image_bytes(table), strict=True):
            stored = decode_required(f"{url}: image {name}", data, data_config)
            image = resize_image(stored, data_config.resize)
            ids.append(name)
            hashes.append(content_hash(stored))
            sizes.append(image.shape[:2])
            pixels += image.data
    _refuse_repeated_ids(url, ids)
    return MixedSet(ids, np.frombuffer(pixels, np.uint8), np.array(sizes, np.int64).reshape(-1, 2), hashes)


def write_dataset(
    url: str,
    tables: Iterable[pa.Table],
    *,
    classes: Sequence[str] | None,
    source: str,
    layout: Layout = "parquet",
    data_config: DataConfig | None = None,
    resume: bool = False,
) -> int:
    """Write canonical `tables` as a new dataset at `url` and return the number of images.

    Parts come first and a note `_eclipse/dataset.json` last; until then readers refuse the dataset. With `resume`,
    the same tables are written over what an interrupted call left of them. Raises InputError if there already is
    something else at `url`, and for what `layout` cannot hold.
    """
    store = Store(url)
    if not resume:
        refuse_existing(store)
    store.write(UNFINISHED, b"")
    try:
        images = _WRITERS[layout](store, tables, classes, data_config or DataConfig())
    except InputError:
        # Nothing was written yet, so nothing has to be deleted before the next attempt.
        if next(store.list(), None) is None:
            store.delete(UNFINISHED)
        raise
    note = {"images": images, "classes": None if classes is None else list(classes), "source": source}
    if layout == "webdataset":
        note[ESCAPED_KEYS] = True
    store.write(NOTE, json.dumps(note, indent=2).encode())
    store.delete(UNFINISHED)
    return images


def refuse_existing(store: Store) -> None:
    """Raise InputError if there are objects in `store`, naming one of them."""
    if store.is_file():
        raise InputError(f"{store.url}: is a file; name a new folder to write to")
    if store.exists(UNFINISHED):
        raise InputError(f"{store.url}: holds a dataset whose writing was interrupted; delete it first")
    taken = next(itertools.chain(store.list(), store.list("_eclipse")), None)
    if taken is not None:
        raise InputError(f"{store.url}: already holds data ({taken.key}); delete it or name another folder")


def write_parquet(
    store: Store,
    tables: Iterable[pa.Table],
    *,
    classes: Sequence[str] | None = None,
    max_images: int = FILE_IMAGES,
    max_bytes: int = FILE_BYTES,
) -> int:
    """Write canonical `tables` as data/part-00000.parquet and so on; return the number of images.

    A file ends before it exceeds `max_images` or about `max_bytes`.
    """
    images = 0
    for number, table in enumerate(regroup(tables, max_images, max_bytes)):
        data = table_to_parquet(with_classes(table, classes))
        store.write(f"data/part-{number:05d}.parquet", data)
        images += table.num_rows
    return images


def write_folder(store: Store, tables: Iterable[pa.Table], *, classes: Sequence[str] | None = None) -> int:
    """Write the encoded bytes of every image, unchanged, into one folder a class (flat without labels).

    Returns the number of images. Raises InputError for a row without a label among labelled ones, for two ids that
    need the same file name, and for columns that came along.
    """
    images = 0
    for table in tables:
        extras = extra_columns(table).column_names
        if extras:
            raise InputError(
                f"{store.url}: a folder of images cannot hold the column {extras[0]!r}; use the parquet layout, "
                "or leave such columns out with --set data.extra_columns=drop"
            )
        known = all_labels(store.url, table)
        labels: Sequence[int | None] = [None] * table.num_rows if known is None else known
        for name, data, label in zip(table["id"].to_pylist(), image_bytes(table), labels, strict=True):
            _create(store, name, _file_key(name, data, label, classes), data)
            images += 1
    return images


_WRITERS: dict[Layout, Writer] = {
    "parquet": lambda store, tables, classes, _: write_parquet(store, tables, classes=classes),
    "folder": lambda store, tables, classes, _: write_folder(store, tables, classes=classes),
    "webdataset": webdataset_writer.write,
    "npz": npz_writer.write,
    "cifar": cifar_writer.write,
}


def _file_key(name: str, data: bytes, label: int | None, classes: Sequence[str] | None) -> str:
    suffix = suffix_of(data)
    named = name.lower().endswith(suffix or SUFFIXES) or (suffix == ".jpg" and name.lower().endswith(".jpeg"))
    file = name if named else name + (suffix or ".png")
    if label is None:
        return folder_name(file)
    known = classes is not None and 0 <= label < len(classes)
    raw = classes[label] if classes is not None and known else f"{label:05d}"
    top = folder_name(raw)
    # An id that came from such a folder names its class already, as it is or escaped.
    first, slash, rest = file.partition("/")
    return f"{top}/{folder_name(rest if slash and first in (raw, top) else file)}"


def _create(store: Store, name: str, key: str, data: bytes) -> None:
    try:
        created = store.create(key, data)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"{store.url}: id {name} is too long to name a file here; use the parquet layout"
            ) from error
        raise
    if not created:
        raise InputError(f"{store.url}: two images would be named like {name}; use the parquet layout")


def decode_resized(url: str, name: str, data: bytes, data_config: DataConfig) -> NDArray[np.uint8]:
    """Return an image, uint8 (H, W, 3), in the size of data.resize. Raises InputError if it cannot be decoded."""
    return resize_image(decode_required(f"{url}: image {name}", data, data_config), data_config.resize)


def _two_sizes(url: str, first: str, one: NDArray[np.uint8], second: str, other: NDArray[np.uint8]) -> InputError:
    return InputError(
        f"{url}: images differ in size: {first} is {one.shape[1]}x{one.shape[0]} and {second} is "
        f"{other.shape[1]}x{other.shape[0]} pixels; bring them to one size with data.resize"
    )


def _refuse_repeated_ids(url: str, ids: list[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise InputError(f"{url}: id {name} occurs more than once; give every image its own id")
        seen.add(name)


def _require_labels(
    url: str, ids: list[str], labels: list[int] | None, classes: Sequence[str] | None, data_config: DataConfig
) -> None:
    if labels is None:
        raise InputError(
            f"{url}: has no labels (no column {data_config.label_column!r}, no class folders); name the "
            "column with --set data.label_column=NAME or sort the images into one folder a class"
        )
    top = len(classes) if classes is not None else None
    for name, label in zip(ids, labels, strict=True):
        if label < 0:
            raise InputError(f"{url}: image {name} has no label; label it or leave it out")
        if top is not None and label >= top:
            raise InputError(f"{url}: image {name} has label {label}, but there are {top} classes; mend it")
