"""Label files (`data.labels`): labels of a dataset whose images have none or wrong ones, by name or in order."""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, digest
from eclipse_ray.datasets import arrays, folder, npz, published
from eclipse_ray.datasets.pickles import read_file, values_of
from eclipse_ray.datasets.table import LABEL_NAMES, WHOLE, Part, check_label, label_of, label_text
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

_DEFAULT_COLUMN = DataConfig.model_fields["label_column"].default
# Columns of a table that hold names of images.
_NAMES = ("file_name", "filename", "file", "image", "image_id", "id", "name", "path", "fname", "img")
TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl")
SUFFIXES = (*TEXT_SUFFIXES, ".npy", *published.SUFFIXES)
_ADVICE = (
    "expected labels in order, one per image, or names and labels: .csv or .tsv with a line that names the columns"
    ", .txt, .json, .jsonl, numbers or str in .npy, or numbers in .pt, .pth or .pkl"
)

Values = NDArray[np.int64]


@dataclass(frozen=True)
class LabelFile:
    """Labels int64 (N), -1 for none; their names (N) if the file has names; class names if labels were text."""

    where: str
    labels: Values
    names: list[str] | None
    classes: list[str] | None

    @cached_property
    def places(self) -> dict[str, int]:
        """The row of each plain name."""
        return {_plain(name): row for row, name in enumerate(self.names or ())}


def read_label_file(url: str, column: str = _DEFAULT_COLUMN) -> LabelFile:
    """Return the labels in a file. Text becomes indices into the class names, as in tables; nothing is unpickled.

    `column` names the labels in a table. Raises InputError for a file that is missing, or holds anything else.
    """
    store = Store(url)
    if not store.is_file():
        raise InputError(f"{url}: there is no such file; {_ADVICE}")
    base, _, key = store.url.rpartition("/")
    return _read(base or "/", key, store.entry("").version, column)


@lru_cache(maxsize=8)
def _read(base: str, key: str, version: str, column: str) -> LabelFile:
    # `version` tells that the file is still the same.
    store, where, suffix = Store(base), f"{base}/{key}", posixpath.splitext(key)[1].lower()
    if suffix == ".npy":
        array, rows = npz.read_array(store, key)
        return _label_file(where, rows(0, array.shape[0] if array.shape else 0), None)
    if suffix in published.SUFFIXES:
        return _label_file(where, _unpickled(store, key, where), None)
    if suffix not in TEXT_SUFFIXES:
        raise InputError(f"{where}: not a file of labels; {_ADVICE}")
    try:
        names, labels = _PARSERS[suffix](where, store.read(key).decode("utf-8-sig"), column)
    except (ValueError, csv.Error, RecursionError) as error:
        raise InputError(f"{where}: not readable: {error}; {_ADVICE}") from error
    return _label_file(where, labels, names)


def _unpickled(store: Store, key: str, where: str) -> Any:
    with store.open(key) as file:
        content = read_file(where, file, _ADVICE)
        found = values_of(content)
        if found is not None:
            return published.whole_of(where, file, found)
    if not isinstance(content, list | tuple):
        raise InputError(f"{where}: holds {type(content).__name__}; {_ADVICE}")
    return list(content)


def _label_file(where: str, labels: Any, names: list[str] | None) -> LabelFile:
    ((twice, times),) = Counter(map(_plain, names or ())).most_common(1) or [("", 0)]
    if times > 1:
        forms = ", also written ".join(dict.fromkeys(name for name in names or () if _plain(name) == twice))
        raise InputError(f"{where}: {forms} occurs more than once; give each image one label")
    if isinstance(labels, np.ndarray) and labels.dtype.kind != "U":
        if not arrays.are_labels(labels.shape, labels.dtype, len(labels) if labels.shape else -1):
            raise InputError(f"{where}: holds {labels.dtype} {labels.shape}; {_ADVICE}")
        whole, classes = arrays.to_labels(where, labels), None
    else:
        whole, classes = _from_values(where, list(labels))
    if not len(whole):
        raise InputError(f"{where}: holds no labels; {_ADVICE}")
    check_label(where, int(whole.min()), None)
    return LabelFile(where, whole, names, classes)


def _from_values(where: str, values: list[Any]) -> tuple[Values, list[str] | None]:
    plain = [isinstance(value, str | int | float) and not isinstance(value, bool) for value in values]
    if False in plain:
        row = plain.index(False)
        raise InputError(f"{where}: row {row}: label {values[row]!r} is neither a number nor a text; mend it")
    texts = [label_text(f"{where}: row {row}", str(value)) for row, value in enumerate(values)]
    number = next((row for row, value in enumerate(values) if not isinstance(value, str) and value != -1), None)
    classes = folder.classes_of_texts(where, set(texts), None if number is None else f"row {number}")
    places = None if classes is None else {name: place for place, name in enumerate(classes)}
    labels = {text: label_of(text, places) for text in set(texts)}
    return np.array([labels[text] for text in texts], np.int64), classes


# ---- The forms of a text file: each returns names (None: in order) and labels


Named = tuple[list[str] | None, list[Any]]


def _columns(where: str, records: Sequence[Mapping[str, Any]], column: str) -> Named:
    known = list(records[0]) if records else []
    if any(list(record) != known for record in records):
        raise ValueError("its lines have different columns")
    wanted = [column] if column != _DEFAULT_COLUMN else list(LABEL_NAMES)
    label = next((name for name in wanted if name in known), None)
    name = next((each for each in _NAMES if each in known and each != label), None)
    if len(known) == 2 and (label is None) != (name is None):
        # Of two columns, the known one tells what the other is.
        (other,) = (each for each in known if each not in (label, name))
        label, name = (label or other, name or other) if column == _DEFAULT_COLUMN else (label, name or other)
    if label is None or (name is None and len(known) > 1):
        raise InputError(
            f"{where}: its columns are {', '.join(known[:10]) or 'none'}; name that of the labels with "
            f"--set data.label_column=NAME, and call that of the images {_NAMES[0]}"
        )
    names = None if name is None else [str(record[name]) for record in records]
    return names, [record[label] for record in records]


def _csv(where: str, text: str, column: str) -> Named:
    between = "\t" if where.lower().endswith(".tsv") else ","
    records = list(csv.DictReader(io.StringIO(text), delimiter=between, strict=True))
    if any(None in record or None in record.values() for record in records):
        raise ValueError("its lines have different lengths")
    return _columns(where, records, column)


def _json(where: str, text: str, column: str) -> Named:
    tree = json.loads(text)
    # {"labels": ...} is how StyleGAN and EDM store the labels of a folder, as pairs.
    tree = tree["labels"] if isinstance(tree, dict) and set(tree) == {"labels"} else tree
    if isinstance(tree, dict):
        return list(tree), list(tree.values())
    if not isinstance(tree, list):
        raise ValueError("it holds neither a list nor names with labels")
    if tree and all(isinstance(each, dict) for each in tree):
        return _columns(where, tree, column)
    if tree and all(isinstance(each, list) and len(each) == 2 for each in tree):
        return [str(name) for name, _ in tree], [label for _, label in tree]
    return None, tree


def _jsonl(where: str, text: str, column: str) -> Named:
    return _json(where, f"[{','.join(line for line in text.splitlines() if line.strip())}]", column)


def _txt(where: str, text: str, column: str) -> Named:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for pairs in ([line.rsplit(None, 1) for line in lines], [line.split(None, 1) for line in lines]):
        if all(len(pair) == 2 and (WHOLE.fullmatch(pair[1]) or folder.claims(pair[0])) for pair in pairs):
            return [name for name, _ in pairs], [label for _, label in pairs]
    odd = next((line for line in lines if any(map(folder.claims, re.split(r"[\s,;]+", line)))), None)
    if odd is not None:
        raise ValueError(
            f"the line {odd!r} names an image, and not every line is a name, a space and a label; a table with "
            "commas and a first line of column names ends in .csv"
        )
    numbers = len(lines) > 1 and not WHOLE.fullmatch(lines[0]) and all(map(WHOLE.fullmatch, lines[1:]))
    if numbers or (lines and lines[0].lower() in LABEL_NAMES and lines[0] not in lines[1:]):
        raise ValueError(f"its first line {lines[0]!r} is a heading, not a label; leave it out")
    return None, lines


_PARSERS: dict[str, Callable[[str, str, str], Named]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _txt,
    ".json": _json,
    ".jsonl": _jsonl,
}


# ---- Which image gets which label


def settings_for(url: str, config: DataConfig) -> DataConfig:
    """Return `config` without a label file that is not about the set at `url`: it belongs to data.source."""
    named = Store(config.source).url if config.source else url
    about = url == named or url.startswith(f"{named}/") or fnmatch.fnmatchcase(url, named)
    return config if about or config.label_file is None else config.model_copy(update={"labels": None})


def given(config: DataConfig) -> LabelFile | None:
    """Return the label file of a set that is read with `config`, None if it has none."""
    return None if config.label_file is None else read_label_file(config.label_file, config.label_column)


def matched(found: LabelFile, url: str, format: str, parts: Sequence[Part]) -> tuple[list[Part], list[str] | None]:
    """Return the parts of data.source, their versions with that of its label file, and the classes that it names.

    Raises InputError unless each image has one label: images in files by their names, or the number in these; the
    rows of one other file by their order, or all rows by their ids, which are seen only when they are read.
    """
    if format == "folder":
        _check_images(found, url, [part.key for part in parts])
    elif found.names is None and (len(parts) > 1 or parts[0].rows != len(found.labels)):
        raise InputError(
            f"{found.where}: holds {len(found.labels):,} labels in order, {url} has "
            f"{sum(part.rows for part in parts):,} images in {len(parts):,} files; give a table of ids and "
            "labels, or one file with as many images"
        )
    version = digest([found.labels.tolist(), found.names, found.classes])
    return [part._replace(version=f"{part.version}+{version}") for part in parts], found.classes


def labels_of(found: LabelFile, url: str, format: str, ids: Sequence[str], start: int) -> Values:
    """Return the labels (N) of the rows from `start` on of one object of data.source, whose ids are `ids`.

    Raises InputError for an image that the label file does not name.
    """
    if found.names is None and format != "folder":
        return found.labels[start : start + len(ids)]
    rows = [_row(found, name, format) for name in ids]
    if None in rows:
        raise InputError(f"{found.where}: has no label for image {ids[rows.index(None)]} of {url}; add it")
    return found.labels[np.array(rows, np.int64)]


def label_column(labels: Values) -> pa.Array:
    """Return labels as a column in which -1 is empty."""
    return pa.array(labels, pa.int64(), mask=labels < 0)


def _plain(name: str) -> str:
    # macOS takes accents apart, Windows writes backslashes, and find begins with ./ where a listing does not.
    return unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./"))


def _row(found: LabelFile, name: str, format: str) -> int | None:
    """Return the row of the file that is about an image, None if there is none."""
    base = name.rpartition("/")[2]
    stem = posixpath.splitext(base)[0]
    if found.names is None:
        number = int(stem) if stem.isascii() and stem.isdigit() and len(stem) < 19 else -1
        return number if 0 <= number < len(found.labels) else None
    wanted = (name, base, stem) if format == "folder" else (name,)
    return next((found.places[each] for each in map(_plain, wanted) if each in found.places), None)


def _check_images(found: LabelFile, url: str, keys: Sequence[str]) -> None:
    home: dict[int, str] = {}
    for key in keys:
        row = _row(found, key, "folder")
        if row is None:
            by = "the number in its name, which counts from 0" if found.names is None else "its name"
            raise InputError(
                f"{found.where}: none of its {len(found.labels):,} labels is that of {url}/{key} by {by}; give a "
                "table of names and labels with a line for each image"
            )
        if home.setdefault(row, key) != key:
            raise InputError(
                f"{found.where}: {home[row]} and {key} would get the same line; name the images with their folders"
            )
