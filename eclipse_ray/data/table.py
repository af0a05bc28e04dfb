"""The canonical table: columns id, image, label and whatever came along, and its Parquet form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eclipse_ray.errors import InputError

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CANONICAL = ("id", "image", "label")
METADATA_KEY = b"eclipse_ray"
# A row group is what a reader has to fetch for one image, so it stays small.
ROW_GROUP_IMAGES = 512

Span = tuple[str, int, int]


@dataclass(frozen=True)
class Part:
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
