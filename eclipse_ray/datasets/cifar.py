"""CIFAR-10 and CIFAR-100 Python batches."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.pickles import read_pickle, text_of, values_of
from eclipse_ray.datasets.table import Part, canonical_table, check_label
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


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part per batch, and the class names of the meta file beside the batches. Reads all batches.

    Raises InputError for a pickle that is not a CIFAR batch, or whose labels do not match its images.
    """
    parts = []
    classes = _class_names(store, entries[0].key)
    for entry in entries:
        where = f"{store.url}/{entry.key}"
        batch = _load(where, store.read(entry.key))
        rows = len(_pixels(where, batch))
        _labels(where, batch, rows, classes)
        parts.append(Part(entry.key, rows, entry.size, entry.version))
    return [part for part in parts if part.rows], classes


def read_rows(
    store: Store, key: str, start: int, stop: int, config: DataConfig, classes: Sequence[str] | None
) -> pa.Table:
    """Return rows `start` to `stop` of one batch as a canonical table; pixels are encoded as PNG, losslessly."""
    where = f"{store.url}/{key}"
    batch = _load(where, store.read(key))
    pixels = _pixels(where, batch)
    total, rows = len(pixels), range(start, min(stop, len(pixels)))
    coarse = _column(where, batch.get("coarse_labels"), total)
    names = batch.get("filenames")
    paths = [text_of(names[row]) for row in rows] if isinstance(names, list) and len(names) == total else None
    chosen = _labels(where, batch, total, classes)
    return canonical_table(
        [f"{key}#{row}" for row in rows],
        [encode_image(pixels[row], "png") for row in rows],
        None if chosen is None else chosen[start:stop],
        None if coarse is None else pa.table({"coarse_label": coarse[start:stop]}),
        classes,
        paths,
    )


def read_labels(
    store: Store, key: str, config: DataConfig, classes: Sequence[str] | None
) -> NDArray[np.int64] | None:
    """Return the labels of one batch, None if it has none."""
    where = f"{store.url}/{key}"
    batch = _load(where, store.read(key))
    return _labels(where, batch, len(_pixels(where, batch)), classes)


def _load(where: str, data: bytes) -> dict[str, Any]:
    batch = read_pickle(where, data, _ADVICE)
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


def _labels(
    where: str, batch: dict[str, Any], rows: int, classes: Sequence[str] | None
) -> NDArray[np.int64] | None:
    labels = _column(where, next((batch[name] for name in _LABELS if name in batch), None), rows)
    for label in set() if labels is None else set(labels.tolist()):
        check_label(where, label, classes)
    return labels


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
            names = _load(f"{store.url}/{meta}", store.read(meta)).get(field)
        except FileNotFoundError:
            continue
        if isinstance(names, list):
            return [text_of(text) for text in names]
    return None
