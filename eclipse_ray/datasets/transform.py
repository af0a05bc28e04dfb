"""Datasets to datasets: change the layout, or split off a sparse clean set."""

from __future__ import annotations

import hashlib
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, Layout
from eclipse_ray.datasets.formats import Source, open_source, read_tables
from eclipse_ray.datasets.images import ImageError, check_encoding, content_hash, decode_stored, encode_image
from eclipse_ray.datasets.memory import decode_resized, refuse_existing, write_dataset
from eclipse_ray.datasets.table import canonical_table, extra_columns, image_bytes
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store


def convert(source_url: str, output_url: str, data_config: DataConfig, layout: Layout = "parquet") -> int:
    """Write the dataset at `source_url` in another layout and return the number of images.

    Encoded images are copied byte for byte (arrays become PNG and back), unless `data.resize` asks for another
    size: then they are written anew as `data.encoding`. Raises InputError for an unreadable source, for an output
    that already holds data, for what `layout` cannot hold, and for an image that has to be decoded and cannot be.
    """
    check_encoding(data_config.encoding, data_config.allow_lossy)
    refuse_existing(Store(output_url))
    source = open_source(source_url, data_config)
    tables = read_tables(source, data_config)
    if data_config.resize is not None:
        tables = (_resized(source, table, data_config) for table in tables)
    return write_dataset(
        output_url,
        tables,
        classes=source.classes,
        source=source_url,
        layout=layout,
        data_config=data_config,
    )


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

    The choice is stratified by label and depends on `seed` and the pixels alone. Images with equal pixels
    stay together, so there can be a few less than `clean`, never more; what cannot be decoded goes to rest.
    Raises InputError unless 1 <= clean < images, and for an output that already holds data.
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


def choose_clean(hashes: list[str | None], labels: list[int | None], clean: int, seed: int) -> NDArray[np.bool_]:
    """Return bool (N): at most `clean` rows, stratified by label, whole groups of equal hashes only.

    A hash of None is never chosen. Rows are ranked by a hash of `seed` and their content hash, so their
    order does not matter.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, content in enumerate(hashes):
        if content is not None:
            groups[content].append(row)
    strata: dict[int | None, list[str]] = defaultdict(list)
    for content, rows in groups.items():
        strata[min((labels[row] for row in rows), key=_label_order)].append(content)
    for contents in strata.values():
        contents.sort(key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).digest())
    quotas = _quotas({label: sum(len(groups[c]) for c in strata[label]) for label in strata}, clean)
    chosen = np.zeros(len(hashes), np.bool_)
    for label in sorted(strata, key=_label_order):
        _take(chosen, groups, strata[label], quotas[label])
    # Groups of copies may not fill a quota exactly; other groups make up for it where they can.
    leftover = [content for label in sorted(strata, key=_label_order) for content in strata[label]]
    _take(chosen, groups, leftover, clean - int(chosen.sum()))
    return chosen


def _take(chosen: NDArray[np.bool_], groups: dict[str, list[int]], contents: list[str], room: int) -> None:
    for content in contents:
        rows = groups[content]
        if len(rows) <= room and not chosen[rows[0]]:
            chosen[rows] = True
            room -= len(rows)


def _quotas(sizes: dict[int | None, int], clean: int) -> dict[int | None, int]:
    # Largest remainders: every class gets its share rounded down, then the most cut ones get one more.
    total = sum(sizes.values())
    shares = {label: Fraction(clean * size, total) for label, size in sizes.items()}
    quotas = {label: int(share) for label, share in shares.items()}
    by_loss = sorted(shares, key=lambda label: (quotas[label] - shares[label], _label_order(label)))
    for label in by_loss[: clean - sum(quotas.values())]:
        quotas[label] += 1
    return quotas


def _label_order(label: int | None) -> tuple[bool, int]:
    return label is None, label or 0


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
