"""NumPy files: arrays of images and labels in an .npz, or only images in an .npy. Each file is one part.

NumPy parses the headers of the arrays, and rows are read from the bytes behind them. Nothing is unpickled.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import IO, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import arrays, damage_named
from eclipse_ray.datasets.arrays import ArrayFile, Layout, are_labels, check_sides, layout_of, order_of, to_labels
from eclipse_ray.datasets.images import Pixels, decode_required
from eclipse_ray.datasets.table import (
    FILE_BYTES,
    FILE_IMAGES,
    Part,
    all_labels,
    extra_columns,
    image_bytes,
    regroup,
    say_left_out,
)
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

_DEFAULT_IMAGES = DataConfig.model_fields["image_column"].default
_DEFAULT_LABELS = DataConfig.model_fields["label_column"].default
# Names of arrays that hold the images, the labels, the ids and the class names.
IMAGES = ("images", "image", "x", "X", "x_train", "X_train", "data")
LABELS = ("labels", "label", "targets", "target", "y", "Y", "y_train", "Y_train")
IDS, CLASSES = "id", "classes"
# Words in the names of .npy files of labels.
_LABEL_FILES = ("labels", "label", "targets", "target")
_ADVICE = (
    "expected images as (N, H, W, 3), (N, 3, H, W) or (N, H, W), rows first; convert them and save the file again"
)
_NAMED = (
    "for names of classes, write numpy.save('names.npy', labels.astype(str).ravel()) and read these labels with "
    "--set data.labels=names.npy"
)
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Array(NamedTuple):
    """The header of one array: name in the archive ("" for an .npy), shape, dtype, bytes before the values."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    header: int


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part per file of images, from the array headers only, and the class names if there are any."""
    beside = {_labels_beside(store, entry.key, config) for entry in entries}
    images = [entry for entry in entries if entry.key not in beside]
    return arrays.list_parts(partial(opened, listing=True), store, images, config)


@contextmanager
def opened(store: Store, entry: Entry, config: DataConfig, *, listing: bool = False) -> Iterator[ArrayFile]:
    """Yield what one file holds; when `listing`, say which arrays are left out.

    Raises InputError for object arrays, no images, and labels that do not fit.
    """
    where, beside = f"{store.url}/{entry.key}", _labels_beside(store, entry.key, config)
    with store.open(entry.key) as file:
        held = _arrays(store, entry.key, file)
        images, labels, extras = _choose(where, held, config)
        if listing:
            say_left_out(store.url, held, images.name or "image", labels and labels.name, config)
        read = partial(_rows, where, file)
        labels_of: Callable[[int, int], NDArray[np.int64]] | None = None
        said = "without labels"
        if beside is not None and config.labels is None:
            known = _labels_of(store, beside, images.shape[0])
            labels_of, said = lambda start, stop: known[start:stop], f"with the labels of {beside}"
        elif labels is not None:
            labels_of, said = lambda start, stop: to_labels(where, read(labels, start, stop)), "with labels"
        layout = _layout(store.url, entry.key, entry.version, images)
        plain = images.dtype == np.uint8 and layout.order in ("HWC", "gray") and beside is None
        yield ArrayFile(
            images.shape,
            images.dtype,
            layout,
            partial(read, images),
            labels_of,
            whole=labels is not None and len(labels.shape) == 1 and labels.dtype.kind in "iu",
            said="" if plain else said,
            version="" if beside is None else f"+{store.entry(beside).version}",
            classes=lambda: _own_classes(where, file, held, config),
            ids=partial(_text_rows, where, file, held[IDS]) if IDS in held and held[IDS] in extras else None,
            columns={each.name: partial(_column, where, file, each) for each in extras if each.name != IDS},
            kinds=[pa.field(each.name, pa.from_numpy_dtype(each.dtype)) for each in extras if each.name != IDS],
        )


def stored_ids(store: Store, key: str) -> list[str]:
    """Return the ids in the array `id` of a file, none if it has no such array; only that array is read."""
    with store.open(key) as file:
        ids = _arrays(store, key, file).get(IDS)
        return [] if ids is None else _text_rows(f"{store.url}/{key}", file, ids, 0, ids.shape[0])


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
    with damage_named(f"{store.url}/{key}: not a readable NumPy file", _ADVICE):
        if not key.lower().endswith(".npz"):
            return {"": _header("", file)}
        with zipfile.ZipFile(file) as archive:
            found: dict[str, Array] = {}
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if not name or name in found or name == info.filename:
                    raise ValueError(f"member {info.filename!r} is no array of its own")
                with archive.open(info) as member:
                    found[name] = _header(name, member)
            return found


def _header(name: str, file: IO[bytes]) -> Array:
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"its header has version {version}")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds pickled objects, which can run code when they are loaded")
    if fortran and len(shape) > 1:
        raise ValueError(f"array {name!r} lies in Fortran order, so its rows cannot be read one by one")
    return Array(name, shape, dtype, file.tell())


def _choose(where: str, arrays: dict[str, Array], config: DataConfig) -> tuple[Array, Array | None, list[Array]]:
    """Return the array of images, that of labels if there is one, and the extra arrays."""
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
    if labels is not None and config.labels is None and not are_labels(labels.shape, labels.dtype, rows):
        raise InputError(
            f"{where}: array {labels.name!r} is {labels.dtype} {labels.shape}, expected {rows} integer labels; "
            f"{_NAMED if labels.dtype.kind in 'US' else 'name another one with --set data.label_column=NAME'}"
        )
    # If data.labels says what the labels are, the array is neither read nor does it come along.
    return images, None if config.labels else labels, _extra_arrays(where, arrays, images, labels, config)


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
        if config.label_column not in arrays and config.labels is None:
            raise InputError(
                f"{where}: no array {config.label_column!r} among {', '.join(arrays)}; "
                "name one with --set data.label_column=NAME"
            )
        return arrays.get(config.label_column)
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
        if array in (images, labels) or array.name in (CLASSES, "image", "label") or split:
            continue
        # Arrow has no numbers of more than 8 bytes.
        number = array.dtype.kind in "biuf" and array.dtype.itemsize <= 8 and array.name != IDS
        if array.shape == images.shape[:1] and (number or array.dtype.kind == "U"):
            extras.append(array)
        elif array.name == IDS or config.extra_columns == "keep":
            raise InputError(
                f"{where}: array {array.name!r}, {array.dtype} {array.shape}, has no plain value for each of "
                f"{images.shape[0]} images; leave such arrays out with --set data.extra_columns=drop"
            )
    return extras


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
            advice = "mend it, or move it elsewhere to read the images without labels"
            raise InputError(
                f"{where}: holds {array.dtype} {array.shape} where the labels of {rows} images are expected; "
                f"{_NAMED if array.dtype.kind in 'US' else advice}"
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


def _column(where: str, file: BinaryIO, array: Array, start: int, stop: int) -> pa.Array:
    if array.dtype.kind == "U":
        return pa.array(_text_rows(where, file, array, start, stop), pa.string())
    return pa.array(_rows(where, file, array, start, stop))


def _text_rows(where: str, file: BinaryIO, array: Array, start: int, stop: int) -> list[str]:
    try:
        texts = [str(text) for text in _rows(where, file, array, start, stop).tolist()]
        "".join(texts).encode()
    except ValueError as error:
        raise InputError(f"{where}: holds text that is not valid Unicode: {error}; mend it") from None
    return texts


def _rows(where: str, file: BinaryIO, array: Array, start: int, stop: int) -> NDArray[np.generic]:
    row = array.dtype.itemsize * math.prod(array.shape[1:])
    with damage_named(f"{where}: the NumPy file is damaged", "copy it again"), _values_of(file, array) as stream:
        stream.seek(row * start, io.SEEK_CUR)
        data = stream.read(row * (stop - start))
    if len(data) != row * (stop - start):
        raise InputError(f"{where}: array {array.name!r} ends too soon; copy the file again")
    values = np.frombuffer(data, array.dtype) if array.dtype.itemsize else np.zeros(stop - start, array.dtype)
    native = values.astype(array.dtype.newbyteorder("="), copy=False)
    return native.reshape(stop - start, *array.shape[1:])


@contextmanager
def _values_of(file: BinaryIO, array: Array) -> Iterator[IO[bytes]]:
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
                yield member


def _own_classes(where: str, file: BinaryIO, held: dict[str, Array], config: DataConfig) -> list[str] | None:
    # They are those of the labels under a usual name, if there are such.
    others = config.label_column != _DEFAULT_LABELS and {*held} & {*LABELS} - {config.label_column}
    array = None if others else held.get(CLASSES)
    if array is None or array.dtype.kind != "U" or len(array.shape) != 1:
        return None
    return _text_rows(where, file, array, 0, array.shape[0])


def label_files(key: str, *, shared: bool = True) -> Iterator[str]:
    """Yield the keys at which the labels of the .npy file `key` may lie beside it, the likeliest first.

    With `shared` these include the names of one file of labels for all images of a folder, as in CIFAR-10-C.
    """
    folder, slash, base = key.rpartition("/")
    words = base.rpartition(".")[0].split("_")
    if words[-1].lower() in _LABEL_FILES or words[0].lower() == "y":
        return
    names: list[str] = []
    if words[0].lower() == "x":
        counts = range(len(words), 1 if len(words) > 1 else 0, -1)
        names += ["_".join([first, *words[1:count]]) for count in counts for first in "yY"]
    for place, word in enumerate(words):
        if word.lower() in ("data", "images", "image", "imgs", "samples"):
            names += ["_".join([*words[:place], label, *words[place + 1 :]]) for label in _LABEL_FILES]
    names += _LABEL_FILES if shared else ()
    yield from (f"{folder}{slash}{each}.npy" for each in names)


def labels_beside(store: Store, key: str) -> NDArray[np.int64] | None:
    """Return the labels in a file beside the .npy file `key` that is named after it, None if there is none."""
    label_key = next((name for name in label_files(key, shared=False) if store.exists(name)), None)
    return None if label_key is None else _labels_of(store, label_key, read_array(store, key)[0].shape[0])


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
    names = table["id"].to_pylist()
    images: list[Pixels] = []
    for name, data in zip(names, image_bytes(table), strict=True):
        images.append(decode_required(f"{url}: image {name}", data, config))
        (height, width, _), first = images[-1].shape, images[0].shape
        if images[-1].shape != first:
            raise InputError(
                f"{url}: images differ in size: {names[0]} is {first[1]}x{first[0]} and {name} is "
                f"{width}x{height} pixels; bring them to one size with --resize"
            )
    return np.stack(images)


def _text_array(url: str, name: str, values: list[str]) -> NDArray[np.str_]:
    array = np.array(values, np.str_)
    if array.tolist() != values:  # NumPy drops zeros at the end of a text.
        raise InputError(f"{url}: a text in {name!r} ends in a zero character, which an npz cannot hold")
    return array


def _column_array(url: str, name: str, column: pa.ChunkedArray) -> NDArray[np.generic]:
    kind = column.type
    if column.null_count == 0 and pa.types.is_string(kind):
        return _text_array(url, name, column.to_pylist())
    if column.null_count == 0 and (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    ):
        return column.to_numpy()
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
