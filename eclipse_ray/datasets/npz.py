"""NumPy files: arrays of images and labels in an .npz, or only images in an .npy. Each file is one part.

NumPy parses the headers of the arrays, and rows are read from the bytes behind them. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import PARSER_ERRORS
from eclipse_ray.datasets.images import Pixels, decode_required, encode_image
from eclipse_ray.datasets.published import (
    Form,
    Layout,
    are_labels,
    check_sides,
    label_files,
    layout_of,
    order_of,
    state,
    to_labels,
    to_pixels,
)
from eclipse_ray.datasets.table import (
    FILE_BYTES,
    FILE_IMAGES,
    Part,
    all_labels,
    canonical_table,
    check_label,
    extra_columns,
    image_bytes,
    noted_classes,
    refuse_half_labelled,
    regroup,
)
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

_DEFAULT_IMAGES = DataConfig.model_fields["image_column"].default
_DEFAULT_LABELS = DataConfig.model_fields["label_column"].default
# Names of arrays that hold the images, the labels, the ids and the class names.
IMAGES = ("images", "image", "x", "X", "x_train", "X_train", "data")
LABELS = ("labels", "label", "targets", "target", "y", "Y", "y_train", "Y_train")
IDS, CLASSES = "id", "classes"
_ADVICE = (
    "expected images as (N, H, W, 3), (N, 3, H, W) or (N, H, W), rows first; convert them and save the file again"
)
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Array(NamedTuple):
    """The header of one array: name in the archive ("" for an .npy), shape, dtype, bytes before the values."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    header: int


class Chosen(NamedTuple):
    """The arrays of a file by their role."""

    images: Array
    labels: Array | None
    extras: list[Array]


def claims(key: str) -> bool:
    """Return whether this format reads an object of this name."""
    return key.lower().endswith((".npz", ".npy"))


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part per file, from the array headers only, and the class names if the file or a note has them.

    Raises InputError for object arrays, for a file without images, and if the labels do not match the
    images.
    """
    parts = []
    forms: dict[Form, int] = {}
    labelled: dict[str, bool] = {}
    beside = {entry.key: _labels_beside(store, entry.key, config) for entry in entries}
    for entry in entries:
        if entry.key in beside.values():
            continue
        where, version = f"{store.url}/{entry.key}", entry.version
        with store.open(entry.key) as file:
            chosen = _choose(where, _arrays(store, entry.key, file), config)
            labels, images = chosen.labels, chosen.images
            if labels is not None and not (len(labels.shape) == 1 and labels.dtype.kind in "iu"):
                to_labels(where, _rows(where, file, labels, 0, labels.shape[0]))
        text = "without labels" if labels is None else "with labels"
        label_key = beside[entry.key]
        labelled[entry.key] = labels is not None or label_key is not None
        if label_key is not None:
            _labels_of(store, label_key, images.shape[0])
            version, text = f"{version}+{store.entry(label_key).version}", f"with the labels of {label_key}"
        layout = _layout(store.url, entry.key, entry.version, images)
        if images.dtype != np.uint8 or layout.order not in ("HWC", "gray") or label_key is not None:
            form = Form(layout, images.dtype.name, text)
            forms[form] = forms.get(form, 0) + images.shape[0]
        parts.append(Part(entry.key, images.shape[0], entry.size, version))
    refuse_half_labelled(store.url, config, labelled)
    state(store.url, parts, forms)
    classes = noted_classes(store) or _own_classes(store, entries[0].key)
    return [part for part in parts if part.rows], classes


def read_rows(
    store: Store, key: str, start: int, stop: int, config: DataConfig, classes: Sequence[str] | None
) -> pa.Table:
    """Return rows `start` to `stop` of one file as a canonical table; pixels are encoded as PNG, losslessly.

    Raises InputError for a file that is damaged or changed since it was listed.
    """
    where = f"{store.url}/{key}"
    with store.open(key) as file:
        arrays = _arrays(store, key, file)
        chosen = _choose(where, arrays, config)
        if stop > chosen.images.shape[0]:
            raise InputError(f"{where}: has fewer than {stop} rows now; it changed, start again from the listing")
        values = _rows(where, file, chosen.images, start, stop)
        labels = None if chosen.labels is None else _rows(where, file, chosen.labels, start, stop)
        ids = next((array for array in chosen.extras if array.name == IDS), None)
        names = [f"{key}#{row}" for row in range(start, stop)]
        if ids is not None:
            names = _texts(where, _rows(where, file, ids, start, stop))
        extras = {
            array.name: _column(where, _rows(where, file, array, start, stop))
            for array in chosen.extras
            if array.name != IDS
        }
    label_key = _labels_beside(store, key, config)
    if label_key is not None:
        labels = _labels_of(store, label_key, chosen.images.shape[0])[start:stop]
    pixels = to_pixels(where, values, _layout(store.url, key, store.entry(key).version, chosen.images))
    return canonical_table(
        names,
        [encode_image(image, "png") for image in pixels],
        None if labels is None else _checked(where, labels, classes),
        pa.table(extras) if extras else None,
        classes,
    )


def read_labels(
    store: Store, key: str, config: DataConfig, classes: Sequence[str] | None
) -> NDArray[np.int64] | None:
    """Return the labels of one file, None if it has none."""
    where = f"{store.url}/{key}"
    label_key = _labels_beside(store, key, config)
    with store.open(key) as file:
        chosen = _choose(where, _arrays(store, key, file), config)
        rows = chosen.images.shape[0]
        if label_key is not None:
            return _labels_of(store, label_key, rows)
        if chosen.labels is None:
            return None
        return _checked(where, _rows(where, file, chosen.labels, 0, rows), classes)


def stored_ids(store: Store, key: str) -> list[str]:
    """Return the ids in the array `id` of a file, none if it has no such array; only that array is read."""
    with store.open(key) as file:
        ids = _arrays(store, key, file).get(IDS)
        where = f"{store.url}/{key}"
        return [] if ids is None else _texts(where, _rows(where, file, ids, 0, ids.shape[0]))


def write(store: Store, tables: Iterable[pa.Table], classes: Sequence[str] | None, config: DataConfig) -> int:
    """Write canonical `tables` as part-00000.npz and so on; return the number of images.

    Each file holds images, labels, id, classes and the extra columns. Raises InputError for images of two sizes,
    images that cannot be decoded, missing values, and columns that are neither numbers nor text.
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


def _arrays(store: Store, key: str, file: BinaryIO) -> dict[str, Array]:
    where = f"{store.url}/{key}"
    try:
        if not key.lower().endswith(".npz"):
            return {"": _header("", file)}
        with zipfile.ZipFile(file) as archive:
            found: dict[str, Array] = {}
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if not name or name in found or name == info.filename:
                    raise ValueError(f"member {info.filename!r} is no array of its own")
                with archive.open(info) as member:
                    found[name] = _header(name, cast(BinaryIO, member))
            return found
    except PARSER_ERRORS as error:
        raise InputError(f"{where}: not a readable NumPy file: {error}; {_ADVICE}") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # A failing disk or network, which may heal.
            raise
        raise InputError(f"{where}: not a readable NumPy file: {error}; {_ADVICE}") from error


def _header(name: str, file: BinaryIO) -> Array:
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"its header has version {version}")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds pickled objects, which can run code when they are loaded")
    if fortran and len(shape) > 1:
        raise ValueError(f"array {name!r} lies in Fortran order, so its rows cannot be read one by one")
    return Array(name, shape, dtype, file.tell())


def _choose(where: str, arrays: dict[str, Array], config: DataConfig) -> Chosen:
    images = _image_array(where, arrays, config)
    order = order_of(images.shape, images.dtype)
    if order is None or images.dtype.kind not in "iuf":
        name = f"array {images.name!r} is" if images.name else "holds"
        flat = len(images.shape) < 3 and not images.name
        hint = "; if these are labels, name the file of the images and give data.labels=FILE" if flat else ""
        raise InputError(f"{where}: {name} {images.dtype} {images.shape}; {_ADVICE}{hint}")
    check_sides(where, images.shape, order, config)
    rows = images.shape[0]
    labels = _label_array(where, arrays, images, config)
    if labels is not None and not are_labels(labels.shape, labels.dtype, rows):
        raise InputError(
            f"{where}: array {labels.name!r} is {labels.dtype} {labels.shape}, expected {rows} integer labels; "
            "name another one with --set data.label_column=NAME"
        )
    return Chosen(images, labels, _extra_arrays(where, arrays, images, labels, config))


def _image_array(where: str, arrays: dict[str, Array], config: DataConfig) -> Array:
    if "" in arrays:
        return arrays[""]
    if config.image_column != _DEFAULT_IMAGES:
        if config.image_column in arrays:
            return arrays[config.image_column]
        found = []
    else:
        found = [arrays[name] for name in IMAGES if name in arrays]
    like = [array.name for array in arrays.values() if _is_like_images(array)]
    if len(found) == 1 and set(like) <= {found[0].name}:
        return found[0]
    known = ", ".join(f"{array.name} {array.dtype} {array.shape}" for array in arrays.values()) or "nothing"
    raise InputError(
        f"{where}: holds {known}; name the one array of images with "
        f"--set data.image_column={like[0] if like else 'NAME'} and its labels with data.label_column"
    )


def _is_like_images(array: Array) -> bool:
    return array.dtype == np.uint8 and len(array.shape) in (3, 4)


def _label_array(where: str, arrays: dict[str, Array], images: Array, config: DataConfig) -> Array | None:
    if "" in arrays:
        return None
    if config.label_column != _DEFAULT_LABELS:
        if config.label_column not in arrays:
            raise InputError(
                f"{where}: no array {config.label_column!r} among {', '.join(arrays)}; "
                "name one with --set data.label_column=NAME"
            )
        return arrays[config.label_column]
    # Images x_test go with labels y_test, and x with y.
    names = [f"y{images.name[1:]}", *LABELS] if images.name.startswith("x") else list(LABELS)
    return next((arrays[name] for name in names if name in arrays), None)


def _extra_arrays(
    where: str, arrays: dict[str, Array], images: Array, labels: Array | None, config: DataConfig
) -> list[Array]:
    extras = []
    for array in arrays.values():
        # If data.image_column names the images, other images and their labels belong to another split.
        split = config.image_column != _DEFAULT_IMAGES and (_is_like_images(array) or array.name.startswith("y"))
        if array in (images, labels) or array.name == CLASSES or split:
            continue
        fits = array.shape == images.shape[:1] and array.dtype.kind in ("U" if array.name == IDS else "biufU")
        if fits:
            extras.append(array)
        elif array.name == IDS or config.extra_columns == "keep":
            raise InputError(
                f"{where}: array {array.name!r}, {array.dtype} {array.shape}, has no plain value for each of "
                f"{images.shape[0]} images; leave such arrays out with --set data.extra_columns=drop"
            )
    return extras


def _checked(where: str, labels: NDArray[np.generic], classes: Sequence[str] | None) -> NDArray[np.int64]:
    whole = to_labels(where, labels)
    for label in whole.tolist():
        check_label(where, label, classes)
    return whole


def _labels_beside(store: Store, key: str, config: DataConfig) -> str | None:
    folder, slash, name = key.rpartition("/")
    if not name.lower().endswith(".npy"):
        return None
    if config.label_column == _DEFAULT_LABELS:
        return next((found for found in label_files(key) if store.exists(found)), None)
    named = f"{config.label_column}.npy"
    if name != named and not store.exists(f"{folder}{slash}{named}"):
        raise InputError(
            f"{store.url}/{key}: no file {named} lies beside it; name the one with its labels with "
            "--set data.labels=FILE"
        )
    return None if name == named else f"{folder}{slash}{named}"


def _labels_of(store: Store, key: str, rows: int) -> NDArray[np.int64]:
    where = f"{store.url}/{key}"
    with store.open(key) as file:
        array = _arrays(store, key, file)[""]
        if not are_labels(array.shape, array.dtype, rows):
            raise InputError(
                f"{where}: holds {array.dtype} {array.shape} where the labels of {rows} images are expected; "
                "mend it, or move it elsewhere to read the images without labels"
            )
        return to_labels(where, _rows(where, file, array, 0, rows))


# A file is sampled once per process, not once per shard; `version` tells that it is still the same file.
@lru_cache(maxsize=256)
def _layout(url: str, key: str, version: str, images: Array) -> Layout:
    where = f"{url}/{key}"
    with Store(url).open(key) as file:
        return layout_of(
            where, images.shape, images.dtype, lambda start, stop: _rows(where, file, images, start, stop)
        )


def _column(where: str, values: NDArray[np.generic]) -> pa.Array:
    return pa.array(_texts(where, values), pa.string()) if values.dtype.kind == "U" else pa.array(values)


def _texts(where: str, values: NDArray[np.generic]) -> list[str]:
    try:
        texts = [str(text) for text in values.tolist()]
        "".join(texts).encode()
    except ValueError as error:
        raise InputError(f"{where}: holds text that is not valid Unicode: {error}; mend it") from None
    return texts


def _rows(where: str, file: BinaryIO, array: Array, start: int, stop: int) -> NDArray[np.generic]:
    row = array.dtype.itemsize * math.prod(array.shape[1:])
    try:
        with _values_of(file, array) as stream:
            stream.seek(row * start, io.SEEK_CUR)
            data = stream.read(row * (stop - start))
    except PARSER_ERRORS as error:
        raise InputError(f"{where}: the NumPy file is damaged: {error}; copy it again") from error
    if len(data) != row * (stop - start):
        raise InputError(f"{where}: array {array.name!r} ends too soon; copy the file again")
    values = np.frombuffer(data, array.dtype) if array.dtype.itemsize else np.zeros(stop - start, array.dtype)
    native = values.astype(array.dtype.newbyteorder("="), copy=False)
    return native.reshape(stop - start, *array.shape[1:])


@contextmanager
def _values_of(file: BinaryIO, array: Array) -> Iterator[BinaryIO]:
    # Yields a stream positioned at the first value of an array.
    if array.name == "":
        file.seek(array.header)
        yield file
        return
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(f"{array.name}.npy")
        if info.compress_type == zipfile.ZIP_STORED:
            # A seek of zipfile reads all bytes that it skips. In the file itself a seek is free.
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            file.seek(info.header_offset + 30 + name + extra + array.header)
            yield file
        else:
            with archive.open(info) as member:
                member.seek(array.header)
                yield cast(BinaryIO, member)


def _own_classes(store: Store, key: str) -> list[str] | None:
    if not key.lower().endswith(".npz"):
        return None
    with store.open(key) as file:
        array = _arrays(store, key, file).get(CLASSES)
        if array is None or array.dtype.kind != "U" or len(array.shape) != 1:
            return None
        where = f"{store.url}/{key}"
        return _texts(where, _rows(where, file, array, 0, array.shape[0]))


def labels_beside(store: Store, key: str) -> NDArray[np.int64] | None:
    """Return the labels in a file beside the .npy file `key` that is named after it, None if there is none."""
    label_key = next((name for name in label_files(key, shared=False) if store.exists(name)), None)
    if label_key is None:
        return None
    with store.open(key) as file:
        return _labels_of(store, label_key, _arrays(store, key, file)[""].shape[0])


def read_array(store: Store, key: str) -> tuple[Array, Callable[[int, int], NDArray[np.generic]]]:
    """Return the header of the array in an .npy file, and a function that reads some of its rows."""
    where = f"{store.url}/{key}"

    def rows(start: int, stop: int) -> NDArray[np.generic]:
        with store.open(key) as file:
            return _rows(where, file, array, start, stop)

    with store.open(key) as file:
        array = _arrays(store, key, file)[""]
    return array, rows


def stack_images(url: str, table: pa.Table, config: DataConfig) -> Pixels:
    """Return the images of a canonical table, uint8 (N, H, W, 3). Raises InputError unless they have one size."""
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
            # ZipInfo has a fixed date, so that the same arrays give the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)
    return buffer.getvalue()
