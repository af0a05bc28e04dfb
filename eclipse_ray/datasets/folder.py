"""Image files in class folders, or flat without labels. A part is one image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import pyarrow as pa

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.images import SUFFIXES
from eclipse_ray.datasets.note import noted_classes
from eclipse_ray.datasets.table import Part, canonical_table
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})


def claims(key: str) -> bool:
    """Return whether an object of this name is read by this format."""
    return key.lower().endswith(SUFFIXES)


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part an image, and the class names: the top folders, sorted, or None without folders.

    Raises InputError where images lie both in class folders and beside them, or in train and test folders.
    """
    parts = [Part(entry.key, 1, entry.size, entry.version) for entry in entries]
    beside = [part.key for part in parts if "/" not in part.key]
    inside = {part.key.partition("/")[0] for part in parts if "/" in part.key}
    if beside and inside:
        raise InputError(
            f"{store.url}: images lie in class folders ({min(inside)}/) and beside them ({beside[0]}); "
            "move those into a class folder"
        )
    if len(inside) > 1 and all(name.lower() in _SPLITS for name in inside):
        raise InputError(
            f"{store.url}: holds the splits {', '.join(sorted(inside))}, not classes; "
            f"name one of them, for example {store.url}/{max(inside)}"
        )
    return parts, _noted_classes(store, inside) or sorted(inside) or None


def read_rows(
    store: Store, key: str, start: int, stop: int, config: DataConfig, classes: Sequence[str] | None
) -> pa.Table:
    """Return the image `key` as one canonical row; its label is the place of its top folder in `classes`."""
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
    # Folders that were written here are named by folder_name; those of others as their class is.
    places: dict[str, set[int]] = {}
    for place, name in enumerate(classes):
        for folder in (name, folder_name(name)):
            places.setdefault(folder, set()).add(place)
    return places


def folder_name(text: str) -> str:
    """Return `text` as one file or folder name that `Store.list` shows; different texts stay different."""
    escaped = "".join(f"%{ord(c):02X}" if c in "/\\%" or ord(c) < 32 else c for c in text)
    if escaped.startswith((".", "_")) or not escaped:
        return f"%{ord(escaped[0]):02X}{escaped[1:]}" if escaped else "%"
    return escaped


def _noted_classes(store: Store, folders: set[str]) -> list[str] | None:
    # Sorting the folders would renumber the labels of a dataset whose classes are not in that order.
    classes = noted_classes(store)
    return classes if classes and folders and folders <= {folder_name(name) for name in classes} else None
