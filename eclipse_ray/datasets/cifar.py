"""CIFAR-10 and CIFAR-100 Python batches."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.arrays import ArrayFile, Layout
from eclipse_ray.datasets.pickles import read_file, text_of, values_of
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

# ImageNet in 32x32 pixels comes as train_data_batch_1 ... and val_data.
_BATCH_NAME = re.compile(r"((?:train_)?data_batch_\d+|test_batch|val_data|train|test)", re.IGNORECASE)
# The files of class names that lie beside the batches, and where these are in them.
META = (("batches.meta", "label_names"), ("meta", "fine_label_names"))
_LABELS = ("labels", "fine_labels")
_ADVICE = "expected a CIFAR batch of numbers and bytes; do not open this file with anything else"


def claims(key: str) -> bool:
    """Return whether this format reads an object of this name."""
    return _BATCH_NAME.fullmatch(key.rpartition("/")[2]) is not None


@contextmanager
def opened(store: Store, entry: Entry, config: DataConfig) -> Iterator[ArrayFile]:
    """Yield what one batch holds. Raises InputError for a pickle that is not a CIFAR batch."""
    where = f"{store.url}/{entry.key}"
    batch = _load(store, entry.key)
    pixels = _pixels(where, batch)
    labels = _column(where, next((batch[name] for name in _LABELS if name in batch), None), len(pixels))
    coarse = _column(where, batch.get("coarse_labels"), len(pixels))
    names = batch.get("filenames")
    names = names if isinstance(names, list) and len(names) == len(pixels) else []
    yield ArrayFile(
        pixels.shape,
        pixels.dtype,
        Layout("HWC", 255),
        lambda start, stop: pixels[start:stop],
        None if labels is None else lambda start, stop: labels[start:stop],
        classes=lambda: _class_names(store, entry.key),
        paths=(lambda start, stop: [text_of(name) for name in names[start:stop]]) if names else None,
        columns={} if coarse is None else {"coarse_label": lambda start, stop: pa.array(coarse[start:stop])},
    )


def _load(store: Store, key: str) -> dict[str, Any]:
    where = f"{store.url}/{key}"
    with store.open(key) as file:
        batch = read_file(where, file, _ADVICE)
    if not isinstance(batch, dict):
        raise InputError(f"{where}: holds {type(batch).__name__}; {_ADVICE}")
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


def _column(where: str, values: object, rows: int) -> NDArray[np.int64] | None:
    if values is None:
        return None
    try:
        column = np.asarray(values)
    except ValueError:
        column = np.empty(0)
    if column.shape != (rows,) or column.dtype.kind not in "iu":
        raise InputError(f"{where}: expected {rows} integer labels; the file is damaged, copy it again")
    return column.astype(np.int64)


def _class_names(store: Store, key: str) -> list[str] | None:
    folder = key.rpartition("/")[0]
    for name, field in META:
        meta = f"{folder}/{name}" if folder else name
        try:
            names = _load(store, meta).get(field)
        except FileNotFoundError:
            continue
        if isinstance(names, list):
            return [text_of(text) for text in names]
    return None
