"""Canonical tables to WebDataset tars, each with an index beside it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from eclipse_ray.config import DataConfig
from eclipse_ray.data.images import suffix_of
from eclipse_ray.data.samples import PICKLED, escape_key, is_image, is_text
from eclipse_ray.data.store import Store
from eclipse_ray.data.table import (
    FILE_BYTES,
    FILE_IMAGES,
    all_labels,
    extra_columns,
    image_bytes,
    regroup,
)
from eclipse_ray.data.tar import header_block, padding
from eclipse_ray.errors import InputError


def write(store: Store, tables: Iterable[pa.Table], classes: Sequence[str] | None, config: DataConfig) -> int:
    """Write canonical `tables` as part-00000.tar and so on, each with its index; return the number of images.

    Keys are ids with dots and the like escaped; the note of the dataset says so. Raises InputError for what a tar
    cannot hold: repeated ids, missing labels, columns that are neither text nor bytes.
    """
    seen: set[str] = set()
    for number, table in enumerate(regroup(tables, FILE_IMAGES, FILE_BYTES)):
        _check_columns(store, table)
        tar, index = io.BytesIO(), [f"v1.2 {table.num_rows}"]
        for name, members in zip(table["id"].to_pylist(), _members(store, table), strict=True):
            if name in seen:
                raise InputError(f"{store.url}: id {name} occurs more than once; give every image its own id")
            seen.add(name)
            index.append(_append(tar, escape_key(name), members))
        tar.write(bytes(1024))
        store.write(f"part-{number:05d}.tar", tar.getvalue())
        store.write(f"part-{number:05d}.idx", ("\n".join(index) + "\n").encode())
    return len(seen)


def _append(tar: io.BytesIO, key: str, members: dict[str, bytes]) -> str:
    # Returns the sample's line of the index: extension, offset, size and name of every member.
    words: list[str] = []
    for extension, data in members.items():
        name = f"{key}.{extension}"
        tar.write(header_block(name, len(data)))
        words += [extension, str(tar.tell()), str(len(data)), name]
        tar.write(data + padding(len(data)))
    return " ".join(words)


def _members(store: Store, table: pa.Table) -> Iterator[dict[str, bytes]]:
    labels = all_labels(store.url, table)
    extras = {name: column.to_pylist() for name, column in _extras(table).items()}
    for row, data in enumerate(image_bytes(table)):
        members = {(suffix_of(data) or ".png").removeprefix("."): data}
        if labels is not None:
            members["cls"] = str(labels[row]).encode()
        for name, values in extras.items():
            value = values[row]
            if value is not None:
                members[name] = value.encode() if isinstance(value, str) else value
        yield members


def _extras(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    extras = extra_columns(table)
    return dict(zip(extras.column_names, extras.columns, strict=True))


def _check_columns(store: Store, table: pa.Table) -> None:
    for name, column in _extras(table).items():
        kind = column.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        bytes_ = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        fits = (text and is_text(name)) or (bytes_ and not is_text(name) and not is_image(name))
        words = name.split(".")
        plain = name == name.lower() and all(words) and not set(name) & set(" /\\\n\t\r\0")
        if not fits or not plain or not PICKLED.isdisjoint(words) or name == "cls":
            raise InputError(
                f"{store.url}: column {name!r} ({kind}) cannot be a member of a WebDataset tar, which holds text "
                "under names such as txt and json, and bytes; use the parquet layout, or leave such columns out "
                "with --set data.extra_columns=drop"
            )
