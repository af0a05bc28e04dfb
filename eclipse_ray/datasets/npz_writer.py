"""Canonical tables to NumPy archives; and the stacks of equal images that such layouts are made of."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.images import Pixels, decode_required
from eclipse_ray.datasets.npz import CLASSES, IDS, IMAGES, LABELS
from eclipse_ray.datasets.table import FILE_BYTES, FILE_IMAGES, all_labels, extra_columns, image_bytes, regroup
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store


def write(store: Store, tables: Iterable[pa.Table], classes: Sequence[str] | None, config: DataConfig) -> int:
    """Write canonical `tables` as part-00000.npz and so on (images, labels, id, extra columns); return the count.

    Raises InputError for what an array cannot hold: images of two sizes, undecodable ones, missing values, columns
    that are neither numbers nor text.
    """
    images = 0
    for number, table in enumerate(regroup(tables, FILE_IMAGES, FILE_BYTES)):
        arrays: dict[str, NDArray[np.generic]] = {"images": stack_images(store.url, table, config)}
        labels = all_labels(store.url, table)
        if labels is not None:
            arrays["labels"] = np.array(labels, np.int64)
        arrays[IDS] = _text_array(store.url, "id", table["id"].to_pylist())
        if classes is not None:
            arrays[CLASSES] = _text_array(store.url, CLASSES, list(classes))
        extras = extra_columns(table)
        for name, column in zip(extras.column_names, extras.columns, strict=True):
            if name in arrays or name in (*IMAGES, *LABELS, CLASSES):
                raise InputError(
                    f"{store.url}: column {name!r} has a name with another meaning in an npz; rename it"
                )
            arrays[name] = _column_array(store.url, name, column)
        store.write(f"part-{number:05d}.npz", _archive(arrays))
        images += table.num_rows
    return images


def stack_images(url: str, table: pa.Table, config: DataConfig) -> Pixels:
    """Return a canonical table's images, uint8 (N, H, W, 3). Raises InputError unless all decode to one size."""
    stacked: Pixels | None = None
    names = table["id"].to_pylist()
    for row, (name, data) in enumerate(zip(names, image_bytes(table), strict=True)):
        pixels = decode_required(f"{url}: image {name}", data, config)
        if stacked is None:
            stacked = np.empty((table.num_rows, *pixels.shape), np.uint8)
        elif pixels.shape != stacked.shape[1:]:
            raise InputError(
                f"{url}: images differ in size: {names[0]} is {stacked.shape[2]}x{stacked.shape[1]} and {name} is "
                f"{pixels.shape[1]}x{pixels.shape[0]} pixels; bring them to one size with --resize"
            )
        stacked[row] = pixels
    assert stacked is not None
    return stacked


def _text_array(url: str, name: str, values: list[str]) -> NDArray[np.str_]:
    array = np.array(values, np.str_)
    if array.tolist() != values:  # NumPy drops zeros at the end of a text.
        raise InputError(f"{url}: a text in {name!r} ends in a zero character, which an npz cannot hold")
    return array


def _column_array(url: str, name: str, column: pa.ChunkedArray) -> NDArray[np.generic]:
    kind = column.type
    if column.null_count == 0 and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return _text_array(url, name, column.to_pylist())
    if column.null_count == 0 and (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    ):
        return cast(NDArray[np.generic], column.to_numpy())
    raise InputError(
        f"{url}: column {name!r} ({kind}, {column.null_count} empty) cannot be an array of an npz; use the "
        "parquet layout, or leave such columns out with --set data.extra_columns=drop"
    )


def _archive(arrays: dict[str, NDArray[np.generic]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # A fixed date, so that the same arrays are the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()
