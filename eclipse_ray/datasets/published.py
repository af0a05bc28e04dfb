"""Poisons as their authors publish them: images as arrays of any usual form, and the .pt, .pth and .pkl files.

A file is one part, read by row ranges. The form is recognised from the content and stated in one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import PARSER_ERRORS, cifar
from eclipse_ray.datasets.images import Pixels, encode_image
from eclipse_ray.datasets.pickles import Tensor, Values, read_file, text_of, values_of
from eclipse_ray.datasets.table import Part, canonical_table, check_label, noted_classes, refuse_half_labelled
from eclipse_ray.errors import InputError
from eclipse_ray.log import say_once
from eclipse_ray.storage.store import Entry, Store

SUFFIXES = (".pt", ".pth", ".pkl", ".pickle")
IMAGES = ("images", "image", "data", "x", "x_train", "samples")
LABELS = ("labels", "label", "targets", "target", "y", "y_train", "fine_labels")
# Words in the names of .npy files of labels.
_LABEL_FILES = ("labels", "label", "targets", "target")
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


class Opened(NamedTuple):
    """A published file: its images, still in the file or in memory, their labels int64 (N), and their layout."""

    images: Values
    labels: NDArray[np.int64] | None
    layout: Layout


def claims(key: str) -> bool:
    """Return whether this format reads an object of this name."""
    return key.lower().endswith(SUFFIXES)


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part per file, and the class names if they are noted; reads pickles, and some rows of tensors.

    Raises InputError for a file that holds no images, a perturbation, or anything that could run code.
    """
    parts: list[Part] = []
    classes = noted_classes(store)
    forms: dict[Form, int] = {}
    labelled: dict[str, bool] = {}
    for entry in entries:
        opened = _open(store.url, entry.key, entry.version)
        if opened is None:
            batches, names = cifar.list_parts(store, [entry], config)
            parts, classes = parts + batches, classes or names
            continue
        images, labels, layout = opened
        labelled[entry.key] = labels is not None
        check_sides(f"{store.url}/{entry.key}", images.shape, layout.order, config)
        form = Form(layout, images.dtype.name, "without labels" if labels is None else "with labels")
        forms[form] = forms.get(form, 0) + len_of(images)
        parts.append(Part(entry.key, len_of(images), entry.size, entry.version))
    refuse_half_labelled(store.url, config, labelled)
    state(store.url, parts, forms)
    return [part for part in parts if part.rows], classes


def read_rows(
    store: Store, key: str, start: int, stop: int, config: DataConfig, classes: Sequence[str] | None
) -> pa.Table:
    """Return rows `start` to `stop` of one file as a canonical table; pixels are encoded as PNG, losslessly."""
    where = f"{store.url}/{key}"
    opened = _open(store.url, key, store.entry(key).version)
    if opened is None:
        return cifar.read_rows(store, key, start, stop, config, classes)
    if stop > len_of(opened.images):
        raise InputError(f"{where}: has fewer than {stop} rows now; it changed, start again from the listing")
    with store.open(key) as file:
        values = rows_of(where, opened.images, file, start, stop)
    labels = None if opened.labels is None else opened.labels[start:stop]
    for label in () if labels is None else labels.tolist():
        check_label(where, label, classes)
    return canonical_table(
        [f"{key}#{row}" for row in range(start, stop)],
        [encode_image(image, "png") for image in to_pixels(where, values, opened.layout)],
        labels,
        None,
        classes,
    )


def read_labels(
    store: Store, key: str, config: DataConfig, classes: Sequence[str] | None
) -> NDArray[np.int64] | None:
    """Return the labels of one file, None if it has none."""
    opened = _open(store.url, key, store.entry(key).version)
    return cifar.read_labels(store, key, config, classes) if opened is None else opened.labels


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


def layout_of(
    where: str, shape: Sequence[int], dtype: np.dtype[Any], rows: Callable[[int, int], NDArray[Any]]
) -> Layout:
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
            f"{where}: holds values from {low:.4g} to {high:.4g}; negative ones are those of a perturbation, "
            f"not of images; {_APPLY}"
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


def state(url: str, parts: Sequence[Part], forms: dict[Form, int]) -> None:
    """Say once per process how a source is read: for each form, the number of images and what they are."""
    where = f"{url}/{parts[0].key}" if len(parts) == 1 else url
    for (layout, dtype, labels), images in forms.items():
        number = np.dtype(dtype)
        kind = "float" if number.kind == "f" else "uint8" if number == np.uint8 else "integer"
        span = "" if number == np.uint8 else " in [0, 1]" if layout.white == 1 else " in 0 to 255"
        order = {"gray": "HW", "planes": "as planes of red, green and blue"}.get(layout.order, layout.order)
        say_once(f"{where}: read as {images:,} {kind} images{span}, {order}, {labels}")


def _range(
    where: str, shape: Sequence[int], dtype: np.dtype[Any], rows: Callable[[int, int], NDArray[Any]]
) -> tuple[float, float]:
    # Of the first and the middle rows only, because a file may be as large as a disk.
    count = max(1, min(_SAMPLE_ROWS, _SAMPLE_BYTES // max(1, dtype.itemsize * math.prod(shape[1:]))))
    starts = {0, shape[0] // 2}
    sample = [rows(start, min(start + count, shape[0])) for start in sorted(starts)]
    low, high = min(float(part.min()) for part in sample), max(float(part.max()) for part in sample)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{where}: holds values that are not finite; mend it")
    return low, high


# ---- What a file holds


def len_of(values: Values) -> int:
    """Return the length of the first axis."""
    return int(values.shape[0])


def rows_of(where: str, values: Values, file: BinaryIO, start: int, stop: int) -> NDArray[Any]:
    """Return rows `start` to `stop` of an array in memory or a tensor in `file`. Raises InputError for damage."""
    if isinstance(values, np.ndarray):
        return values[start:stop]
    return whole_of(where, values[start:stop], file)


def whole_of(where: str, tensor: Tensor, file: BinaryIO) -> NDArray[Any]:
    """Return the values of a tensor in `file`. Raises InputError for damage."""
    try:
        return tensor.read(file)
    except PARSER_ERRORS as error:
        raise InputError(f"{where}: the file is damaged: {error}; copy it again") from error


# A pickle has to be read as a whole for each shard of it; the last one is kept.
@lru_cache(maxsize=1)
def _open(url: str, key: str, version: str) -> Opened | None:
    """Return what the file holds, None for a CIFAR batch."""
    where = f"{url}/{key}"
    with Store(url).open(key) as file:
        content = read_file(where, file, ADVICE)
        if _is_batch(content):
            return None

        def read(values: Values) -> NDArray[Any]:
            return values if isinstance(values, np.ndarray) else whole_of(where, values, file)

        images, labels = _images_and_labels(where, content, read)
        layout = layout_of(
            where, images.shape, images.dtype, lambda start, stop: rows_of(where, images, file, start, stop)
        )
    if labels is not None:
        if not are_labels(labels.shape, labels.dtype, len_of(images)):
            raise InputError(
                f"{where}: labels {labels.dtype} {labels.shape} do not belong to {len_of(images)} images; mend it"
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


def _images_and_labels(where: str, content: Any, read: Reader) -> tuple[Values, NDArray[Any] | None]:
    lone = values_of(content)
    if lone is not None:
        return lone, None
    if isinstance(content, dict):
        return _from_dict(where, content, read)
    if isinstance(content, list | tuple) and content:
        images = values_of(content[0])
        if len(content) == 2 and images is not None and len(images.shape) > 1:
            return images, _label_array(where, content[1], read)
        if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in content):
            items = [pair[0] for pair in content]
            return _stack(where, items, read), _label_array(where, [pair[1] for pair in content], read)
    raise InputError(f"{where}: holds {_named(content)}, not images; {ADVICE}")


def _from_dict(where: str, content: dict[Any, Any], read: Reader) -> tuple[Values, NDArray[Any] | None]:
    named = {text_of(key).lower(): value for key, value in content.items() if isinstance(key, str | bytes)}
    images = [array for name in IMAGES if (array := values_of(named.get(name))) is not None]
    labels = [named[name] for name in LABELS if name in named]
    if len(images) != 1 or len(labels) > 1:
        known = ", ".join(list(named)[:10]) or "nothing"
        raise InputError(f"{where}: a dict of {known}, without one array of images and one of labels; {ADVICE}")
    return images[0], _label_array(where, labels[0], read) if labels else None


def _stack(where: str, items: Sequence[object], read: Reader) -> NDArray[Any]:
    stacked: NDArray[Any] | None = None
    for row, item in enumerate(items):
        pixels = _image(where, row, item, read)
        if stacked is None:
            stacked = np.empty((len(items), *pixels.shape), pixels.dtype)
        if pixels.shape != stacked.shape[1:] or pixels.dtype != stacked.dtype:
            raise InputError(
                f"{where}: images differ: number 0 is {stacked.dtype} {stacked.shape[1:]} and number {row} is "
                f"{pixels.dtype} {pixels.shape}; bring them to one form"
            )
        stacked[row] = pixels
    assert stacked is not None
    return stacked


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
        plain = [label if (each := values_of(label)) is None else read(each).item() for label in labels]
        if all(type(label) in (int, float) for label in plain):
            return np.array(plain, np.int64 if all(type(label) is int for label in plain) else np.float64)
    raise InputError(f"{where}: its labels are {_named(labels)}; store one integer per image")


def _named(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    array = values_of(value)
    return type(value).__name__ if array is None else f"an array {array.dtype} {tuple(array.shape)}"
