"""Images in pickles: poisons as their authors publish them, and the Python batches of CIFAR-10 and CIFAR-100.

The form of a published file (.pt, .pth, .pkl) is recognised from its content; it may be a CIFAR batch.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import damage_named
from eclipse_ray.datasets.arrays import ADVICE, ArrayFile, Layout, are_labels, check_sides, layout_of, to_labels
from eclipse_ray.datasets.folder import split_of
from eclipse_ray.datasets.pickles import Values, read_file, text_of, values_of
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

_DEFAULT_LABELS = DataConfig.model_fields["label_column"].default
SUFFIXES = (".pt", ".pth", ".pkl", ".pickle")
IMAGES = ("images", "image", "data", "x", "x_train", "samples")
LABELS = ("labels", "label", "targets", "target", "y", "y_train", "fine_labels")


class Opened(NamedTuple):
    """A published file: its images, still in the file or in memory, their labels int64 (N), and their layout."""

    images: Values
    labels: NDArray[np.int64] | None
    layout: Layout


@contextmanager
def opened(store: Store, entry: Entry, config: DataConfig) -> Iterator[ArrayFile]:
    """Yield what one file holds. Raises InputError for no images, a perturbation, and what could run code."""
    where = f"{store.url}/{entry.key}"
    found = _open(store.url, entry.key, entry.version, None if config.labels else config.label_column)
    if found is None:
        with opened_batch(store, entry, config) as batch:
            yield batch
        return
    images, labels, layout = found
    check_sides(where, images.shape, layout.order, config)
    with store.open(entry.key) as file:
        yield ArrayFile(
            images.shape,
            images.dtype,
            layout,
            lambda start, stop: rows_of(where, images, file, start, stop),
            None if labels is None else lambda start, stop: labels[start:stop],
            said="without labels" if labels is None else "with labels",
        )


def rows_of(where: str, values: Values, file: BinaryIO, start: int, stop: int) -> NDArray[Any]:
    """Return rows `start` to `stop` of an array in memory or a tensor in `file`. Raises InputError for damage."""
    return whole_of(where, file, values[start:stop])


def whole_of(where: str, file: BinaryIO, values: Values) -> NDArray[Any]:
    """Return an array in memory, or the values of a tensor in `file`. Raises InputError for damage."""
    if isinstance(values, np.ndarray):
        return values
    with damage_named(f"{where}: the file is damaged", "copy it again"):
        return values.read(file)


# A pickle has to be read as a whole for each shard of it; the last one is kept.
@lru_cache(maxsize=1)
def _open(url: str, key: str, version: str, label_column: str | None) -> Opened | None:
    """Return what the file holds, None for a CIFAR batch. Without a `label_column` labels are not read."""
    where = f"{url}/{key}"
    with Store(url).open(key) as file:
        content = read_file(where, file, ADVICE)
        if _is_batch(content):
            return None
        read = partial(whole_of, where, file)
        images, held = _images_and_labels(where, content, read, label_column)
        labels = None if held is None or label_column is None else _label_array(where, held, read)
        layout = layout_of(
            where, images.shape, images.dtype, lambda start, stop: rows_of(where, images, file, start, stop)
        )
    if labels is not None:
        if not are_labels(labels.shape, labels.dtype, images.shape[0]):
            raise InputError(
                f"{where}: labels {labels.dtype} {labels.shape} do not belong to {images.shape[0]} images; mend it"
            )
        labels = to_labels(where, labels)
    return Opened(images, labels, layout)


def _is_batch(content: object) -> bool:
    if not isinstance(content, dict):
        return False
    keys = {text_of(key) for key in content if isinstance(key, str | bytes)}
    data = values_of(content.get("data", content.get(b"data")))
    flat = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2
    return flat and "targets" not in keys


Reader = Callable[[Values], NDArray[Any]]


def _images_and_labels(
    where: str, content: Any, read: Reader, label_column: str | None
) -> tuple[Values, object | None]:
    lone = values_of(content)
    if lone is not None:
        return lone, None
    if isinstance(content, dict):
        return _from_dict(where, content, label_column)
    if isinstance(content, list | tuple) and content:
        images = values_of(content[0])
        second = values_of(content[-1])
        flat = second is None or len(second.shape) < 3
        if len(content) == 2 and images is not None and len(images.shape) > 1 and flat:
            return images, content[1]
        if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in content):
            items = [pair[0] for pair in content]
            return _stack(where, items, read), [pair[1] for pair in content]
    raise InputError(f"{where}: holds {_named(content)}, not images; {ADVICE}")


def _from_dict(where: str, content: dict[Any, Any], label_column: str | None) -> tuple[Values, object | None]:
    named = {text_of(key).lower(): value for key, value in content.items() if isinstance(key, str | bytes)}
    images = [array for name in IMAGES if (array := values_of(named.get(name))) is not None]
    wanted = label_column and label_column.lower()
    labels = [named[name] for name in _label_names(where, list(named), wanted, LABELS)]
    if len(images) != 1 or len(labels) > 1:
        known = ", ".join(list(named)[:10]) or "nothing"
        raise InputError(
            f"{where}: a dict of {known}, without one array of images and one of labels; {ADVICE}; of several "
            "arrays of labels name one with --set data.label_column=NAME"
        )
    for name, value in named.items():
        other = None if split_of(name) in (None, "train") else values_of(value)
        if other is not None and len(other.shape) > 1:
            raise InputError(f"{where}: holds {name} of another split too; save each split as a file of its own")
    return images[0], labels[0] if labels else None


def _label_names(where: str, known: Sequence[str], label_column: str | None, usual: Sequence[str]) -> list[str]:
    """Return the names in a dict under which labels lie: the one that `label_column` says, else the usual ones."""
    if label_column in (None, _DEFAULT_LABELS):
        return [name for name in usual if name in known and label_column is not None]
    if label_column not in known:
        raise InputError(
            f"{where}: no {label_column!r} among {', '.join(known[:10])}; name the labels with "
            "--set data.label_column=NAME"
        )
    return [label_column]


def _stack(where: str, items: Sequence[object], read: Reader) -> NDArray[Any]:
    images = [_image(where, row, item, read) for row, item in enumerate(items)]
    first = images[0]
    for row, image in enumerate(images):
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{where}: images differ: number 0 is {first.dtype} {first.shape} and number {row} is "
                f"{image.dtype} {image.shape}; bring them to one form"
            )
    return np.stack(images)


def _image(where: str, row: int, item: object, read: Reader) -> NDArray[Any]:
    array = values_of(item)
    if array is not None:
        return read(array)
    if isinstance(item, bytes):
        side = math.isqrt(len(item) // 3)
        if side and 3 * side * side == len(item):
            return np.frombuffer(item, np.uint8).reshape(side, side, 3)
        raise InputError(
            f"{where}: image {row} has {len(item)} bytes, which are no square of red, green and blue bytes; "
            "store image files in a folder per class instead"
        )
    raise InputError(f"{where}: image {row} is {_named(item)}; {ADVICE}")


def _label_array(where: str, labels: Any, read: Reader) -> NDArray[Any]:
    array = values_of(labels)
    if array is not None:
        return read(array)
    if isinstance(labels, list | tuple):
        plain = [_number(label, read) for label in labels]
        if all(type(label) in (int, float) for label in plain):
            return np.array(plain, np.int64 if all(type(label) is int for label in plain) else np.float64)
    raise InputError(f"{where}: its labels are {_named(labels)}; store one integer per image")


def _number(label: object, read: Reader) -> object:
    array = values_of(label)
    return label if array is None or math.prod(array.shape) != 1 else read(array).item()


def _named(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    array = values_of(value)
    return type(value).__name__ if array is None else f"an array {array.dtype} {tuple(array.shape)}"


# ---- CIFAR batches

# ImageNet in 32x32 pixels comes as train_data_batch_1 ... and val_data.
_BATCH_NAME = re.compile(r"((?:train_)?data_batch_\d+|test_batch|val_data|train|test)", re.IGNORECASE)
# The files of class names that lie beside the batches.
META = ("batches.meta", "meta")
_BATCH_LABELS = ("labels", "fine_labels")
_BATCH_ADVICE = "expected a CIFAR batch of numbers and bytes; do not open this file with anything else"


def claims_batch(key: str) -> bool:
    """Return whether an object of this name is a CIFAR batch."""
    return _BATCH_NAME.fullmatch(key.rpartition("/")[2]) is not None


@contextmanager
def opened_batch(store: Store, entry: Entry, config: DataConfig) -> Iterator[ArrayFile]:
    """Yield what one batch holds. Raises InputError for a pickle that is not a CIFAR batch."""
    where = f"{store.url}/{entry.key}"
    batch = _load_batch(store, entry.key)
    pixels = _pixels(where, batch)
    chosen = _label_names(where, list(batch), None if config.labels else config.label_column, _BATCH_LABELS)[:1]
    labels = _column(where, batch[chosen[0]], len(pixels)) if chosen else None
    left = [name for name in ("fine_labels", "coarse_labels") if name not in (chosen or _BATCH_LABELS)]
    others = {name: _column(where, batch[name], len(pixels)) for name in left if name in batch}
    names = batch.get("filenames")
    names = names if isinstance(names, list) and len(names) == len(pixels) else []
    yield ArrayFile(
        pixels.shape,
        pixels.dtype,
        Layout("HWC", 255),
        lambda start, stop: pixels[start:stop],
        None if labels is None else lambda start, stop: labels[start:stop],
        classes=lambda: _class_names(store, entry.key, f"{chosen[0].removesuffix('s')}_names") if chosen else None,
        paths=(lambda start, stop: [text_of(name) for name in names[start:stop]]) if names else None,
        columns={name.removesuffix("s"): partial(_slice, column) for name, column in others.items()},
    )


def _load_batch(store: Store, key: str) -> dict[str, Any]:
    where = f"{store.url}/{key}"
    # Read at once, which is retried.
    batch = read_file(where, io.BytesIO(store.read(key)), _BATCH_ADVICE)
    if not isinstance(batch, dict):
        raise InputError(f"{where}: holds {type(batch).__name__}; {_BATCH_ADVICE}")
    return {
        text_of(key): value if (array := values_of(value)) is None else array
        for key, value in batch.items()
        if isinstance(key, str | bytes)
    }


def _pixels(where: str, batch: dict[str, Any]) -> NDArray[np.uint8]:
    data = batch.get("data")
    if isinstance(data, np.ndarray) and data.dtype == np.uint8:
        if data.ndim == 4 and data.shape[3] == 3:
            return data
        side = math.isqrt(data.shape[1] // 3) if data.ndim == 2 else 0
        if side and 3 * side * side == data.shape[1]:
            return data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    raise InputError(
        f"{where}: expected a key 'data' with uint8 (N, 3072) or (N, H, W, 3), found the keys "
        f"{', '.join(batch) or '(none)'}; this is no CIFAR batch, convert it to image files instead"
    )


def _slice(column: NDArray[np.int64], start: int, stop: int) -> pa.Array:
    return pa.array(column[start:stop])


def _column(where: str, values: object, rows: int) -> NDArray[np.int64]:
    try:
        column = np.asarray(values)
    except ValueError:
        column = np.empty(0)
    if column.shape != (rows,) or column.dtype.kind not in "iu":
        raise InputError(f"{where}: expected {rows} integer labels; the file is damaged, copy it again")
    return column.astype(np.int64)


def _class_names(store: Store, key: str, field: str) -> list[str] | None:
    folder = key.rpartition("/")[0]
    for name in META:
        meta = f"{folder}/{name}" if folder else name
        try:
            names = _load_batch(store, meta).get(field)
        except FileNotFoundError:
            continue
        if isinstance(names, list):
            return [text_of(text) for text in names]
    return None
