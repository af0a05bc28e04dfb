"""CIFAR-10 and CIFAR-100 Python batches, read by an unpickler that builds only numbers, text, lists and arrays."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import PARSER_ERRORS
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import Part, canonical_table, check_label
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

_BATCH_NAME = re.compile(r"(data_batch_\d+|test_batch|train|test|.*\.pkl|.*\.pickle)", re.IGNORECASE)
_META = (("batches.meta", "label_names"), ("meta", "fine_label_names"))
_LABELS = ("labels", "fine_labels")


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
    paths = [_text(names[row]) for row in rows] if isinstance(names, list) and len(names) == total else None
    chosen = _labels(where, batch, total, classes)
    return canonical_table(
        [f"{key}#{row}" for row in rows],
        [encode_image(pixels[row], "png") for row in rows],
        None if chosen is None else chosen[start:stop],
        None if coarse is None else pa.table({"coarse_label": coarse[start:stop]}),
        classes,
        paths,
    )


class _Dtype:
    """Replaces numpy.dtype in a pickle; allows only plain numbers."""

    def __init__(self, name: object, *_: object) -> None:
        self.value = np.dtype(_text(name))
        if self.value.kind not in "biuf":
            raise ValueError(f"arrays of {self.value} are not allowed")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if _text(state[1]) == ">":
            self.value = self.value.newbyteorder(">")


class _Array:
    """Replaces numpy.ndarray in a pickle; its values are made from raw bytes after checks."""

    def __init__(self) -> None:
        self.value: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_buffer(raw, dtype, shape, "F" if fortran else "C").value


def _from_buffer(raw: object, dtype: object, shape: object, order: object) -> _Array:
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or _text(order) not in ("C", "F"):
        raise ValueError("an array is described wrongly")
    data = raw.encode("latin-1") if isinstance(raw, str) else raw
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array has no raw bytes")
    array = _Array()
    flat = np.frombuffer(data, dtype.value)
    array.value = flat.reshape(shape, order="F" if _text(order) == "F" else "C")
    return array


def _encode(text: object, encoding: object = "latin1") -> bytes:
    # Protocol 2 writes bytes as text in latin-1. No other codec is needed.
    if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1"):
        raise ValueError("only latin-1 bytes are allowed")
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    return b""


def _reconstruct(*_: object) -> _Array:
    return _Array()


_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
    ("numpy", "dtype"): _Dtype,
    # Occurs only as an argument of _reconstruct, which ignores it.
    ("numpy", "ndarray"): _reconstruct,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}


class _Unpickler(pickle.Unpickler):
    """Resolves only the names in `_ALLOWED`, to replacements in this module."""

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        """Return the replacement of `module.name`. Raises InputError for any other name."""
        stand_in = _ALLOWED.get((module, name))
        if stand_in is None:
            raise InputError(f"the pickle asks for {module}.{name}")
        # A new function each time, because a pickle may set attributes on the object that it gets.
        return lambda *arguments: stand_in(*arguments)


def _load(where: str, data: bytes) -> dict[str, Any]:
    advice = "expected a CIFAR batch of numbers and bytes; do not open this file with anything else"
    try:
        _check_sizes(data)
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except InputError as error:
        raise InputError(f"{where}: {error}, which can run code; {advice}") from None
    except PARSER_ERRORS as error:
        raise InputError(f"{where}: not a readable pickle: {error}; {advice}") from error
    if not isinstance(batch, dict):
        raise InputError(f"{where}: holds {type(batch).__name__}; {advice}")
    return {
        _text(key): value.value if isinstance(value, _Array) else value
        for key, value in batch.items()
        if isinstance(key, str | bytes)
    }


def _check_sizes(data: bytes) -> None:
    # A few bytes can make the C unpickler allocate a memo of two billion places or a bytearray of any length.
    for opcode, argument, place in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and not 0 <= argument <= (place or 0):
            raise ValueError(f"it asks for a memo of {argument} places")


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
    for name, field in _META:
        meta = f"{folder}/{name}" if folder else name
        try:
            names = _load(f"{store.url}/{meta}", store.read(meta)).get(field)
        except FileNotFoundError:
            continue
        if isinstance(names, list):
            return [_text(text) for text in names]
    return None


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value
    raise ValueError(f"expected text, found {type(value).__name__}")
