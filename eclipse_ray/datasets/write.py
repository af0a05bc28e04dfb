"""Writing datasets: from tables, converted to another layout, or split into a clean set and the rest."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import posixpath
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig, Layout, content_hash
from eclipse_ray.datasets import folder, npz, parquet, webdataset
from eclipse_ray.datasets.formats import UNFINISHED, Source, open_source, read_tables
from eclipse_ray.datasets.images import ImageError, check_encoding, decode_stored, encode_image
from eclipse_ray.datasets.memory import choose_clean, decode_resized
from eclipse_ray.datasets.table import (
    ESCAPED_KEYS,
    LABELLED,
    NOTE,
    all_labels,
    extra_columns,
    image_bytes,
    labels_or_none,
    with_images,
)
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

Writer = Callable[[Store, Iterable[pa.Table], Sequence[str] | None, DataConfig], int]

_WRITERS: dict[Layout, Writer] = {
    "parquet": lambda store, tables, classes, _: parquet.write(store, tables, classes=classes),
    "folder": lambda store, tables, classes, _: folder.write(store, tables, classes=classes),
    "webdataset": webdataset.write,
    "npz": npz.write,
    "npy": lambda store, tables, _, config: _write_whole(store, tables, config, _npy_files),
    "pt": lambda store, tables, _, config: _write_whole(store, tables, config, _torch_file),
    "pkl": lambda store, tables, _, config: _write_whole(store, tables, config, _pickled_pairs),
}
_WITHOUT_EXTRAS = ("folder", "npy", "pt", "pkl")


def write_dataset(
    url: str,
    tables: Iterable[pa.Table],
    *,
    classes: Sequence[str] | None,
    source: str,
    layout: Layout = "parquet",
    data_config: DataConfig | None = None,
    resume: bool = False,
    doing: str = "",
    passed_over: str = "",
) -> int:
    """Write canonical `tables` as a new dataset at `url` and return the number of images.

    The parts are written first and the note `_eclipse/dataset.json` last; until then readers refuse the dataset.
    `passed_over` is the sentence of the source on files that were not read, for the report. With `resume`, the
    same tables overwrite the parts that an interrupted call left. What an interrupted call with the same `doing`,
    a command in short, left is removed first. Raises InputError if `url` already holds other data, and for data
    that `layout` cannot hold.
    """
    store = Store(url)
    mark = _begin(store, doing, resume)
    columns = set[str]()

    def watched() -> Iterator[pa.Table]:
        for table in tables:
            columns.update(table.column_names)
            extras = extra_columns(table).column_names
            # At the first table: a writer may read all of them before it writes.
            if extras and layout in _WITHOUT_EXTRAS:
                raise InputError(
                    f"{store.url}: the {layout} layout cannot hold the column {extras[0]!r}; use the parquet "
                    "layout, or leave such columns out with --set data.extra_columns=drop"
                )
            yield table

    try:
        images = _WRITERS[layout](store, watched(), classes, data_config or DataConfig())
    except InputError:
        # If nothing was written, the mark is removed too, so that the same output can be used again.
        if next(store.list(), None) is None:
            store.delete(UNFINISHED)
        raise
    note = {
        "images": images,
        "classes": None if classes is None else list(classes),
        "source": source,
        **({} if "label" in columns else {LABELLED: False}),
        **({"passed_over": passed_over} if passed_over else {}),
    }
    if layout == "webdataset":
        note[ESCAPED_KEYS] = True
    _require_alone(store, mark)
    store.write(NOTE, json.dumps(note, indent=2).encode())
    store.delete(UNFINISHED)
    return images


# ---- The forms in which poisons are published, each a file or two as training scripts of the field load them


Arrays = tuple[NDArray[np.uint8], NDArray[np.int64] | None]
"""All images (N, H, W, 3) and labels (N), None without labels."""


def _write_whole(
    store: Store,
    tables: Iterable[pa.Table],
    config: DataConfig,
    files_of: Callable[[str, Arrays], dict[str, bytes]],
) -> int:
    table = pa.concat_tables(tables, promote_options="default")
    images, labels = npz.stack_images(store.url, table, config), all_labels(store.url, table)
    whole = images, None if labels is None else np.array(labels, np.int64)
    for name, data in files_of(store.url, whole).items():
        store.write(name, data)
    return len(images)


def _npy_files(url: str, arrays: Arrays) -> dict[str, bytes]:
    files = {}
    for name, values in zip(("images.npy", "labels.npy"), arrays, strict=True):
        if values is not None:
            stream = io.BytesIO()
            np.save(stream, values, allow_pickle=False)
            files[name] = stream.getvalue()
    return files


def _pickled_pairs(url: str, arrays: Arrays) -> dict[str, bytes]:
    """A list of (raw RGB bytes, label), as ECLIPSE publishes; this pickle names no class."""
    images, labels = arrays
    if labels is None or images.shape[1] != images.shape[2]:
        raise InputError(f"{url}: a pickled list holds square images with labels; use the npy layout")
    pairs = [(image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)]
    return {"data.pkl": pickle.dumps(pairs, protocol=4)}


def _torch_file(url: str, arrays: Arrays) -> dict[str, bytes]:
    """What torch.save writes of {"data": uint8 (N, 3, H, W), "labels": int64 (N)}; datasets know no torch."""
    images, labels = arrays
    found: dict[str, NDArray[Any]] = {"data": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
    if labels is not None:
        found["labels"] = labels
    members, opcodes = {}, b"\x80\x02}"
    for place, (name, array) in enumerate(found.items()):
        members[f"data/data/{place}"] = array.astype(array.dtype.newbyteorder("<")).tobytes()
        opcodes += _opcodes(name) + _tensor_opcodes(str(place), array) + b"s"
    members |= {"data/data.pkl": opcodes + b".", "data/byteorder": b"little", "data/version": b"3\n"}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            # ZipInfo has a fixed date, so that the same arrays give the same bytes.
            archive.writestr(zipfile.ZipInfo(name), data)
    return {"data.pt": stream.getvalue()}


def _tensor_opcodes(key: str, array: NDArray[Any]) -> bytes:
    kind = {"uint8": "Byte", "int64": "Long"}[array.dtype.name]
    strides = tuple(step // array.itemsize for step in array.strides)
    storage = _opcodes("storage") + f"ctorch\n{kind}Storage\n".encode() + _opcodes(key) + _opcodes("cpu")
    values = (
        b"((" + storage + _opcodes(array.size) + b"tQ" + _opcodes(0) + _opcodes(array.shape) + _opcodes(strides)
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + values + b"\x89ccollections\nOrderedDict\n)RtR"


def _opcodes(value: str | int | tuple[int, ...]) -> bytes:
    # The opcodes of a pickle, without its head and its end.
    return pickle.dumps(value, protocol=2)[2:-1]


def refuse_existing(store: Store, doing: str = "") -> None:
    """Raise InputError that names one object if `store` is not empty, but for what an interrupted `doing` left.

    Raises StorageError if it cannot be written to: the next step may take hours.
    """
    _refuse_taken(store, doing)
    store.require_writable()


def _refuse_taken(store: Store, doing: str) -> None:
    if store.is_file():
        raise InputError(f"{store.url}: is a file; name a new folder to write to")
    if store.exists(UNFINISHED):
        if not doing or store.read(UNFINISHED).decode().partition("\n")[0] != doing:
            raise InputError(f"{store.url}: holds a dataset whose writing was interrupted; delete it first")
    elif taken := next(itertools.chain(store.list(), store.list("_eclipse")), None):
        raise InputError(f"{store.url}: already holds data ({taken.key}); delete it or name another folder")


def _begin(store: Store, doing: str, resume: bool = False) -> bytes:
    """Mark a folder as one that is being written, after what an interrupted `doing` left is removed."""
    mark, left = f"{doing}\n{uuid4().hex}".encode(), []
    if not resume:
        # Writing the mark shows whether it can be written to.
        _refuse_taken(store, doing)
        left = [entry.key for entry in store.list(hidden=True)] if store.exists(UNFINISHED) else []
    store.write(UNFINISHED, mark)
    for key in left:
        if key != UNFINISHED:
            store.delete(key)
    return mark


def _require_alone(store: Store, mark: bytes) -> None:
    # A second command takes this one for one that was stopped, and removes what it has written.
    if not store.exists(UNFINISHED) or store.read(UNFINISHED) != mark:
        raise InputError(f"{store.url}: another command began to write here meanwhile; let one of them run alone")


def convert(source_url: str, output_url: str, data_config: DataConfig, layout: Layout = "parquet") -> int:
    """Write the dataset at `source_url` in another layout and return the number of images.

    Encoded images are copied byte for byte; arrays become PNG, and images become arrays for npz. If `data.resize`
    is set, all images are resized and encoded as `data.encoding`. Raises InputError for an unreadable source, for
    an output that already holds data, for data that `layout` cannot hold, and for an image that must be decoded
    but cannot be.
    """
    check_encoding(data_config.encoding, data_config.allow_lossy)
    doing = f"convert {Store(source_url).url}"
    refuse_existing(Store(output_url), doing)
    source = open_source(source_url, data_config)
    return write_dataset(
        output_url,
        converted(source),
        classes=source.classes,
        source=source_url,
        layout=layout,
        data_config=data_config,
        doing=doing,
        passed_over=source.passed_over,
    )


def converted(source: Source) -> Iterator[pa.Table]:
    """Yield the tables of a source, their images resized and encoded anew if `data.resize` is set."""
    for table in read_tables(source):
        yield table if source.data.resize is None else _resized(source, table)


def _resized(source: Source, table: pa.Table) -> pa.Table:
    encoded = []
    for name, data in zip(table["id"].to_pylist(), image_bytes(table), strict=True):
        pixels = decode_resized(source.url, name, data, source.data)
        encoded.append(encode_image(pixels, source.data.encoding))
    return with_images(table, encoded)


def split(
    source_url: str, output_url: str, clean: int, seed: int, data_config: DataConfig
) -> dict[str, int | str]:
    """Write `clean` images to OUT/clean and the others to OUT/rest; return {clean, rest, output}.

    The choice is stratified by label and depends only on `seed` and the pixels. Images with equal pixels stay
    together, so OUT/clean may hold slightly fewer than `clean` images, never more. Images that cannot be decoded
    go to OUT/rest. Raises InputError unless 1 <= clean < images, and for an output that already holds data.
    """
    output, doing = Store(output_url), f"split {Store(source_url).url}"
    refuse_existing(output, doing)
    source = open_source(source_url, data_config)
    if not 1 <= clean < source.images:
        raise InputError(
            f"{source_url}: cannot split {clean} clean images off {source.images}; "
            f"ask for 1 to {source.images - 1}"
        )
    hashes, labels = _read_contents(source)
    chosen = choose_clean(hashes, labels, clean, seed)
    if not chosen.any():
        raise InputError(
            f"{source_url}: no image can be split off, as all of them are damaged or copies of each other; "
            "check the source"
        )
    mark = _begin(output, doing)
    counts: dict[str, int | str] = {}
    for name, side in (("clean", chosen), ("rest", ~chosen)):
        counts[name] = write_dataset(
            posixpath.join(output_url, name),
            _select(source, side),
            classes=source.classes,
            source=source_url,
            passed_over=source.passed_over,
        )
    _require_alone(output, mark)
    output.delete(UNFINISHED)
    return {**counts, "output": output_url}


def _read_contents(source: Source) -> tuple[list[str | None], list[int | None]]:
    hashes: list[str | None] = []
    labels: list[int | None] = []
    for table in read_tables(source):
        for data in image_bytes(table):
            try:
                hashes.append(content_hash(decode_stored(data, source.data)))
            except ImageError:
                hashes.append(None)
        labels.extend(None if label < 0 else label for label in labels_or_none(table))
    return hashes, labels


def _select(source: Source, side: NDArray[np.bool_]) -> Iterator[pa.Table]:
    start = 0
    for table in read_tables(source):
        yield table.filter(pa.array(side[start : start + table.num_rows]))
        start += table.num_rows
