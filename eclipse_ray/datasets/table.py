"""The canonical table of id, image, label and extra columns, its Parquet form, and the note of a dataset."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.errors import InputError
from eclipse_ray.log import say_once
from eclipse_ray.storage.store import Store

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CANONICAL = ("id", "image", "label")
METADATA_KEY = b"eclipse_ray"
# The key that makes a column an Arrow extension type, and what takes its place while a table is in this package
# (as long, with the same first and last byte, so that it can be exchanged in base64 too).
EXTENSION, MUTED = b"ARROW:extension:name", b"ARROW_extension_name"
# The key of what else a file says of such a type, such as the shape of tensors.
OF_EXTENSION = b"ARROW:extension:metadata"
# Images per row group. A reader must fetch a whole row group for one image, so it is small.
ROW_GROUP_IMAGES = 512

# Largest number of images and of bytes in one file that is written.
FILE_IMAGES = 4096
FILE_BYTES = 128 * 2**20

# The note that is written last into a new dataset: its class names, its number of images and its origin.
NOTE = "_eclipse/dataset.json"
# Entry of the note of a WebDataset which says that keys are ids with some characters escaped.
ESCAPED_KEYS = "escaped_keys"
# Entry of the note which says whether the images have labels. If not, their folders are no classes.
LABELLED = "labelled"

# Columns that usually hold labels, the likeliest first.
LABEL_NAMES = (
    *("label", "labels", "class", "class_id", "target", "category", "y"),
    *("targets", "fine_label", "fine_labels", "label_id"),
)
# A label that is text is a whole number, or another number, which is an error, or else the name of a class.
WHOLE = re.compile(r"[-+]?[0-9]{1,18}(?:\.0*)?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")

Span = tuple[str, int, int]


class Part(NamedTuple):
    """A source object, of which ranges of rows are read: key, number of rows, size in bytes, version.

    `hidden` are the names of what is hidden in a tar and not read.
    """

    key: str
    rows: int
    size: int
    version: str
    hidden: tuple[str, ...] = ()


class SourceFile(NamedTuple):
    """One object of a source, and how its rows are read; its labels are indices into `classes`, if known."""

    store: Store
    key: str
    config: DataConfig
    classes: Sequence[str] | None = None

    @property
    def where(self) -> str:
        """Its address, which error sentences name."""
        return f"{self.store.url}/{self.key}"


def canonical_table(
    ids: Sequence[str],
    encoded: Sequence[bytes],
    labels: Sequence[int | None] | NDArray[np.int64] | None = None,
    extras: pa.Table | None = None,
    classes: Sequence[str] | None = None,
    paths: Sequence[str | None] | None = None,
) -> pa.Table:
    """Return N rows: id string, image struct<bytes, path>, label int64 if `labels` is given, columns of `extras`.

    `labels` may be an Arrow column. Raises InputError if an extra column has a canonical name.
    """
    columns: dict[str, object] = {"id": pa.array(ids, pa.string()), "image": _image_column(encoded, paths)}
    if labels is not None:
        columns["label"] = labels if isinstance(labels, pa.ChunkedArray) else pa.array(labels, pa.int64())
    for name in () if extras is None else extras.column_names:
        if name in CANONICAL:
            raise InputError(f"column {name!r} came along but its name is taken; rename it in the source")
        columns[name] = extras.column(name)  # type: ignore[union-attr]
    table = pa.table(columns)
    for field in () if extras is None else extras.schema:
        if extension_of(field):
            table = table.set_column(table.column_names.index(field.name), field, table[field.name])
    return with_classes(table, classes)


def with_images(table: pa.Table, encoded: Sequence[bytes]) -> pa.Table:
    """Return a canonical table with other encoded images, which lie in no file."""
    return table.set_column(table.column_names.index("image"), "image", _image_column(encoded, None))


def _image_column(encoded: Sequence[bytes], paths: Sequence[str | None] | None) -> pa.Array:
    paths = [None] * len(encoded) if paths is None else paths
    children = [pa.array(encoded, pa.binary()), pa.array(paths, pa.string())]
    return pa.StructArray.from_arrays(children, fields=list(IMAGE_TYPE))


def with_classes(table: pa.Table, classes: Sequence[str] | None) -> pa.Table:
    """Return `table` with schema metadata that names the classes, for this package and for Hugging Face."""
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if "label" in table.column_names and classes is not None:
        features["label"] = {"names": list(classes), "_type": "ClassLabel"}
    own = {"classes": None if classes is None else list(classes)}
    metadata = {METADATA_KEY: json.dumps(own), b"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata)


def extension_of(field: pa.Field) -> str:
    """Return the name of the extension type that a column has in its file, "" if it has none."""
    return (field.metadata or {}).get(MUTED, b"").decode("utf-8", "replace")


def _with_extensions(table: pa.Table) -> pa.Table:
    """Return a table to be written, whose columns are again of the extension types that they were read from."""
    schema = table.schema
    for place, field in enumerate(schema):
        if name := extension_of(field):
            known = {key: value for key, value in field.metadata.items() if key != MUTED}
            schema = schema.set(place, field.with_metadata({**known, EXTENSION: name.encode()}))
    return pa.table(table.columns, schema=schema)


def table_to_parquet(table: pa.Table) -> bytes:
    """Return `table` as one Parquet file with page checksums; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        _with_extensions(table.combine_chunks()),
        sink,
        row_group_size=ROW_GROUP_IMAGES,
        compression="zstd",
        compression_level=1,
        # A dictionary and statistics of image bytes would be useless, because each image differs.
        use_dictionary=False,
        write_statistics=[name for name in ("id", "label") if name in table.column_names],
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def image_bytes(table: pa.Table) -> list[bytes]:
    """Return the encoded images of a canonical table, one bytes object per row."""
    # Chunk by chunk, because one chunk cannot hold more than two gigabytes.
    return [data for chunk in table["image"].chunks for data in chunk.field("bytes").to_pylist()]


def extra_columns(table: pa.Table) -> pa.Table:
    """Return the extra columns of a canonical table, which are all but id, image and label."""
    return table.drop_columns([name for name in CANONICAL if name in table.column_names])


def refuse_repeated(url: str, ids: Sequence[str]) -> None:
    """Raise InputError for an id that occurs twice."""
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(f"{url}: id {twice} occurs more than once; give every image its own id")


def refuse_types(url: str, files: Mapping[str, Iterable[pa.Field]], config: DataConfig) -> None:
    """Raise InputError if an extra column is of two types that no table can hold, in files given by their keys.

    Tensors of two shapes are such types, because a table has one shape for a column.
    """
    known: dict[str, tuple[str, pa.Field]] = {}
    for key, fields in files.items() if config.extra_columns == "keep" else ():
        for field in fields:
            other, before = known.setdefault(field.name, (key, field))
            if field.equals(before, check_metadata=True):
                continue
            first, second = _type_words(before), _type_words(field)
            try:
                if first != second and extension_of(before) and extension_of(field):
                    raise pa.ArrowTypeError("extension types differ")
                both = pa.unify_schemas([pa.schema([before]), pa.schema([field])]).field(0)
            except pa.ArrowException as error:
                raise InputError(
                    f"{url}: column {field.name!r} holds {first} in {other} and {second} in {key}; make them "
                    "alike, or leave such columns out with --set data.extra_columns=drop"
                ) from error
            known[field.name] = (other if both.type == before.type else key, both)


def _type_words(field: pa.Field) -> str:
    said = ((field.metadata or {}).get(name, b"").decode("utf-8", "replace") for name in (MUTED, OF_EXTENSION))
    return " ".join([str(field.type), *filter(None, said)])


def say_left_out(url: str, names: Collection[str], image: str, label: str | None, config: DataConfig) -> None:
    """Say which of the columns `names` do not come along, because those of images and labels take their names."""
    for name, column in (("image", image), ("label", label)):
        if column not in (None, name) and name in names and config.extra_columns == "keep":
            say_once(f"{url}: column {name!r} is left out, because column {column!r} takes its name")


def labels_or_none(table: pa.Table) -> list[int]:
    """Return the labels of a canonical table, -1 where there is none."""
    labels: list[int] = (
        table["label"].fill_null(-1).to_pylist() if "label" in table.column_names else [-1] * table.num_rows
    )
    return labels


def all_labels(url: str, table: pa.Table, least: int = -1) -> list[int] | None:
    """Return the labels of a canonical table, None if it has none. Raises InputError for a row without one.

    A label below `least` is none.
    """
    if "label" not in table.column_names:
        return None
    labels: list[int | None] = table["label"].to_pylist()
    found = [label for label in labels if label is not None and label >= least]
    if len(found) < len(labels):
        row = next(row for row, label in enumerate(labels) if label is None or label < least)
        name = table["id"][row].as_py()
        raise InputError(f"{url}: image {name} has no label; use the parquet layout for it")
    return found


def check_label(where: str, label: int, classes: Sequence[str] | None) -> None:
    """Raise InputError unless `label` is an index into `classes`, if known, or -1, which means no label."""
    if not -1 <= label < (2**63 if classes is None else len(classes)):
        known = "labels begin at 0" if classes is None else f"there are {len(classes)} classes"
        raise InputError(f"{where}: label {label} is out of range, {known} and -1 means no label; mend it")


def label_text(where: str, text: str) -> str:
    """Return a label that is text without the space around it. Raises InputError for no text and other numbers."""
    text = text.strip()
    if (number := whole_number(text)) is None and (not text or _NUMBER.fullmatch(text)):
        known = "a whole number, such as 3, nor the name of a class"
        raise InputError(f"{where}: label {text!r} is neither {known}; mend it, -1 means no label")
    check_label(where, number or 0, None)
    return text


def whole_number(text: str) -> int | None:
    """Return the number that is written in a label, None if there is none."""
    return int(text.partition(".")[0]) if WHOLE.fullmatch(text) else None


def label_of(text: str, places: Mapping[str, int] | None) -> int | None:
    """Return the label that a text means: its place among names, else its number; -1 is no label in both.

    None if it has no such place or number.
    """
    number = whole_number(text)
    return number if places is None or number == -1 else places.get(text)


def label_like(names: Iterable[str]) -> str | None:
    """Return the one of some names of columns that is likeliest that of the labels, None if none is."""
    folded = {name.lower(): name for name in names}
    return next((folded[name] for name in LABEL_NAMES if name in folded), None)


def regroup(tables: Iterable[pa.Table], max_images: int, max_bytes: int) -> Iterator[pa.Table]:
    """Yield the rows of `tables` in order as tables of at most `max_images` rows and about `max_bytes`."""
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
    """Return the note of the dataset in `store`, or {} if it is missing or damaged; readers do not need it."""
    try:
        note = json.loads(store.read(NOTE))
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def noted_classes(store: Store, column: str = CANONICAL[2]) -> list[str] | None:
    """Return the class names in the note of the dataset in `store`, or None; another column has none."""
    classes = read_note(store).get("classes") if column == CANONICAL[2] else None
    return [str(name) for name in classes] if isinstance(classes, list) and classes else None
