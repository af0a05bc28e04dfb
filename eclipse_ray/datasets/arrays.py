"""Arrays of images: what an array means, and listing and reading the files of the formats that hold arrays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import folder
from eclipse_ray.datasets.images import Pixels, encode_image
from eclipse_ray.datasets.table import Part, SourceFile, canonical_table, check_label, noted_classes, refuse_types
from eclipse_ray.errors import InputError
from eclipse_ray.log import counted, say_once
from eclipse_ray.storage.store import Entry, Store

ADVICE = (
    "expected (images, labels) as a dict, a tuple or a list of pairs; a published file holds only numbers, text, "
    "lists and arrays, so do not open this one with anything else"
)
_APPLY = "add it to its clean set with: eclipse-ray apply DELTA CLEAN DST"
# Images in [0, 1] of which no pixel is brighter than this are more likely the positive half of a perturbation.
_DARK = 0.2
# Rounding errors of arithmetic in half precision.
_SLACK = 2e-3
_SAMPLE_ROWS, _SAMPLE_BYTES = 64, 16 * 2**20

Rows = Callable[[int, int], NDArray[Any]]
Order = Literal["CHW", "HWC", "gray", "planes"]


class Layout(NamedTuple):
    """How an array holds images: the order of its axes, and the value of white (1 or 255)."""

    order: Order
    white: int


class Form(NamedTuple):
    """What is said of a file that is read: its layout, the type of its values, and where its labels come from."""

    layout: Layout
    dtype: str
    labels: str


class ArrayFile(NamedTuple):
    """An open file of images: their shape, type and layout, and functions that read rows `start` to `stop` of it.

    `labels` reads int64 (N), and is None if data.labels says what they are; `whole` says that their type is one of
    whole numbers, so that a listing need not read them. `said` says where the labels come from, "" if the form of
    the file goes without saying. `version` is that of a second file, which holds the labels. `columns` are the
    extra columns, and `kinds` their types.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    layout: Layout
    rows: Rows
    labels: Callable[[int, int], NDArray[np.int64]] | None = None
    whole: bool = False
    said: str = ""
    version: str = ""
    classes: Callable[[], list[str] | None] = lambda: None
    ids: Callable[[int, int], list[str]] | None = None
    paths: Callable[[int, int], list[str]] | None = None
    columns: Mapping[str, Callable[[int, int], pa.Array]] = {}
    kinds: Sequence[pa.Field] = ()


Opener = Callable[[Store, Entry, DataConfig], AbstractContextManager[ArrayFile]]
"""Opens one file of a format; leaving the context closes it."""


def list_parts(
    opened: Opener, store: Store, entries: Sequence[Entry], config: DataConfig
) -> tuple[list[Part], list[str] | None]:
    """Return one part per file that has rows, and the class names if a note or the first file has them.

    Says how the files are read. Raises InputError for a file that holds no images, labels that do not fit,
    or an extra column of several types.
    """
    parts: list[Part] = []
    forms = Counter[Form]()
    labelled: dict[str, bool] = {}
    kinds: dict[str, Sequence[pa.Field]] = {}
    # Arrays that may be one image, and the sizes of gray images in other files, which settle what those are.
    doubtful: dict[str, ArrayFile] = {}
    gray: set[tuple[int, ...]] = set()
    classes = noted_classes(store, config.label_column)
    for entry in entries:
        with opened(store, entry, config) as file:
            rows = file.shape[0]
            if entry is entries[0]:
                # Names of another file need not be those of all labels.
                classes = classes or file.classes()
            if file.labels is not None and not file.whole:
                _check_labels(f"{store.url}/{entry.key}", file.labels(0, rows), classes)
        labelled[entry.key], kinds[entry.key] = file.labels is not None, file.kinds
        if len(file.shape) == 3:
            one = config.label_file is None and (rows == 3 or file.shape[2] in (1, 3))
            if one and not _is_labelled(opened, store, entry, config):
                doubtful[entry.key] = file
            elif rows > 1:
                gray.add(file.shape[1:])
        if file.said:
            forms[Form(file.layout, file.dtype.name, file.said)] += rows
        parts.append(Part(entry.key, rows, entry.size, entry.version + file.version))
    for key, file in doubtful.items():
        if file.shape[1:] not in gray:
            raise InputError(
                f"{store.url}/{key}: holds {file.dtype} {file.shape}, which may be one image or {file.shape[0]} "
                "gray ones; stack the images of all files into one array (N, H, W, 3), (N, H, W, 1) for gray "
                "ones, or write image files"
            )
    folder.refuse_doubtful(store, config, labelled)
    refuse_types(store.url, kinds, config)
    state(store.url, parts, forms)
    return parts, classes


def read_rows(opened: Opener, source: SourceFile, start: int, stop: int) -> pa.Table:
    """Return rows `start` to `stop` of one file as a canonical table; pixels are encoded as PNG, losslessly.

    Raises InputError for a file that is damaged or changed since it was listed.
    """
    where, key = source.where, source.key
    with opened(source.store, source.store.entry(key), source.config) as file:
        if stop > file.shape[0]:
            raise InputError(f"{where}: has fewer than {stop} rows now; it changed, start again from the listing")
        pixels = to_pixels(where, file.rows(start, stop), file.layout)
        labels = None if file.labels is None else file.labels(start, stop)
        _check_labels(where, labels, source.classes)
        extras = {name: column(start, stop) for name, column in file.columns.items()}
        return canonical_table(
            file.ids(start, stop) if file.ids else [f"{key}#{row}" for row in range(start, stop)],
            [encode_image(image, "png") for image in pixels],
            labels,
            pa.table(extras) if extras else None,
            source.classes,
            file.paths(start, stop) if file.paths else None,
        )


def read_labels(opened: Opener, source: SourceFile) -> NDArray[np.int64] | None:
    """Return the labels of one file, None if it has none."""
    with opened(source.store, source.store.entry(source.key), source.config) as file:
        labels = None if file.labels is None else file.labels(0, file.shape[0])
    _check_labels(source.where, labels, source.classes)
    return labels


def _is_labelled(opened: Opener, store: Store, entry: Entry, config: DataConfig) -> bool:
    # Labels count the images, also those that data.labels=none leaves out.
    with opened(store, entry, config.model_copy(update={"labels": None})) as file:
        return file.labels is not None


def _check_labels(where: str, labels: NDArray[np.int64] | None, classes: Sequence[str] | None) -> None:
    for label in () if labels is None else np.unique(labels).tolist():
        check_label(where, label, classes)


# ---- What an array of images means


def order_of(shape: Sequence[int], dtype: np.dtype[Any]) -> Order | None:
    """Return the order of axes of an array of images, None if its shape is that of something else.

    `planes` is (N, 3 * side * side): the red plane of an image, then its green and its blue one.
    """
    if len(shape) == 2:
        side = math.isqrt(shape[1] // 3)
        return "planes" if side >= 8 and 3 * side * side == shape[1] else None
    if len(shape) == 3:
        return "gray"
    if len(shape) != 4:
        return None
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    # Images of 8 bits whose height is 1 or 3 are rare, and lie as (N, H, W, 3).
    if last and (not first or dtype == np.uint8):
        return "HWC"
    return "CHW" if first and not last else None


def check_sides(where: str, shape: Sequence[int], order: Order, config: DataConfig) -> None:
    """Raise InputError if the images of an array of this shape have no pixels, or too many."""
    if order == "planes":
        height = width = math.isqrt(shape[1] // 3)
    else:
        height, width = shape[2:] if order == "CHW" else shape[1:3]
    if shape[0] and not 0 < height * width <= config.max_pixels:
        raise InputError(
            f"{where}: its images have {width}x{height} pixels, data.max_pixels permits {config.max_pixels}; "
            "set it higher or store image files"
        )


def layout_of(where: str, shape: Sequence[int], dtype: np.dtype[Any], rows: Rows) -> Layout:
    """Return the layout of an array of images; `rows(start, stop)` returns some of them.

    Values are read only if they are not uint8. Raises InputError for values that are no images, or doubtful.
    """
    order = order_of(shape, dtype)
    if order is None or dtype.kind not in "iuf":
        raise InputError(f"{where}: holds {dtype} {tuple(shape)}, which are no images; {ADVICE}")
    if dtype == np.uint8 or not shape[0]:
        return Layout(order, 255)
    if dtype == np.int8:
        raise InputError(f"{where}: holds int8 {tuple(shape)}, which is a perturbation, not images; {_APPLY}")
    low, high = _range(where, shape, dtype, rows)
    if low < -_SLACK:
        raise InputError(
            f"{where}: holds values from {low:.4g} to {high:.4g}, expected images in [0, 1] or in 0 to 255; bring "
            f"normalised images back to that; if it is a perturbation, {_APPLY}"
        )
    if dtype.kind == "f" and _DARK <= high <= 1 + _SLACK:
        return Layout(order, 1)
    if high <= 255.5 and (high >= 16 or (dtype.kind != "f" and high > 1)):
        return Layout(order, 255)
    raise InputError(
        f"{where}: holds values from {low:.4g} to {high:.4g}, neither images in [0, 1] nor in 0 to 255; if it is "
        f"a perturbation, {_APPLY}; otherwise save the images as uint8"
    )


def to_pixels(where: str, values: NDArray[Any], layout: Layout) -> Pixels:
    """Return rows of an array of images as uint8 (N, H, W, 3), rounded; gray ones become three equal channels.

    Raises InputError for a value that lies outside of the layout's range.
    """
    if values.dtype != np.uint8 and values.size:
        low, high = float(values.min()), float(values.max())
        if not -_SLACK * layout.white <= low <= high <= layout.white * (1 + _SLACK):
            raise InputError(
                f"{where}: holds values from {low:.4g} to {high:.4g} among images in 0 to {layout.white}; mend it"
            )
        wide = values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32)
        values = np.rint(np.clip(wide * (255 // layout.white), 0, 255)).astype(np.uint8)
    if layout.order == "planes":
        side = math.isqrt(values.shape[1] // 3)
        values = values.reshape(-1, 3, side, side)
    if layout.order in ("CHW", "planes"):
        values = values.transpose(0, 2, 3, 1)
    if layout.order == "gray":
        values = values[..., None]
    return np.repeat(values, 3, axis=3) if values.shape[3] == 1 else values


def are_labels(shape: Sequence[int], dtype: np.dtype[Any], rows: int) -> bool:
    """Return whether an array can hold the labels of `rows` images: (N), (N, 1) or one-hot (N, classes)."""
    return len(shape) in (1, 2) and shape[0] == rows and dtype.kind in "iuf"


def to_labels(where: str, values: NDArray[Any]) -> NDArray[np.int64]:
    """Return labels as int64 (N), from integers, whole floats, (N, 1) or one-hot (N, classes) without loss.

    Raises InputError for everything else, soft labels among them.
    """
    if values.ndim == 2 and values.shape[1] > 1:
        hot = values == 1
        if not (hot.sum(axis=1) == 1).all() or not ((values == 0) | hot).all():
            raise InputError(
                f"{where}: labels {values.dtype} {values.shape} are not one-hot; store one integer per image"
            )
        return hot.argmax(axis=1).astype(np.int64)
    flat = values.reshape(len(values))
    with np.errstate(invalid="ignore"):
        whole = flat.astype(np.int64)
    if flat.dtype == np.uint64 and (whole < 0).any():
        raise InputError(f"{where}: label {flat.max()} is out of range; mend it")
    if not np.array_equal(whole, flat):
        raise InputError(f"{where}: labels of {values.dtype} are not whole numbers; store one integer per image")
    return whole


def state(url: str, parts: Sequence[Part], forms: dict[Form, int]) -> None:
    """Say once per process how a source is read: for each form, the number of images and what they are."""
    where = f"{url}/{parts[0].key}" if len(parts) == 1 else url
    for (layout, dtype, labels), images in forms.items():
        number = np.dtype(dtype)
        kind = "float" if number.kind == "f" else "uint8" if number == np.uint8 else "integer"
        span = "" if number == np.uint8 else " in [0, 1]" if layout.white == 1 else " in 0 to 255"
        order = {"gray": "HW", "planes": "as planes of red, green and blue"}.get(layout.order, layout.order)
        say_once(f"{where}: read as {counted(images, f'{kind} image')}{span}, {order}, {labels}")


def _range(where: str, shape: Sequence[int], dtype: np.dtype[Any], rows: Rows) -> tuple[float, float]:
    # Of the first and the middle rows only, because a file may be as large as a disk.
    count = max(1, min(_SAMPLE_ROWS, _SAMPLE_BYTES // max(1, dtype.itemsize * math.prod(shape[1:]))))
    starts = {0, shape[0] // 2}
    sample = [rows(start, min(start + count, shape[0])) for start in sorted(starts)]
    low, high = min(float(part.min()) for part in sample), max(float(part.max()) for part in sample)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{where}: holds values that are not finite; mend it")
    return low, high
