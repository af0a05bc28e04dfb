"""Writing datasets: from tables, converted to another layout, or split into a clean set and the rest."""

from __future__ import annotations

import itertools
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, Layout
from eclipse_ray.datasets import folder, npz, parquet, webdataset
from eclipse_ray.datasets.formats import UNFINISHED, Source, open_source, read_tables
from eclipse_ray.datasets.images import ImageError, check_encoding, content_hash, decode_stored, encode_image
from eclipse_ray.datasets.memory import choose_clean, decode_resized
from eclipse_ray.datasets.table import ESCAPED_KEYS, NOTE, canonical_table, extra_columns, image_bytes
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

Writer = Callable[[Store, Iterable[pa.Table], Sequence[str] | None, DataConfig], int]

_WRITERS: dict[Layout, Writer] = {
    "parquet": lambda store, tables, classes, _: parquet.write(store, tables, classes=classes),
    "folder": lambda store, tables, classes, _: folder.write(store, tables, classes=classes),
    "webdataset": webdataset.write,
    "npz": npz.write,
}


def write_dataset(
    url: str,
    tables: Iterable[pa.Table],
    *,
    classes: Sequence[str] | None,
    source: str,
    layout: Layout = "parquet",
    data_config: DataConfig | None = None,
    resume: bool = False,
) -> int:
    """Write canonical `tables` as a new dataset at `url` and return the number of images.

    The parts are written first and the note `_eclipse/dataset.json` last; until then readers refuse the dataset.
    With `resume`, the same tables overwrite the parts that an interrupted call left. Raises InputError if `url`
    already holds other data, and for data that `layout` cannot hold.
    """
    store = Store(url)
    if not resume:
        refuse_existing(store)
    store.write(UNFINISHED, b"")
    try:
        images = _WRITERS[layout](store, tables, classes, data_config or DataConfig())
    except InputError:
        # If nothing was written, the mark is removed too, so that the same output can be used again.
        if next(store.list(), None) is None:
            store.delete(UNFINISHED)
        raise
    note = {"images": images, "classes": None if classes is None else list(classes), "source": source}
    if layout == "webdataset":
        note[ESCAPED_KEYS] = True
    store.write(NOTE, json.dumps(note, indent=2).encode())
    store.delete(UNFINISHED)
    return images


def refuse_existing(store: Store) -> None:
    """Raise InputError that names one object if `store` is not empty."""
    if store.is_file():
        raise InputError(f"{store.url}: is a file; name a new folder to write to")
    if store.exists(UNFINISHED):
        raise InputError(f"{store.url}: holds a dataset whose writing was interrupted; delete it first")
    taken = next(itertools.chain(store.list(), store.list("_eclipse")), None)
    if taken is not None:
        raise InputError(f"{store.url}: already holds data ({taken.key}); delete it or name another folder")


def convert(source_url: str, output_url: str, data_config: DataConfig, layout: Layout = "parquet") -> int:
    """Write the dataset at `source_url` in another layout and return the number of images.

    Encoded images are copied byte for byte; arrays become PNG, and images become arrays for npz. If `data.resize`
    is set, all images are resized and encoded as `data.encoding`. Raises InputError for an unreadable source, for
    an output that already holds data, for data that `layout` cannot hold, and for an image that must be decoded
    but cannot be.
    """
    check_encoding(data_config.encoding, data_config.allow_lossy)
    refuse_existing(Store(output_url))
    source = open_source(source_url, data_config)
    return write_dataset(
        output_url,
        converted(source, data_config),
        classes=source.classes,
        source=source_url,
        layout=layout,
        data_config=data_config,
    )


def converted(source: Source, data_config: DataConfig) -> Iterator[pa.Table]:
    """Yield the tables of a source, their images resized and encoded anew if `data.resize` is set."""
    for table in read_tables(source, data_config):
        yield table if data_config.resize is None else _resized(source, table, data_config)


def _resized(source: Source, table: pa.Table, data_config: DataConfig) -> pa.Table:
    ids: list[str] = table["id"].to_pylist()
    encoded: list[bytes] = []
    for name, data in zip(ids, image_bytes(table), strict=True):
        pixels = decode_resized(source.url, name, data, data_config)
        encoded.append(encode_image(pixels, data_config.encoding))
    labels = table["label"] if "label" in table.column_names else None
    return canonical_table(ids, encoded, labels, extra_columns(table), source.classes)


def split(
    source_url: str, output_url: str, clean: int, seed: int, data_config: DataConfig
) -> dict[str, int | str]:
    """Write `clean` images to OUT/clean and the others to OUT/rest; return {clean, rest, output}.

    The choice is stratified by label and depends only on `seed` and the pixels. Images with equal pixels stay
    together, so OUT/clean may hold slightly fewer than `clean` images, never more. Images that cannot be decoded
    go to OUT/rest. Raises InputError unless 1 <= clean < images, and for an output that already holds data.
    """
    refuse_existing(Store(output_url))
    source = open_source(source_url, data_config)
    if not 1 <= clean < source.images:
        raise InputError(
            f"{source_url}: cannot split {clean} clean images off {source.images}; "
            f"ask for 1 to {source.images - 1}"
        )
    hashes, labels = _read_contents(source, data_config)
    chosen = choose_clean(hashes, labels, clean, seed)
    if not chosen.any():
        raise InputError(
            f"{source_url}: no image can be split off, as all of them are damaged or copies of each other; "
            "check the source"
        )
    counts: dict[str, int | str] = {}
    for name, side in (("clean", chosen), ("rest", ~chosen)):
        counts[name] = write_dataset(
            posixpath.join(output_url, name),
            _select(source, data_config, side),
            classes=source.classes,
            source=source_url,
        )
    return {**counts, "output": output_url}


def _read_contents(source: Source, data_config: DataConfig) -> tuple[list[str | None], list[int | None]]:
    hashes: list[str | None] = []
    labels: list[int | None] = []
    for table in read_tables(source, data_config):
        for data in image_bytes(table):
            try:
                hashes.append(content_hash(decode_stored(data, data_config)))
            except ImageError:
                hashes.append(None)
        known = "label" in table.column_names
        labels.extend(table["label"].to_pylist() if known else [None] * table.num_rows)
    return hashes, labels


def _select(source: Source, data_config: DataConfig, side: NDArray[np.bool_]) -> Iterator[pa.Table]:
    start = 0
    for table in read_tables(source, data_config):
        yield table.filter(pa.array(side[start : start + table.num_rows]))
        start += table.num_rows
