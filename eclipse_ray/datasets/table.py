"""The canonical table: columns id, image, label and whatever came along, and its Parquet form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CANONICAL = ("id", "image", "label")
METADATA_KEY = b"eclipse_ray"
# A row group is what a reader has to fetch for one image, so it stays small.
ROW_GROUP_IMAGES = 512

FILE_IMAGES = 4096
FILE_BYTES = 128 * 2**20

NOTE = "_eclipse/dataset.json"
# The keys of its samples are ids with some characters escaped.
ESCAPED_KEYS = "escaped_keys"

Span = tuple[str, int, int]


class Part(NamedTuple):
    """A piece of a source that is read by row range: key, rows, bytes stored, version of those bytes."""

    key: str
    rows: int
    size: int
    version: str


def canonical_table(
    ids: Sequence[str],
    encoded: Sequence[bytes],
    labels: Sequence[int | None] | NDArray[np.int64] | None = None,
    extras: pa.Table | None = None,
    classes: Sequence[str] | None = None,
    paths: Sequence[str | None] | None = None,
) -> pa.Table:
    """Return N rows (id string, image struct<bytes, path>, label int64 unless None, columns of `extras`).

    `labels` and `extras` may be Arrow columns. Raises InputError if an extra column has a canonical name.
    """
    paths = [None] * len(ids) if paths is None else paths
    images = pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.array(paths, pa.string())], fields=list(IMAGE_TYPE)
    )
    columns: dict[str, object] = {"id": pa.array(ids, pa.string()), "image": images}
    if labels is not None:
        columns["label"] = labels if isinstance(labels, pa.ChunkedArray) else pa.array(labels, pa.int64())
    for name in () if extras is None else extras.column_names:
        if name in CANONICAL:
            raise InputError(f"column {name!r} came along but its name is taken; rename it in the source")
        columns[name] = extras.column(name)  # type: ignore[union-attr]
    return with_classes(pa.table(columns), classes)


def with_classes(table: pa.Table, classes: Sequence[str] | None) -> pa.Table:
    """Return `table` with schema metadata naming the classes, for this package and for Hugging Face."""
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if "label" in table.column_names and classes is not None:
        features["label"] = {"names": list(classes), "_type": "ClassLabel"}
    own = {"classes": None if classes is None else list(classes)}
    metadata = {
        METADATA_KEY: json.dumps(own),
        b"huggingface": json.dumps({"info": {"features": features}}),
    }
    return table.replace_schema_metadata(metadata)


def table_to_parquet(table: pa.Table) -> bytes:
    """Return `table` as one Parquet file with page checksums, the same bytes for the same table."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=ROW_GROUP_IMAGES,
        compression="zstd",
        compression_level=1,
        # Every image is another value, and nobody searches images by their first bytes.
        use_dictionary=False,
        write_statistics=[name for name in ("id", "label") if name in table.column_names],
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def image_bytes(table: pa.Table) -> list[bytes]:
    """Return the encoded images of a canonical table, one bytes object a row."""
    encoded: list[bytes] = table["image"].combine_chunks().field("bytes").to_pylist()
    return encoded


def extra_columns(table: pa.Table) -> pa.Table:
    """Return the columns of a canonical table that merely came along."""
    return table.drop_columns([name for name in CANONICAL if name in table.column_names])


def all_labels(url: str, table: pa.Table) -> list[int] | None:
    """Return the labels of a canonical table, None if it has none. Raises InputError if some rows have none."""
    if "label" not in table.column_names:
        return None
    labels: list[int | None] = table["label"].to_pylist()
    if None in labels:
        name = table["id"][labels.index(None)].as_py()
        raise InputError(f"{url}: image {name} has no label; use the parquet layout for it")
    return [label for label in labels if label is not None]


def check_label(where: str, label: int, classes: Sequence[str] | None) -> None:
    """Raise InputError unless `label` is the place of a class or -1, which stands for none."""
    if classes is not None and not -1 <= label < len(classes):
        raise InputError(f"{where}: label {label} is out of range, there are {len(classes)} classes; mend it")


def regroup(tables: Iterable[pa.Table], max_images: int, max_bytes: int) -> Iterator[pa.Table]:
    """Yield the rows of `tables` in order, as tables of at most `max_images` rows and about `max_bytes`."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        start = 0
        while start < table.num_rows:
            piece = table.slice(start, max_images - rows)
            start += piece.num_rows
            held.append(piece)
            rows, size = rows + piece.num_rows, size + piece.nbytes
            if rows >= max_images or size >= max_bytes:
                yield pa.concat_tables(held, promote_options="default")
                held, rows, size = [], 0, 0
    if held:
        yield pa.concat_tables(held, promote_options="default")


def read_note(store: Store) -> dict[str, Any]:
    """Return what is noted in `store`; empty if there is no note, or a damaged one, as it is a courtesy only."""
    try:
        note = json.loads(store.read(NOTE))
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def noted_classes(store: Store) -> list[str] | None:
    """Return the class names noted in `store`, or None."""
    classes = read_note(store).get("classes")
    return [str(name) for name in classes] if isinstance(classes, list) and classes else None
