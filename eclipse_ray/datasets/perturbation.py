"""Perturbations as their authors publish them, added to the clean set for which they were made."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, Half, Rounding, Unit
from eclipse_ray.datasets import folder, npz, published
from eclipse_ray.datasets.arrays import order_of
from eclipse_ray.datasets.formats import Source, open_source, read_labels, read_tables
from eclipse_ray.datasets.images import Pixels, check_encoding, encode_image
from eclipse_ray.datasets.labels import read_label_file
from eclipse_ray.datasets.memory import decode_resized
from eclipse_ray.datasets.pickles import read_file, text_of, values_of
from eclipse_ray.datasets.table import image_bytes, with_images
from eclipse_ray.datasets.write import refuse_existing, write_dataset
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.log import counted, say
from eclipse_ray.storage.store import Store

# Of a table that begins at an image number: its perturbations, None for an image that stays as it is.
Chooser = Callable[[int, pa.Table], Iterable[NDArray[Any] | None]]
RECORD = "_eclipse/perturbation.json"
_ADVICE = (
    "expected one array of perturbations, as .npy, or as .pt, .pth or .pkl of numbers, text, lists and arrays"
)
_KEYS = ("delta", "perturbation", "perturbations", "noise", "model")
_FACTORS = {"1": 255.0, "255": 1.0, "8/255": 8.0}
_CHUNK_BYTES = 16 * 2**20
# A perturbation in [-1, 1] that exceeds this in many pixels is as likely in units of a bound as in units of white.
_LARGE, _MANY = 0.25, 0.05


@dataclass(frozen=True)
class Applied:
    """A poisoned dataset: images in all and perturbed ones, and how the perturbation was read and added.

    `linf_255` is the largest change of a stored value, in 1/255; `l2` is the mean L2 norm of the change of a
    perturbed image with values in [0, 1]. Both are measured after the images were stored in 8 bits.
    """

    images: int
    perturbed: int
    linf_255: int
    l2: float
    kind: str
    unit: str
    half: str
    rounding: str
    output: str


@dataclass(frozen=True)
class _Delta:
    """A perturbation file: `rows(start, stop)` reads along the first axis; `labels` int64 if they lie beside it.

    `shape` is (rows, ...) of one draw; with `draws` > 1 the first axis of the file counts the draws.
    """

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Callable[[int, int], NDArray[Any]]
    draws: int = 1
    bounded: bool = False
    labels: NDArray[np.int64] | None = None

    def whole(self) -> NDArray[Any]:
        """Return all values as (draws, rows, ...)."""
        return self.rows(0, self.shape[0] if self.draws == 1 else self.draws).reshape(self.draws, *self.shape)


def apply(
    delta: str,
    clean: str,
    output: str,
    data_config: DataConfig,
    *,
    half: Half = "signed",
    rounding: Rounding = "nearest",
    index: str = "order",
    seed: int = 0,
    unit: Unit = "auto",
) -> Applied:
    """Write the dataset `clean` with the perturbations of the file `delta` added, and return what was done.

    `half` "positive" drops negative values, as the loader of EM does. `index` is "order" (row i belongs to image
    i; one row per class or one for all images are recognised), "class" (the row of the image's label), or a file
    of image numbers to perturb. `unit` says what a value of 1 is; "auto" recognises it from the values. `seed`
    draws one of several perturbations of an image. Ids, labels and extra columns are those of `clean`. Raises
    InputError for a perturbation that does not fit the images or whose unit is doubtful. Image i is the one of the
    i-th number where names of files differ in numbers alone, else the i-th that is read.
    """
    _check_choices(half, rounding, unit)
    check_encoding(data_config.encoding, data_config.allow_lossy)
    doing = f"apply {Store(delta).url} {Store(clean).url}"
    refuse_existing(Store(output), doing)
    source = open_source(clean, data_config)
    noise = _load(delta)
    unit = _unit(noise, unit)
    kind, choose = _chooser(noise, source, index, seed)
    say(
        f"{delta}: read as a {kind} perturbation {noise.dtype} {noise.shape} in units of {unit}, {half}, "
        f"rounding {rounding}"
    )
    channels_first = order_of(noise.shape, np.dtype(np.float32)) == "CHW"
    changes: list[tuple[int, float]] = []

    def add(name: str, pixels: Pixels, values: NDArray[Any]) -> Pixels:
        where, values = f"{noise.where}: for image {name}", values.transpose(1, 2, 0) if channels_first else values
        after = add_perturbation(where, pixels, values, _FACTORS[unit], half, rounding)
        change = after.astype(np.float64) - pixels
        changes.append((int(np.abs(change).max()), float(np.linalg.norm(change)) / 255))
        return after

    tables = _perturbed(source, choose, add)
    images = write_dataset(
        output, tables, classes=source.classes, source=clean, doing=doing, passed_over=source.passed_over
    )
    perturbed, linf = len(changes), max((largest for largest, _ in changes), default=0)
    l2 = sum(norm for _, norm in changes) / max(1, perturbed)
    applied = Applied(images, perturbed, linf, l2, kind, unit, half, rounding, output)
    record = {**asdict(applied), "delta": delta, "clean": clean, "index": index, "seed": seed}
    Store(output).write(RECORD, json.dumps(record, indent=2).encode())
    say(f"{output}: {perturbed:,} of {counted(images, 'image')} changed by at most {linf}/255, mean L2 {l2:.3f}")
    return applied


def _perturbed(
    source: Source, choose: Chooser, add: Callable[[str, Pixels, NDArray[Any]], Pixels]
) -> Iterator[pa.Table]:
    start = 0
    for table in read_tables(source):
        encoded = []
        rows = zip(table["id"].to_pylist(), image_bytes(table), choose(start, table), strict=True)
        for name, data, values in rows:
            pixels = decode_resized(source.url, name, data, source.data)
            pixels = pixels if values is None else add(name, pixels, values)
            encoded.append(encode_image(pixels, source.data.encoding))
        yield with_images(table, encoded)
        start += table.num_rows


def _check_choices(half: str, rounding: str, unit: str) -> None:
    for name, value, known in (
        ("half", half, ("signed", "positive")),
        ("round", rounding, ("nearest", "truncate")),
        ("unit", unit, ("auto", *_FACTORS)),
    ):
        if value not in known:
            raise ConfigError(f"--{name} {value!r} is unknown; use {' or '.join(known)}")


# ---- Reading


def _load(url: str) -> _Delta:
    store = Store(url)
    if not store.is_file():
        raise InputError(f"{url}: there is no such file; name one perturbation file (.pt, .pth, .pkl or .npy)")
    base, _, key = store.url.rpartition("/")
    store = Store(base or "/")
    where = f"{store.url}/{key}"
    if key.lower().endswith(".npy"):
        array, rows = npz.read_array(store, key)
        delta = _Delta(where, array.shape, array.dtype, rows, labels=npz.labels_beside(store, key))
    elif key.lower().endswith(published.SUFFIXES):
        delta = _from_pickle(store, key)
    else:
        raise InputError(f"{where}: not a perturbation file; {_ADVICE}")
    if len(delta.shape) == 5:
        delta = replace(delta, draws=delta.shape[0], shape=delta.shape[1:])
    if len(delta.shape) == 3 and delta.draws == 1:
        lone = delta.rows(0, delta.shape[0])[None]
        delta = replace(delta, shape=lone.shape, rows=lambda start, stop: lone[start:stop])
    if (
        len(delta.shape) != 4
        or order_of(delta.shape, np.dtype(np.float32)) is None
        or delta.dtype.kind not in "iuf"
    ):
        raise InputError(
            f"{where}: holds {delta.dtype} {delta.shape}; expected perturbations as (N, 3, H, W), (N, H, W, 3), "
            "(3, H, W), (H, W, 3) or (K, N, 3, H, W)"
        )
    return delta


def _from_pickle(store: Store, key: str) -> _Delta:
    where = f"{store.url}/{key}"
    with store.open(key) as file:
        content = read_file(where, file, _ADVICE)
    if isinstance(content, list | tuple) and len(content) == 2 and values_of(content[0]) is not None:
        raise InputError(
            f"{where}: holds a pair; as TAP packs it, that is a perturbation in normalised space and its ids: "
            "multiply the first by the standard deviation of each channel and save it alone"
        )
    names: list[str] = []
    while isinstance(content, dict):
        named = {text_of(name): value for name, value in content.items() if isinstance(name, str | bytes)}
        found = [name for name in _KEYS if name in named]
        if len(found) != 1:
            raise InputError(f"{where}: a dict of {', '.join(list(named)[:10]) or 'nothing'}; {_ADVICE}")
        names.append(found[0])
        content = named[found[0]]
    values = values_of(content)
    if values is None or not values.shape:
        raise InputError(f"{where}: holds {type(content).__name__}; {_ADVICE}")

    def rows(start: int, stop: int) -> NDArray[Any]:
        with store.open(key) as file:
            return published.rows_of(where, values, file, start, stop)

    # Contrastive poisoning stores multiples of its bound, 8/255.
    return _Delta(where, tuple(values.shape), values.dtype, rows, bounded=names == ["model", "delta"])


def _unit(noise: _Delta, unit: Unit) -> Unit:
    """Return the unit of a perturbation: the one given, or the one that its values leave no doubt about."""
    low, high, large, whole = math.inf, -math.inf, 0, True
    length = noise.shape[0] if noise.draws == 1 else noise.draws
    row = max(1, math.prod(noise.shape[1:] if noise.draws == 1 else noise.shape) * noise.dtype.itemsize)
    step = max(1, _CHUNK_BYTES // row)
    for start in range(0, length, step):
        values = noise.rows(start, min(start + step, length))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        large += int((np.abs(values.astype(np.float32)) > _LARGE).sum())
        whole = whole and bool((values == np.rint(values)).all())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{noise.where}: holds values that are not finite; mend it")
    peak = max(-low, high)
    if peak > 255:
        raise InputError(f"{noise.where}: holds values from {low:.4g} to {high:.4g}; a perturbation ends at 255")
    if unit != "auto":
        return unit
    if noise.bounded:
        return "8/255"
    if noise.dtype.kind in "iu" or peak > 1.001:
        return "255"
    dense = large > _MANY * noise.draws * math.prod(noise.shape)
    if peak and (whole or dense):
        raise InputError(
            f"{noise.where}: holds values from {low:.4g} to {high:.4g}, so that its unit is doubtful; say what a "
            "value of 1 is: --unit 1 (white), 255 (one step of 8 bits) or 8/255 (contrastive poisoning)"
        )
    return "1"


# ---- Which perturbation an image gets


def _numbers(source: Source) -> NDArray[np.int64]:
    """Return the number (N) of each image, in the order in which they are read.

    Files of one folder whose names differ in numbers alone (0.png, a_1_10.png) are in the order of these, the
    first number first, where text has 10 before 2.
    """
    parts = source.parts
    one_folder = len({posixpath.dirname(part.key) for part in parts}) == 1
    numbers = folder.numbers_in([posixpath.splitext(posixpath.basename(part.key))[0] for part in parts])
    order = list(range(len(parts)))
    if one_folder and numbers is not None:
        order.sort(key=numbers.__getitem__)
    if order != sorted(order):
        say(f"{source.url}: images count by the numbers in their files' names, {parts[order[0]].key} first")
    starts = np.cumsum([0, *(part.rows for part in parts)])
    meant = [np.arange(starts[part], starts[part + 1]) for part in order]
    return np.argsort(np.concatenate(meant))


def _rows(noise: _Delta, source: Source, index: str) -> tuple[str, NDArray[np.int64]]:
    """Return what kind of perturbation it is, and the row of each image (N).

    The row is -1 for an image that stays as it is, and the number of rows for one whose row is not there.
    """
    rows, ordered, numbers = noise.shape[0], index == "order", _numbers(source)
    if index == "class":
        return "class-wise", _rows_by_class(noise, source, numbers, noise.labels)
    named = np.arange(source.images) if ordered else _read_index(index, source.images)
    some = "" if ordered else f" (of {len(named):,} images)"
    row_of = np.full(source.images, -1)
    if rows == len(named):
        kind, row_of[named] = "sample-wise", np.arange(rows)
    elif rows == source.images:
        kind, row_of[named] = "sample-wise", named
    elif rows == 1:
        kind, row_of[named] = "universal", 0
    elif rows == _count_classes(source):
        by_class = _rows_by_class(noise, source, numbers, noise.labels if ordered else None)
        return f"class-wise{some}", np.where(np.isin(numbers, named), by_class, -1)
    elif ordered:
        raise InputError(
            f"{noise.where}: holds {rows} perturbations for {source.images} images; name the clean set for which "
            "it was made, or say which image gets which one with --index class, or with --index FILE, a file of "
            "image numbers"
        )
    else:
        raise InputError(
            f"{noise.where}: holds {rows} perturbations, {index} names {len(named)} of {source.images} images; "
            "name the files that belong together"
        )
    return f"{kind}{some}", row_of[numbers]


def _chooser(noise: _Delta, source: Source, index: str, seed: int) -> tuple[str, Chooser]:
    """Return what kind of perturbation it is, and the function that gives the perturbations of a table."""
    kind, rows = _rows(noise, source, index)
    if noise.draws == 1 and np.array_equal(rows, np.arange(noise.shape[0])):
        return kind, lambda start, table: noise.rows(start, start + table.num_rows)
    whole = noise.whole()

    def choose(start: int, table: pa.Table) -> list[NDArray[Any] | None]:
        names, chosen = table["id"].to_pylist(), rows[start : start + table.num_rows].tolist()
        if noise.shape[0] in chosen:
            lost = chosen.index(noise.shape[0])
            raise InputError(
                f"{noise.where}: holds no perturbation for image {names[lost]} with label {table['label'][lost]}; "
                "name the clean set for which it was made"
            )
        named = zip(names, chosen, strict=True)
        return [None if row < 0 else whole[_draw(noise.draws, seed, name), row] for name, row in named]

    return kind, choose


def _draw(draws: int, seed: int, name: str) -> int:
    # By the id, so that neither the order nor the number of the images matters.
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") % draws


def _rows_by_class(
    noise: _Delta, source: Source, numbers: NDArray[np.int64], labels: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Return the row of each image by its label, the number of rows where there is none.

    With `labels` of the rows, the k-th row of a label belongs to the k-th image of that label, as in LSP.
    """
    known = read_labels(source)
    if known is None or (known < 0).any():
        raise InputError(
            f"{source.url}: has images without labels, which a class-wise perturbation needs; label them"
        )
    if labels is None:
        return np.minimum(known, noise.shape[0])
    row_of, order = np.full(len(known), noise.shape[0]), np.argsort(numbers)
    for label in np.unique(known):
        images, rows = order[known[order] == label], np.flatnonzero(labels == label)
        row_of[images[: len(rows)]] = rows[: len(images)]
    return row_of


def _read_index(url: str, images: int) -> NDArray[np.int64]:
    found = read_label_file(url)
    numbers: list[int] = [] if found.names or found.classes else found.labels.tolist()
    if not numbers or len(set(numbers)) != len(numbers) or not 0 <= min(numbers) <= max(numbers) < images:
        raise InputError(
            f"{url}: expected different image numbers from 0 to {images - 1}, one per perturbed image"
        )
    return found.labels


def _count_classes(source: Source) -> int | None:
    if source.classes is not None:
        return len(source.classes)
    labels = read_labels(source)
    return None if labels is None else int(labels.max()) + 1


# ---- Adding


def add_perturbation(
    where: str, pixels: Pixels, values: NDArray[Any], factor: float, half: Half, rounding: Rounding
) -> Pixels:
    """Return uint8 (H, W, 3) `pixels` plus `factor` times `values` (h, w, 3 or 1), clipped to 0 to 255.

    Smaller perturbations are laid on the centre. Raises InputError for one that is larger than the image.
    """
    noise: NDArray[Any] = values.astype(np.float64 if values.dtype == np.float64 else np.float32)
    noise = noise * noise.dtype.type(factor)
    if factor == 8:
        noise = noise.clip(-8, 8)
    if half == "positive":
        noise = noise.clip(0, 255)
    (height, width), (inner, across) = pixels.shape[:2], noise.shape[:2]
    if inner > height or across > width:
        raise InputError(
            f"{where}, which has {width}x{height} pixels, the perturbation has {across}x{inner}; bring the images "
            "to its size with --resize"
        )
    top, left = (height - inner) // 2, (width - across) // 2
    result = pixels.copy()
    centre = result[top : top + inner, left : left + across]
    total = (centre.astype(noise.dtype) + noise).clip(0, 255)
    centre[...] = np.rint(total) if rounding == "nearest" else np.floor(total)
    return result
