"""Canonical tables to CIFAR-10 and CIFAR-100 python batches, byte for byte as Python 2 wrote the originals.

The pickle is put together from numbers and bytes here, not by `pickle`: so text stays what the originals have,
which readers with encoding="latin1" (torchvision) and "bytes" both expect, and any NumPy can load it.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.images import Pixels
from eclipse_ray.datasets.npz_writer import stack_images
from eclipse_ray.datasets.table import all_labels, extra_columns, regroup
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

_SIDE = 32
_BATCH_IMAGES = 10_000
# CIFAR-100 is one file, and the pickle counts its bytes in 32 bits.
_MOST_IN_ONE_FILE = 500_000
_COARSE = "coarse_label"
_ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01%s%s\x86"
    b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89%stb"
)


def write(store: Store, tables: Iterable[pa.Table], classes: Sequence[str] | None, config: DataConfig) -> int:
    """Write canonical `tables` as data_batch_1 and so on, or with coarse labels as one `train`; return the count.

    Raises InputError for images that are not 32 x 32, undecodable ones, missing labels, and other extra columns.
    """
    images = 0
    coarse: bool | None = None
    for number, table in enumerate(_batches(tables), start=1):
        found = _has_coarse(store.url, table)
        if coarse not in (None, found) or (found and number > 1):
            raise InputError(
                f"{store.url}: CIFAR-100 is one file of at most {_MOST_IN_ONE_FILE} images, all of them with a "
                f"{_COARSE}; use the parquet layout"
            )
        coarse = found
        key = "train" if coarse else f"data_batch_{number}"
        store.write(key, _batch(store.url, table, number, coarse, config))
        images += table.num_rows
    if classes is not None:
        name, field = ("meta", "fine_label_names") if coarse else ("batches.meta", "label_names")
        store.write(name, _pickled({field: _list([_string(text.encode()) for text in classes])}))
    return images


def _batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    rest = iter(tables)
    for first in rest:
        most = _MOST_IN_ONE_FILE if _COARSE in first.column_names else _BATCH_IMAGES
        yield from regroup(itertools.chain([first], rest), most, 2**62)


def _has_coarse(url: str, table: pa.Table) -> bool:
    extras = set(extra_columns(table).column_names)
    others = sorted(extras - {_COARSE})
    column = table[_COARSE] if _COARSE in extras else None
    if others or (column is not None and (column.null_count or not pa.types.is_integer(column.type))):
        raise InputError(
            f"{url}: a CIFAR batch cannot hold the column {(others or [_COARSE])[0]!r}; use the parquet layout, "
            "or leave such columns out with --set data.extra_columns=drop"
        )
    return column is not None


def _batch(url: str, table: pa.Table, number: int, coarse: bool, config: DataConfig) -> bytes:
    pixels = stack_images(url, table, config)
    if pixels.shape[1:3] != (_SIDE, _SIDE):
        raise InputError(
            f"{url}: CIFAR batches hold images of {_SIDE}x{_SIDE} pixels, these have "
            f"{pixels.shape[2]}x{pixels.shape[1]}; resize them with --resize {_SIDE} or use another layout"
        )
    content = {"batch_label": _string(f"training batch {number}".encode()), "data": _array(pixels)}
    labels = all_labels(url, table)
    if labels is not None:
        content["fine_labels" if coarse else "labels"] = _list([_integer(url, label) for label in labels])
    if coarse:
        content["coarse_labels"] = _list([_integer(url, label) for label in table[_COARSE].to_pylist()])
    names = zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True)
    content["filenames"] = _list([_string((image["path"] or name).encode()) for name, image in names])
    return _pickled(content)


def _pickled(content: dict[str, bytes]) -> bytes:
    # Protocol 2; an empty dict, then all keys and values at once.
    return b"\x80\x02}(" + b"".join(_string(key.encode()) + value for key, value in content.items()) + b"u."


def _string(data: bytes) -> bytes:
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def _integer(url: str, value: int) -> bytes:
    if not -(2**31) <= value < 2**31:
        raise InputError(f"{url}: label {value} does not fit a CIFAR batch; use the parquet layout")
    return b"J" + struct.pack("<i", value) if not 0 <= value < 256 else b"K" + bytes([value])


def _list(items: Sequence[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def _array(pixels: Pixels) -> bytes:
    # uint8 (N, H, W, 3) as a row an image: all red values, then all green, then all blue.
    flat = pixels.transpose(0, 3, 1, 2).tobytes()
    rows, width = len(pixels), 3 * _SIDE * _SIDE
    return _ARRAY % (b"J" + struct.pack("<i", rows), b"J" + struct.pack("<i", width), _string(flat))
