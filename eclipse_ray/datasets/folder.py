"""Image files in one folder per class, or in one folder without labels. Each image is one part."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from functools import lru_cache

import pyarrow as pa

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.images import SUFFIXES, suffix_of
from eclipse_ray.datasets.table import (
    Part,
    all_labels,
    canonical_table,
    extra_columns,
    image_bytes,
    noted_classes,
)
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

# The split that each word in the name of a folder or file stands for.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def claims(key: str) -> bool:
    """Return whether this format reads an object of this name."""
    return key.lower().endswith(SUFFIXES)


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part per image, and the class names, which are the sorted top folders if there are several.

    Raises InputError if images lie both in class folders and beside them, or in folders named after splits.
    """
    parts = [Part(entry.key, 1, entry.size, entry.version) for entry in entries]
    beside = [part.key for part in parts if "/" not in part.key]
    inside = {part.key.partition("/")[0] for part in parts if "/" in part.key}
    if beside and inside:
        raise InputError(
            f"{store.url}: images lie in class folders ({min(inside)}/) and beside them ({beside[0]}); "
            "move those into a class folder"
        )
    noted = _noted_classes(store, inside)
    if inside and noted is None and all(name.lower() in SPLITS for name in inside):
        raise InputError(
            f"{store.url}: holds the split{'s' * (len(inside) > 1)} {', '.join(sorted(inside))}, not classes; "
            f"name one of them, for example {store.url}/{max(inside)}"
        )
    # One folder is no set of classes. It is more likely named images or data than after its only class.
    return parts, noted or (sorted(inside) if len(inside) > 1 else None)


def read_rows(
    store: Store, key: str, start: int, stop: int, config: DataConfig, classes: Sequence[str] | None
) -> pa.Table:
    """Return the image `key` as one canonical row; its label is the index of its top folder in `classes`."""
    top, separator, _ = key.partition("/")
    labels = None
    if classes is not None and separator:
        places = _places(tuple(classes)).get(top, set())
        if len(places) != 1:
            raise InputError(
                f"{store.url}/{key}: {top!r} is {'not' if not places else 'more than'} one of the classes "
                f"{', '.join(classes[:20])}; rename that folder"
            )
        labels = list(places)
    table = canonical_table([key], [store.read(key)], labels, None, classes, [key])
    return table.slice(start, stop - start)


@lru_cache(maxsize=8)
def _places(classes: tuple[str, ...]) -> dict[str, set[int]]:
    # Folders written by this package are named by folder_name, other folders like their class.
    places: dict[str, set[int]] = {}
    for place, name in enumerate(classes):
        for folder in (name, folder_name(name)):
            places.setdefault(folder, set()).add(place)
    return places


def write(store: Store, tables: Iterable[pa.Table], *, classes: Sequence[str] | None = None) -> int:
    """Write the unchanged bytes of each image into one folder per class, or one folder if there are no labels.

    Returns the number of images. Raises InputError if only some rows have labels, for two ids that give the
    same file name, and for extra columns.
    """
    images = 0
    for table in tables:
        extras = extra_columns(table).column_names
        if extras:
            raise InputError(
                f"{store.url}: a folder of images cannot hold the column {extras[0]!r}; use the parquet layout, "
                "or leave such columns out with --set data.extra_columns=drop"
            )
        known = all_labels(store.url, table)
        labels: Sequence[int | None] = [None] * table.num_rows if known is None else known
        for name, data, label in zip(table["id"].to_pylist(), image_bytes(table), labels, strict=True):
            _create(store, name, _file_key(name, data, label, classes), data)
            images += 1
    return images


def folder_name(text: str) -> str:
    """Return `text` as one file or folder name that is not hidden; different texts give different names."""
    escaped = "".join(f"%{ord(c):02X}" if c in "/\\%" or ord(c) < 32 else c for c in text)
    if escaped.startswith((".", "_")) or not escaped:
        return f"%{ord(escaped[0]):02X}{escaped[1:]}" if escaped else "%"
    return escaped


def _noted_classes(store: Store, folders: set[str]) -> list[str] | None:
    # Without the note, classes that are not in sorted order would get other labels.
    classes = noted_classes(store)
    return classes if classes and folders and folders <= {folder_name(name) for name in classes} else None


def _file_key(name: str, data: bytes, label: int | None, classes: Sequence[str] | None) -> str:
    suffix = suffix_of(data)
    named = name.lower().endswith(suffix or SUFFIXES) or (suffix == ".jpg" and name.lower().endswith(".jpeg"))
    file = name if named else name + (suffix or ".png")
    if label is None:
        return folder_name(file)
    known = classes is not None and 0 <= label < len(classes)
    raw = classes[label] if classes is not None and known else f"{label:05d}"
    top = folder_name(raw)
    # An id that came from a class folder already begins with the class name, escaped or not.
    first, slash, rest = file.partition("/")
    return f"{top}/{folder_name(rest if slash and first in (raw, top) else file)}"


def _create(store: Store, name: str, key: str, data: bytes) -> None:
    try:
        created = store.create(key, data)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"{store.url}: id {name} is too long to name a file here; use the parquet layout"
            ) from error
        raise
    if not created:
        raise InputError(f"{store.url}: two images would be named like {name}; use the parquet layout")
