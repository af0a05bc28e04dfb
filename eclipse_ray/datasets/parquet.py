"""Parquet files in the canonical layout, which is that of Hugging Face. Each file is one part."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, BinaryIO
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import extensions, folder, is_of_the_store
from eclipse_ray.datasets.arrays import Form, Layout, state
from eclipse_ray.datasets.table import (
    CANONICAL,
    FILE_BYTES,
    FILE_IMAGES,
    METADATA_KEY,
    Part,
    SourceFile,
    canonical_table,
    check_label,
    extension_of,
    label_like,
    label_of,
    label_text,
    refuse_types,
    regroup,
    say_left_out,
    table_to_parquet,
    with_classes,
)
from eclipse_ray.errors import InputError
from eclipse_ray.log import say_once
from eclipse_ray.storage.store import Entry, Store

WIDE_GROUP = 128 * 2**20
"""Bytes above which a row group is named: twice those of a shard."""
STREAMED = 8 * 2**20
"""Bytes above which row groups are not read as a whole for the sake of a few rows."""
# What a stream reads at once from each column, and holds of decoded rows; rows of such a batch at most.
_BUFFER_BYTES, _BATCH_BYTES, _BATCH_ROWS = 4 * 2**20, 8 * 2**20, 512
# Files that a process keeps open to read on.
_STREAMS_KEPT = 2
# Files whose footers are read at the same time.
_LISTING_THREADS = 16
_MAGIC = b"PAR1"
# The exceptions that pyarrow raises for damaged files; a damaged column name is a UnicodeDecodeError.
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
_DEFAULT_LABEL_COLUMN = DataConfig.model_fields["label_column"].default


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part per file that has rows, from the footers, and the class names if a footer has them.

    Of labels that are text the column is read; without names in a footer the classes are the sorted texts. Raises
    InputError for a damaged file, an unknown extension type, a missing image or label column, paths instead of
    images, or an extra column of several types.
    """

    labelled: dict[str, bool] = {}
    texts: dict[str, set[str] | None] = {}
    forms: list[tuple[Form, int]] = []
    kinds: dict[str, list[pa.Field]] = {}

    def look(entry: Entry) -> tuple[Part, list[str] | None, list[int]]:
        with store.open(entry.key) as file:
            where = f"{store.url}/{entry.key}"
            metadata, schema = _metadata(where, file)
            _check_columns(where, schema, config)
            label = _label_column(where, schema, config)
            say_left_out(store.url, schema.names, config.image_column, label, config)
            _refuse_paths(where, metadata, file, config)
            labelled[entry.key] = label is not None
            extras = {*(_columns(where, schema, config) or schema.names)} - {"id", config.image_column, label}
            kinds[entry.key] = [field for field in schema if field.name in extras]
            tensors = extensions.tensors_of(where, schema.field(config.image_column))
            if tensors and (order := extensions.order_of_tensors(tensors)):
                form = Form(Layout(order, 255), "uint8", "without labels" if label is None else "with labels")
                forms.append((form, metadata.num_rows))
            _warn_of_wide_groups(where, metadata)
            if label is not None:
                texts[entry.key] = None
                if not pa.types.is_integer(schema.field(label).type):
                    texts[entry.key] = _texts(where, _read_column(where, metadata, file, label))
        part = Part(entry.key, metadata.num_rows, entry.size, entry.version)
        return part, None if config.labels else _classes(schema, label), _extreme_labels(metadata, label)

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = list(pool.map(look, entries))
    folder.refuse_doubtful(store, config, labelled)
    refuse_types(store.url, {part.key: kinds[part.key] for part, *_ in found if part.rows}, config)
    named = {part.key: names for part, names, _ in found if names is not None}
    classes = _common_classes(store, named) if named else _classes_of_texts(store, texts)
    if forms:
        counts = Counter[Form]()
        for form, rows in forms:
            counts[form] += rows
        state(store.url, [part for part, *_ in found], counts)
    for part, _, labels in found:
        for label in labels:
            check_label(f"{store.url}/{part.key}", label, classes)
    return [part for part, *_ in found], classes


def _warn_of_wide_groups(where: str, metadata: pq.FileMetaData) -> None:
    # A worker reads a row group from its beginning up to its last shard.
    groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
    widest = max(groups, key=lambda group: int(group.total_byte_size), default=None)
    if widest is not None and widest.total_byte_size > WIDE_GROUP and widest.num_rows > 1:
        say_once(
            f"{where}: one row group has {widest.num_rows:,} images and {widest.total_byte_size / 2**20:,.0f} MiB"
            ", which each worker reads up to its last shard; write it again with row_group_size=100, or convert it"
        )


def _common_classes(store: Store, named: Mapping[str, list[str]]) -> list[str]:
    first, classes = next(iter(named.items()))
    for key, names in named.items():
        if names != classes:
            raise InputError(
                f"{store.url}: {first} and {key} name different classes ({', '.join(classes)} and "
                f"{', '.join(names)}), so a label would mean two things; write them with the same classes"
            )
    return classes


def _classes_of_texts(store: Store, texts: Mapping[str, set[str] | None]) -> list[str] | None:
    number = next((key for key, found in texts.items() if found is None), None)
    return folder.classes_of_texts(store.url, set[str]().union(*(each for each in texts.values() if each)), number)


def likely_labels(source: SourceFile) -> str | None:
    """Return the column of a file without labels that may hold them by name and type, None if there is none."""
    with source.store.open(source.key) as file:
        schema = _metadata(source.where, file)[1]
    if _label_column(source.where, schema, source.config) is not None:
        return None
    return label_like(field.name for field in schema if _may_be_labels(field.type))


def stored_ids(store: Store, key: str) -> list[str]:
    """Return the ids in the column `id` of a file, none if it has no such column; only that column is read."""
    where = f"{store.url}/{key}"
    with store.open(key) as file:
        metadata, schema = _metadata(where, file)
        if "id" not in schema.names:
            return []
        return _text_ids(where, _read_column(where, metadata, file, "id")).drop_null().to_pylist()


def read_rows(source: SourceFile, start: int, stop: int) -> pa.Table:
    """Return rows `start` to `stop` of one file as a canonical table; page checksums are verified.

    Of row groups that are much longer than that, a process that reads range after range reads each byte once.
    Raises InputError for a damaged file and for columns of a wrong type.
    """
    where = source.where
    with source.store.open(source.key) as file:
        metadata, schema = _metadata(where, file)
        columns = _columns(where, schema, source.config)
        groups, skipped = _groups(metadata, start, stop)
        with _reading(where):
            if _is_long(metadata, groups, stop - start):
                table = _streamed(source, metadata, groups, skipped, start, stop, columns)
            else:
                reader = _reader(file, metadata, pre_buffer=True)
                table = _in_plain(reader.read_row_groups(groups, columns)).slice(start - skipped, stop - start)
    if table.num_rows != stop - start:
        raise InputError(
            f"{where}: expected rows {start} to {stop}, found {table.num_rows} of them; "
            "the file changed since it was listed, start again from the listing"
        )
    return _canonical(source, table, start)


def read_labels(source: SourceFile) -> NDArray[np.int64] | None:
    """Return the labels of one file, -1 for none, or None if it has no labels; only their column is read."""
    with source.store.open(source.key) as file:
        metadata, schema = _metadata(source.where, file)
        label = _label_column(source.where, schema, source.config)
        if label is None:
            return None
        column = _read_column(source.where, metadata, file, label)
    column = _whole_labels(source.where, column, source.classes)
    return pc.fill_null(column, -1).to_numpy()


def write(
    store: Store,
    tables: Iterable[pa.Table],
    *,
    classes: Sequence[str] | None = None,
    max_images: int = FILE_IMAGES,
    max_bytes: int = FILE_BYTES,
) -> int:
    """Write canonical `tables` as data/part-00000.parquet and so on; return the number of images.

    A file ends before it exceeds `max_images` or about `max_bytes`.
    """
    images = 0
    for number, table in enumerate(regroup(tables, max_images, max_bytes)):
        data = table_to_parquet(with_classes(table, classes))
        store.write(f"data/part-{number:05d}.parquet", data)
        images += table.num_rows
    return images


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn Arrow errors about content into InputError; those of a disk or network pass."""
    try:
        yield
    except _DAMAGE as error:
        if is_of_the_store(error):
            raise
        reason = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
        raise InputError(
            f"{where}: the Parquet file is damaged: {reason}; copy it again or leave it out"
        ) from error


def _metadata(where: str, file: BinaryIO) -> tuple[pq.FileMetaData, pa.Schema]:
    """Return the footer and its schema, in plain types. Raises InputError for an incomplete file."""
    # Only the bytes of the footer are read. Arrow would read 64 KiB from the end, which include image bytes.
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - 8:
        raise InputError(f"{where}: not a whole Parquet file; copy it again or leave it out")
    file.seek(size - 8 - length)
    footer = extensions.muted(file.read(length))
    with _reading(where):
        metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer + len(footer).to_bytes(4, "little") + _MAGIC))
        return metadata, _plain_schema(metadata.schema.to_arrow_schema())


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([_plain(field) for field in schema], schema.metadata)


def _in_plain(rows: Any) -> Any:
    # Rows just read, because pyarrow cannot cast a slice of a struct that has a field of nulls.
    return rows.cast(_plain_schema(rows.schema))


def _plain(field: pa.Field) -> pa.Field:
    """Return a column without what its writer chose and its values do not need: dictionaries, views, wide offsets.

    Files of one dataset often differ in these. A column with an extension type keeps the form which that needs.
    """
    kind, types = field.type, pa.types
    if extension_of(field):
        return field
    if types.is_dictionary(kind):
        return _plain(field.with_type(kind.value_type))
    if types.is_large_string(kind) or types.is_string_view(kind):
        kind = pa.string()
    elif types.is_large_binary(kind) or types.is_binary_view(kind):
        kind = pa.binary()
    elif types.is_list(kind) or types.is_large_list(kind):
        kind = pa.list_(_plain(kind.value_field))
    elif types.is_struct(kind):
        kind = pa.struct([_plain(each) for each in kind])
    return field.with_type(kind)


def _reader(file: BinaryIO, metadata: pq.FileMetaData, **settings: Any) -> pq.ParquetFile:
    return pq.ParquetFile(
        file, metadata=metadata, arrow_extensions_enabled=False, page_checksum_verification=True, **settings
    )


def _groups(metadata: pq.FileMetaData, start: int, stop: int) -> tuple[range, int]:
    # Returns the row groups that overlap the range, and the number of rows before the first of them.
    count = metadata.num_row_groups
    ends = np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(count))])
    first = int(np.searchsorted(ends, start, "right")) - 1
    return range(first, min(count, int(np.searchsorted(ends, stop)))), int(ends[first])


def _is_long(metadata: pq.FileMetaData, groups: Sequence[int], rows: int) -> bool:
    found = [metadata.row_group(group) for group in groups]
    return (
        sum(group.num_rows for group in found) > 2 * rows
        and sum(group.total_byte_size for group in found) > STREAMED
    )


class _Stream:
    """The rows of a file from `place` on, read in order through buffers of a few megabytes."""

    def __init__(
        self, file: BinaryIO, metadata: pq.FileMetaData, first: int, place: int, columns: list[str] | None
    ) -> None:
        self.file, self.place, self.rows = file, place, metadata.num_rows
        group = metadata.row_group(first)
        fitting = _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
        batches = _reader(file, metadata, pre_buffer=False, buffer_size=_BUFFER_BYTES).iter_batches(
            max(1, min(_BATCH_ROWS, fitting)), range(first, metadata.num_row_groups), columns
        )
        self.batches = map(_in_plain, batches)
        self.held: pa.RecordBatch | None = None

    def take(self, start: int, stop: int) -> pa.Table:
        """Return rows `start` to `stop` of the file, or fewer if it ends before; earlier ones are skipped."""
        found: list[pa.RecordBatch] = []
        while self.place < stop and (held := self.held or next(self.batches, None)) is not None:
            taken, skipped = held.slice(0, stop - self.place), max(0, start - self.place)
            self.held = held.slice(taken.num_rows)
            self.place += taken.num_rows
            if skipped < taken.num_rows:
                found.append(taken.slice(skipped))
        if not found:
            raise pa.ArrowInvalid(f"it ends before row {start}")
        return pa.Table.from_batches(found)

    def __del__(self) -> None:
        self.file.close()


# The streams that this process may go on with, by file and columns. Each is used by one thread at a time, because
# a thread takes it out. A stream that nobody holds any more closes its file.
_STREAMS: dict[tuple[str, ...], _Stream] = {}
_STREAMS_LOCK = Lock()


def _streamed(
    source: SourceFile,
    metadata: pq.FileMetaData,
    groups: Sequence[int],
    skipped: int,
    start: int,
    stop: int,
    columns: list[str] | None,
) -> pa.Table:
    """Return rows `start` to `stop`, which begin in the first of `groups`, before which `skipped` rows lie."""
    name = (source.where, source.store.entry(source.key).version, *(columns or ()))
    with _STREAMS_LOCK:
        stream = _STREAMS.pop(name, None)
    if stream is None or not skipped <= stream.place <= start:
        stream = _Stream(source.store.open(source.key), metadata, groups[0], skipped, columns)
    table = stream.take(start, stop)
    if stream.place < stream.rows:
        with _STREAMS_LOCK:
            _STREAMS.pop(name, None)
            _STREAMS[name] = stream
            for each in list(_STREAMS)[:-_STREAMS_KEPT]:
                del _STREAMS[each]
    return table


def _columns(where: str, schema: pa.Schema, config: DataConfig) -> list[str] | None:
    """Return the columns that are read, None for all. No other column comes along under a canonical name."""
    wanted = ("id", config.image_column, _label_column(where, schema, config))
    left = schema.names if config.extra_columns == "drop" else ("image", "label", config.label_column)
    names = [name for name in schema.names if name in wanted or name not in left]
    return None if names == schema.names else names


def _check_columns(where: str, schema: pa.Schema, config: DataConfig) -> None:
    _require_column(where, schema, "data.image_column", config.image_column)
    extensions.refuse_unknown(where, schema, _columns(where, schema, config))
    image = schema.field(config.image_column)
    if (tensors := extensions.tensors_of(where, image)) is None:
        _check_image_type(where, config.image_column, image.type)
    else:
        extensions.check_images(where, image, tensors)
    label = _label_column(where, schema, config)
    if label is not None and not _may_be_labels(schema.field(label).type):
        raise InputError(
            f"{where}: column {label!r} holds {schema.field(label).type}, expected whole numbers or names of "
            "classes; name another column with --set data.label_column=NAME, or read the images without labels: "
            "--set data.labels=none"
        )


def _may_be_labels(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _read_column(where: str, metadata: pq.FileMetaData, file: BinaryIO, name: str) -> pa.ChunkedArray:
    with _reading(where):
        return _in_plain(_reader(file, metadata).read(columns=[name]))[name]


def _texts(where: str, column: pa.ChunkedArray) -> set[str] | None:
    """Return the different texts of a column of labels, None if it holds no text but whole numbers."""
    column = _one_each(where, column)
    if not pa.types.is_string(column.type):
        _whole_labels(where, column, None)
        return None
    column = _plain_text(where, "label", column)
    return {label_text(where, text) for text in column.unique().drop_null().to_pylist()}


def _plain_text(where: str, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    try:
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise InputError(
            f"{where}: column {name!r} holds {column.type}, expected text ({error}); rename the column, or "
            "write it again as text"
        ) from error


def _one_each(where: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return labels without the lists in which each lies alone. Raises InputError for other lists."""
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        return column
    if not pc.all(pc.equal(pc.list_value_length(column), 1)).as_py() or column.null_count:
        raise InputError(f"{where}: labels are lists of several values or none; store one value per image")
    return pc.list_flatten(column)


def _whole_labels(where: str, column: pa.ChunkedArray, classes: Sequence[str] | None) -> pa.ChunkedArray:
    """Return labels as int64 (N): numbers without loss, NaN as none, names as indices into `classes`.

    Raises InputError for labels that are no whole numbers and no names of classes.
    """
    column = _one_each(where, column)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    if pa.types.is_string(column.type):
        column = _plain_text(where, "label", column)
        places = None if classes is None else {name.strip(): place for place, name in enumerate(classes)}
        texts = column.unique().drop_null()
        labels = [label_of(text.strip(), places) for text in texts.to_pylist()]
        if None in labels:
            known = "no whole number" if classes is None else f"none of the classes {', '.join(classes[:20])}"
            raise InputError(f"{where}: label {texts[labels.index(None)]} is {known}; mend it")
        column = pc.take(pa.array(labels, pa.int64()), pc.index_in(column, texts))
        column = column if classes is None else pc.if_else(pc.equal(column, -1), None, column)
    try:
        column = column.cast(pa.int64())
    except pa.ArrowException as error:
        raise InputError(f"{where}: labels are not whole numbers: {error}; store one integer per image") from error
    for label in pc.min_max(column).as_py().values():
        check_label(where, -1 if label is None else label, classes)
    return column


def _refuse_paths(where: str, metadata: pq.FileMetaData, file: BinaryIO, config: DataConfig) -> None:
    """Raise InputError if the footer shows rows that hold the path of an image and not its bytes.

    A row group with more empty cells of bytes than of paths has such a row. Workers check the other groups.
    """
    columns = {metadata.schema.column(place).path: place for place in range(metadata.num_columns)}
    places = [columns.get(f"{config.image_column}.{name}") for name in ("bytes", "path")]
    if None in places:
        return
    first = 0
    for group in range(metadata.num_row_groups):
        empty, absent = (metadata.row_group(group).column(place).statistics for place in places)
        known = empty and absent and empty.has_null_count and absent.has_null_count
        if known and empty.null_count > absent.null_count:
            with _reading(where):
                table = _in_plain(_reader(file, metadata).read_row_group(group, [config.image_column]))
            _encoded(where, table, first, config)
        first += metadata.row_group(group).num_rows


def _encoded(
    where: str, table: pa.Table, start: int, config: DataConfig
) -> tuple[Sequence[bytes], pa.Array | None]:
    """Return the encoded images of the rows from `start` on, b"" for none, and their paths if there are any.

    Raises InputError for a row that holds a path instead of an image.
    """
    images = table[config.image_column].combine_chunks()
    field = table.schema.field(config.image_column)
    if (tensors := extensions.tensors_of(where, field)) is not None:
        return extensions.images_of(where, field, images, tensors, start), None
    encoded, paths = images, None
    if pa.types.is_struct(images.type):
        # Unlike `field`, `flatten` passes the nulls of the struct on to its children.
        children = {images.type.field(i).name: child for i, child in enumerate(images.flatten())}
        encoded = children["bytes"]
        paths = children.get("path")
        if paths is not None:
            paths = _plain_text(where, f"{config.image_column}.path", paths)
    # A missing image becomes empty bytes. It fails later in decoding, with its id, so that no row is lost.
    encoded = pc.fill_null(encoded, b"")
    if paths is not None:
        lone = pc.and_(pc.equal(pc.binary_length(encoded), 0), paths.is_valid())
        row = pc.index(lone, True).as_py()
        if row >= 0:
            raise InputError(
                f"{where}: column {config.image_column!r} holds a path ({paths[row]}) and no bytes in row "
                f"{start + row}; embed the images first, in Hugging Face datasets with embed_external_files=True"
            )
    return encoded, paths


def _extreme_labels(metadata: pq.FileMetaData, name: str | None) -> list[int]:
    # Nearly every writer stores statistics in the footer. The rows themselves are checked when they are read.
    place = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == name), None)
    labels: list[int] = []
    for group in range(metadata.num_row_groups if place is not None else 0):
        statistics = metadata.row_group(group).column(place).statistics
        if statistics is not None and statistics.has_min_max:
            labels += [statistics.min, statistics.max]
    return [label for label in labels if isinstance(label, int)]


def _require_column(where: str, schema: pa.Schema, setting: str, name: str) -> None:
    if name in schema.names:
        return
    folded = {column.lower(): column for column in schema.names}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.4)
    hint = folded[near[0]] if near else "NAME"
    raise InputError(
        f"{where}: no column {name!r} among {', '.join(schema.names)}; name it with --set {setting}={hint}"
    )


def _label_column(where: str, schema: pa.Schema, config: DataConfig) -> str | None:
    if config.labels is not None:
        return None  # data.labels says what the labels are.
    if config.label_column in schema.names:
        return config.label_column
    if config.label_column != _DEFAULT_LABEL_COLUMN:
        _require_column(where, schema, "data.label_column", config.label_column)
    return None


def _check_image_type(where: str, name: str, kind: pa.DataType) -> None:
    inner = kind
    if pa.types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        inner = kind.field(names.index("bytes")).type if "bytes" in names else kind
    if not pa.types.is_binary(inner):
        raise InputError(
            f"{where}: column {name!r} holds {kind}, expected encoded images as binary or "
            "struct<bytes: binary, path: string>; name another column with --set data.image_column=NAME"
        )


def _canonical(source: SourceFile, table: pa.Table, start: int) -> pa.Table:
    where, config, classes = source.where, source.config, source.classes
    _check_columns(where, table.schema, config)
    label = _label_column(where, table.schema, config)
    encoded, paths = _encoded(where, table, start, config)
    try:
        ids = _ids(where, table, source.key, start)
        labels = None if label is None else _whole_labels(where, table[label], classes)
    except pa.ArrowException as error:
        raise InputError(f"{where}: ids or labels cannot be read: {error}; mend the source") from error
    known = {"id", config.image_column, label}
    extras = table.select([name for name in table.column_names if name not in known])
    return canonical_table(ids, encoded, labels, extras, classes, paths)


def _ids(where: str, table: pa.Table, key: str, start: int) -> Sequence[str]:
    if CANONICAL[0] not in table.column_names:
        return [f"{key}#{row}" for row in range(start, start + table.num_rows)]
    ids = _text_ids(where, table[CANONICAL[0]]).combine_chunks()
    if ids.null_count:
        raise InputError(f"{where}: column 'id' has empty cells; give every row an id or drop the column")
    return ids


def _text_ids(where: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    # 16 bytes are a UUID, whether or not the file says so.
    if column.type == pa.binary(16):
        texts = [None if each is None else str(UUID(bytes=each)) for each in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    return _plain_text(where, CANONICAL[0], column)


def _classes(schema: pa.Schema, label: str | None) -> list[str] | None:
    metadata = schema.metadata or {}
    try:
        own = json.loads(metadata.get(METADATA_KEY, b"{}"))
        foreign = json.loads(metadata.get(b"huggingface", b"{}"))
        feature = foreign.get("info", {}).get("features", {}).get(label, {})
        known = own.get("classes") if label in (None, _DEFAULT_LABEL_COLUMN) else None
        names = known or feature.get("names")
    except (ValueError, AttributeError):
        return None  # Class names are optional, and labels are valid without them.
    return [str(name) for name in names] if isinstance(names, list) and names else None
