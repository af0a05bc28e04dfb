"""Opening a dataset of any format: its parts and classes are listed first, and workers read rows of it later."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import arrays, folder, labels, npz, parquet, published, webdataset
from eclipse_ray.datasets.table import (
    NOTE,
    Part,
    SourceFile,
    Span,
    extra_columns,
    labels_or_none,
    noted_classes,
    read_note,
    with_classes,
)
from eclipse_ray.errors import InputError, did_you_mean
from eclipse_ray.log import counted, say_once
from eclipse_ray.storage import is_hidden
from eclipse_ray.storage.store import Entry, Store

# Exists while a dataset is being written; readers refuse the dataset.
UNFINISHED = "_eclipse/unfinished"
# A purification writes its plan first and its manifest last. Only then data/ holds each image exactly once.
RUN_PLAN, RUN_MANIFEST = "_eclipse/plan.parquet", "_eclipse/manifest.parquet"
# Names of the files in the folder data/ of a purification, and of a dataset that was written.
_OWN_NAME = re.compile(r"(?:[0-9]{6,}(?:-[0-9]+)?-[0-9a-f]{16}|part-[0-9]{5,})\.parquet")
# What a purification leaves for its report: a sentence on the files of the source that were not read.
PASSED_OVER = "_eclipse/passed_over.txt"
# What a file in a form that is not read is, and the next step: by its first bytes, then by its name.
_ARRAYS = "save its arrays, images first, with numpy.savez(FILE, images=..., labels=...)"
_IMAGES = "write its images as files in one folder per class, or as Parquet"
_HEADS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself; fetch it with git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer and not the file itself; fetch it with git annex get"),
    (b"PK\3\4", "a zip archive; unzip it and name the folder"),
    (b"\x1f\x8b", "compressed by gzip; unpack it (gunzip, or tar xzf for a tar) and name what comes out"),
    (b"BZh", "compressed by bzip2; unpack it and name what comes out"),
    (b"\xfd7zXZ\0", "compressed by xz; unpack it and name what comes out"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it and name what comes out"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it and name the folder"),
    (b"Rar!", "a rar archive; unpack it and name the folder"),
    (b"\x89HDF\r\n", f"an HDF5 file; {_ARRAYS}"),
    (b"MATLAB 5.0", f"a MATLAB file, read by scipy.io.loadmat; {_ARRAYS}"),
    (b"SQLite format 3", f"an SQLite database; {_IMAGES}"),
    (b"<!DOCTYPE html", "a web page, such as a sign-in or an error, and not the file itself; download it again"),
    (b"<html", "a web page, such as a sign-in or an error, and not the file itself; download it again"),
    (b"PAR1", "a Parquet file under another name; let its name end in .parquet"),
)
_NAMES: tuple[tuple[str, str], ...] = (
    (
        r"\.arrow",
        "part of a dataset of save_to_disk; write it, or each of its splits, with "
        "datasets.load_from_disk(DIR).to_parquet('data.parquet')",
    ),
    (
        r"\.feather",
        "a table of Arrow; write it with "
        "pyarrow.parquet.write_table(pyarrow.feather.read_table(FILE), 'data.parquet')",
    ),
    (r"\.(?:mdb|lmdb)", f"an LMDB database; {_IMAGES}"),
    (r"\.tfrecords?(?:-\d+-of-\d+)?", f"a file of TensorFlow records; {_IMAGES}"),
    (r"\.mds(?:\.\w+)?", f"a shard of MosaicML Streaming; {_IMAGES}"),
    (r"\.beton", f"a file of FFCV; {_IMAGES}"),
    (r"\.rec", f"a file of MXNet records; {_IMAGES}"),
    (r"\.mat", f"a MATLAB file, read by scipy.io.loadmat; {_ARRAYS}"),
    (r"\.(?:h5|hdf5)", f"an HDF5 file; {_ARRAYS}"),
    (r"-ubyte(?:\.gz)?", f"a file of MNIST; {_ARRAYS}"),
    (r"\.bin", f"raw bytes without a shape; take the Python version of CIFAR, or {_ARRAYS}"),
    (r"\.zip", "a zip archive; unzip it and name the folder"),
    (r"\.(?:7z|rar)", "an archive; unpack it and name the folder"),
    (r"\.(?:gz|tgz|bz2|xz|zst|lz4)", "compressed; unpack it and name what comes out"),
    (r"\.(?:avif|heic|heif|jxl|jp2|tga|ppm|pgm|psd)", "an image of a kind that is not decoded; convert it to PNG"),
)
# Files that begin so because of what their names say: the formats themselves, and compressed tars.
_PLAIN = {b"PK\3\4": (".npz", *published.SUFFIXES), b"PAR1": (".parquet",)}
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
# Files of which the first bytes are read to say what a source is.
_HEADS_READ = 20
# A pointer of Git LFS or git-annex is smaller than this many bytes.
_POINTER_BYTES = 300
# Threads that read the spans of one table.
_READING_THREADS = 8


Claims = Callable[[str], bool]
Lister = Callable[[Store, Sequence[Entry], DataConfig], tuple[list[Part], list[str] | None]]


class Format(NamedTuple):
    """The functions of one format; `claims` says whether it reads an object of a name."""

    claims: Claims
    list_parts: Lister
    read_rows: Callable[[SourceFile, int, int], pa.Table]
    read_labels: Callable[[SourceFile], NDArray[np.int64] | None]


def _ends(*suffixes: str) -> Claims:
    return lambda key: key.lower().endswith(suffixes)


def _array_format(claims: Claims, opened: arrays.Opener, list_parts: Lister | None = None) -> Format:
    return Format(
        claims,
        list_parts or partial(arrays.list_parts, opened),
        partial(arrays.read_rows, opened),
        partial(arrays.read_labels, opened),
    )


FORMATS: dict[str, Format] = {
    "parquet": Format(_ends(".parquet"), parquet.list_parts, parquet.read_rows, parquet.read_labels),
    "folder": Format(folder.claims, folder.list_parts, folder.read_rows, lambda *_: None),
    "webdataset": Format(
        _ends(*webdataset.TAR_SUFFIXES), webdataset.list_parts, webdataset.read_rows, webdataset.read_labels
    ),
    "npz": _array_format(_ends(".npz", ".npy"), npz.opened, npz.list_parts),
    "cifar": _array_format(published.claims_batch, published.opened_batch),
    "published": _array_format(_ends(*published.SUFFIXES), published.opened),
}


@dataclass(frozen=True)
class Source:
    """A dataset and how it is read: with the settings `data`; labels are indices into `classes`, if known.

    A label file in `data` is about this dataset. Keys of `parts` are relative to `url`. Workers are told what to
    read, and get a source without its parts. `passed_over` is a sentence on the files that are not read, empty
    if there are none.
    """

    url: str
    format: str
    classes: Sequence[str] | None
    data: DataConfig
    parts: Sequence[Part] = ()
    passed_over: str = ""

    @property
    def images(self) -> int:
        """Number of images in all parts."""
        return sum(part.rows for part in self.parts)


def open_source(url: str, data_config: DataConfig) -> Source:
    """List the dataset at `url` without reading its images, except that CIFAR batches and labels in tars are read.

    `url` is a folder, one file, or a folder and a pattern of file names (`DIR/train-*.parquet`). Raises
    InputError if it cannot be read as one dataset, if its labels are doubtful and data.labels says nothing, and
    with data.strict if a file would be passed over.
    """
    refuse_output(url, data_config.output)
    store, entries, strangers, noted = _look(url)
    _refuse_bad_names(entries)
    data_config = labels.settings_for(Store(url).url, data_config)
    given = labels.given(data_config)
    own = [entry for entry in entries if entry.key not in strangers and not _is_given(store, entry, given)]
    visible = [entry for entry in own if _is_visible(entry.key)]
    name, claimed = _claimed(url, store, visible)
    read = {entry.key for entry in claimed}
    left = [entry.key for entry in entries if entry.key not in read and not _is_given(store, entry, given)]
    try:
        if name != "folder":
            _refuse_mixed_splits(url, claimed, data_config)
        parts, classes = _listed(url, name, store, claimed, data_config)
        left += [f"{part.key}/{hidden}" for part in parts for hidden in part.hidden]
    finally:
        # If the listing is refused too: a file with the labels may be among these.
        passed_over = _passed_over(name, left, read)
        if passed_over and data_config.strict:
            raise InputError(f"{url}: {passed_over}; take them out of the source, or leave out --strict")
        if passed_over:
            say_once(f"{url}: {passed_over}{_hint(store, left, data_config)}")
    parts = [part for part in parts if part.rows]
    if not parts:
        raise InputError(f"{url}: has no images in it; name a dataset with at least one")
    if noted is not None and noted != (found := sum(part.rows for part in parts)):
        raise InputError(
            f"{url}: its files hold {counted(found, 'image')}, and {noted} were written; make this dataset again, "
            f"or, if you changed its files yourself, set images to {found} in its {NOTE}"
        )
    if given is not None:
        parts, classes = labels.matched(given, store.url, name, parts)
        say_once(f"{url}: the labels are those of {given.where}")
    else:
        classes = _folder_classes(store, name, parts, classes, left, data_config)
    source = Source(store.url, name, classes, data_config, parts, passed_over)
    if given is None and classes is None and (likely := likely_labels(source)):
        say_once(f"{url}: read without labels; {likely!r} may hold them: --set data.label_column={likely}")
    return source


def likely_labels(source: Source) -> str | None:
    """Return the column, tar member or .json field that may hold the labels of a source that was read without any.

    Of the first part only, by its name; None if there is none.
    """
    look = {"parquet": parquet.likely_labels, "webdataset": webdataset.likely_labels}.get(source.format)
    if look is None or source.data.labels in ("none", "folder"):
        return None
    return look(SourceFile(Store(source.url), source.parts[0].key, source.data))


def _claimed(url: str, store: Store, visible: Sequence[Entry]) -> tuple[str, list[Entry]]:
    """Return the one format that reads files of a source, and these files."""
    found = {
        name: claimed
        for name, each in FORMATS.items()
        if (claimed := [entry for entry in visible if each.claims(entry.key)])
    }
    if not found:
        _refuse_no_file_name(url)
        if foreign := _foreign_name(visible) or _foreign_form(store, visible):
            raise InputError(f"{url}: {foreign}")
        what = f"files such as {visible[0].key} are no dataset" if visible else "there is no file here"
        raise InputError(
            f"{url}: {what}; expected Parquet (.parquet), images (.png, .jpg, ...), a WebDataset (.tar), "
            "NumPy files (.npz, .npy), CIFAR batches (data_batch_1, ...) or a published poison (.pt, .pth, .pkl); "
            "name the folder that holds the data"
        )
    if len(found) > 1:
        some = ", ".join(f"{len(claimed)} {name} ({claimed[0].key})" for name, claimed in found.items())
        raise InputError(
            f"{url}: holds more than one kind of data: {some}; name a folder with one kind, and a file with the "
            "labels of the others in data.labels"
        )
    ((name, claimed),) = found.items()
    return name, claimed


def _refuse_no_file_name(url: str) -> None:
    """Raise InputError if `url` is an address of a web server that does not end in the name of one file."""
    path = url.partition("://")[2].partition("/")[2]
    if not url.startswith(("http://", "https://")):
        return
    if "*" in path or "." not in posixpath.basename(path):
        raise InputError(f"{url}: names no file, and a web server cannot list a folder; name one file in it")
    if "?" in path:
        raise InputError(
            f"{url}: the ? hides what kind of file it is; cut off the ? and what follows it, or download the file"
        )


def _listed(
    url: str, name: str, store: Store, claimed: Sequence[Entry], data_config: DataConfig
) -> tuple[list[Part], list[str] | None]:
    """Return the parts and classes of files of one format; say what a file is that its reader refuses."""
    smallest = min(claimed, key=lambda entry: entry.size)
    if 0 < smallest.size < _POINTER_BYTES and (foreign := _foreign_form(store, [smallest], "pointer")):
        raise InputError(f"{url}: {foreign}")
    try:
        return FORMATS[name].list_parts(store, claimed, data_config)
    except FileNotFoundError as error:
        raise InputError(f"{url}: a file of it is missing or a link to a missing file: {error}") from error
    except InputError as error:
        if foreign := _foreign_form(store, claimed):
            raise InputError(f"{url}: {foreign}") from error
        raise


def _foreign_name(entries: Sequence[Entry]) -> str:
    """Return a sentence on the first file whose name is that of a form which is not read, "" if there is none."""
    for entry in entries:
        for suffix, what in _NAMES:
            if re.search(f"{suffix}$", entry.key, re.IGNORECASE):
                return f"{entry.key} is {what}"
    return ""


def _foreign_form(store: Store, entries: Sequence[Entry], kind: str = "") -> str:
    """Return a sentence on the first file whose content is not what its name says, "" if there is none."""
    for entry in entries[:_HEADS_READ]:
        try:
            head = store.read_range(entry.key, 0, min(entry.size, 512))
        except FileNotFoundError:  # A link to a missing file.
            continue
        for magic, what in _HEADS:
            plain = entry.key.lower().endswith((*_PLAIN.get(magic, ()), *_COMPRESSED))
            if head.startswith(magic) and kind in what and not plain:
                return f"{entry.key} is {what}"
        inner = head[:100].partition(b"\0")[0].decode("ascii", "replace")
        if head[257:262] == b"ustar" and inner.lower().endswith((".tar", ".zip", ".gz", ".tgz")):
            return (
                f"{entry.key} holds archives, such as {inner}, often one per class; unpack each into a folder of "
                "that name and name the folder above them"
            )
    return ""


def _local_folders(store: Store) -> set[str]:
    # An empty folder is in no listing, but it may be a class, which would shift those behind it.
    if not store.local or not os.path.isdir(store.path("")):
        return set()
    with os.scandir(store.path("")) as found:
        return {each.name for each in found if each.is_dir() and not is_hidden(each.name)}


def _is_given(store: Store, entry: Entry, given: labels.LabelFile | None) -> bool:
    return given is not None and f"{store.url}/{entry.key}" == given.where


def _folder_classes(
    store: Store,
    name: str,
    parts: Sequence[Part],
    classes: list[str] | None,
    left: Sequence[str],
    data_config: DataConfig,
) -> list[str] | None:
    """Return the classes of a set, those of its folders where these are the labels; refuse what is doubtful."""
    if data_config.labels == "none":
        return None
    if name != "folder":
        if data_config.labels == "folder" and _by_folder(name, parts[0].key, data_config):
            return folder.class_folders(store, [part.key for part in parts], data_config)
        partition = next((part.key for part in parts if folder.is_label(part.key, data_config)), None)
        if partition is not None:
            raise folder.question(store, f"the name of the folder of {partition} may be a label")
    elif classes is not None and data_config.labels is None and noted_classes(store) is None:
        known = {folder.top_folder(part.key) for part in parts}
        tops = {top for key in left if (top := folder.top_folder(key)) and not is_hidden(top)}
        empty = sorted((tops | _local_folders(store)) - known)
        if empty:
            raise folder.question(store, f"the folder {empty[0]}/ holds no image that is read, others are classes")
    return classes


def refuse_repeated_ids(source: Source) -> None:
    """Raise InputError, naming the files, if an id that the files of a source hold occurs twice.

    Images are not read. Eight bytes of memory per image. Ids of other formats are names of files or rows, and keys
    in tars, which the listing compares.
    """
    read = {"parquet": parquet.stored_ids, "npz": npz.stored_ids}.get(source.format)
    if read is None:
        return
    store, keys = Store(source.url), [part.key for part in source.parts]

    def hashed(key: str) -> NDArray[np.uint64]:
        return np.array([_hash(name) for name in read(store, key)], np.uint64)

    with ThreadPoolExecutor(_READING_THREADS) as pool:
        hashes = np.sort(np.concatenate(list(pool.map(hashed, keys))))
    twice = set(hashes[1:][np.diff(hashes) == 0].tolist())
    home: dict[str, str] = {}
    for key in keys if twice else ():
        for name in read(store, key):
            if _hash(name) in twice and name in home:
                where = " and ".join(dict.fromkeys((home[name], key)))
                raise InputError(
                    f"{store.url}: id {name!r} occurs twice, in {where}; make ids unique, or drop "
                    f"the {'column' if source.format == 'parquet' else 'array'} id: an image is then called by "
                    "its file and row"
                )
            home[name] = key


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def read_parts(source: Source, spans: Sequence[Span]) -> pa.Table:
    """Return the rows of `spans` (key, start, stop), in that order, as one canonical table.

    Raises InputError for an object that is missing, damaged or has other columns than the others.
    """
    store = Store(source.url)
    read = partial(_read_span, source, store, labels.given(source.data))
    if len(spans) == 1:
        tables = [read(spans[0])]
    else:
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            tables = list(pool.map(read, spans))
    if source.data.extra_columns == "drop":
        tables = [table.drop_columns(extra_columns(table).column_names) for table in tables]
    try:
        return with_classes(pa.concat_tables(tables, promote_options="default"), source.classes)
    except pa.ArrowException as error:
        raise InputError(
            f"{source.url}: the columns of {spans[0][0]} and {spans[-1][0]} differ: {error}; make them alike"
        ) from error


def read_labels(source: Source) -> NDArray[np.int64] | None:
    """Return the label of every row (N), -1 for none, or None if no row has one; images are not read.

    If a label file names the ids of rows, these rows are read as a whole.
    """
    store, parts, classes = Store(source.url), source.parts, source.classes
    given = labels.given(source.data)
    if source.data.labels == "none":
        return None
    if given is not None and (source.format == "folder" or given.names is None):
        keys = [part.key for part in parts] if source.format == "folder" else [parts[0].key] * parts[0].rows
        return labels.labels_of(given, source.url, source.format, keys, 0)
    if given is None and _by_folder(source.format, parts[0].key, source.data):
        return None if classes is None else _labels_of_folders(store, parts, classes)

    def read(part: Part) -> NDArray[np.int64] | None:
        if given is None:
            return FORMATS[source.format].read_labels(SourceFile(store, part.key, source.data, classes))
        table = _read_span(replace(source, classes=None), store, given, (part.key, 0, part.rows))
        return np.array(labels_or_none(table), np.int64)

    with ThreadPoolExecutor(_READING_THREADS) as pool:
        found = list(pool.map(read, parts))
    filled = [np.full(part.rows, -1) if each is None else each for part, each in zip(parts, found, strict=True)]
    return None if all(each is None for each in found) else np.concatenate(filled)


def _by_folder(format: str, key: str, data_config: DataConfig) -> bool:
    """Return whether the folders of parts are the labels; those inside of tars are left to their reader."""
    inside = format == "webdataset" and folder.top_folder(key) is None
    return format == "folder" or (data_config.labels == "folder" and not inside)


def _labels_of_folders(store: Store, parts: Sequence[Part], classes: Sequence[str]) -> NDArray[np.int64]:
    tops = [folder.top_folder(part.key) for part in parts]
    first = dict(zip(reversed(tops), (part.key for part in reversed(parts)), strict=True))
    label_of = {top: folder.folder_label(store, key, classes) for top, key in first.items()}
    return np.repeat([label_of[top] for top in tops], [part.rows for part in parts])


def read_tables(source: Source, max_images: int = 2048) -> Iterator[pa.Table]:
    """Yield all rows in order as canonical tables of at most `max_images` and about 64 MiB each."""
    for spans in chunk_spans(source.parts, max_images, 64 * 2**20):
        yield read_parts(source, spans)


def chunk_spans(parts: Sequence[Part], max_images: int, max_bytes: int) -> Iterator[list[Span]]:
    """Yield lists of spans that cover all rows in order, each of at most `max_images` and about `max_bytes`."""
    spans: list[Span] = []
    images, size = 0, 0.0
    for part in parts:
        row_size = max(1.0, part.size / part.rows)
        start = 0
        while start < part.rows:
            if images and (images >= max_images or size + row_size > max_bytes):
                yield spans
                spans, images, size = [], 0, 0.0
            fitting = max(1, min(max_images - images, int((max_bytes - size) / row_size)))
            stop = min(part.rows, start + fitting)
            spans.append((part.key, start, stop))
            images, size, start = images + stop - start, size + (stop - start) * row_size, stop
    if spans:
        yield spans


def _read_span(source: Source, store: Store, given: labels.LabelFile | None, span: Span) -> pa.Table:
    classes, data = source.classes, source.data
    key, start, stop = span
    by_folder = data.labels == "folder" and classes is not None and _by_folder(source.format, key, data)
    own = given is None and not by_folder and data.labels != "none"
    try:
        file = SourceFile(store, key, data, classes if own else None)
        table = FORMATS[source.format].read_rows(file, start, stop)
    except FileNotFoundError as error:
        raise InputError(
            f"{store.url}/{key}: is a link to a missing file, or was deleted after the source was listed; "
            "put the file back, or delete the link"
        ) from error
    if own:
        return table
    if "label" in table.column_names:
        table = table.drop_columns("label")
    if given is not None:
        found = labels.labels_of(given, store.url, source.format, table["id"].to_pylist(), start)
    elif by_folder:
        found = np.full(table.num_rows, folder.folder_label(store, key, classes or []))
    else:
        return table
    return table.add_column(2, "label", labels.label_column(found))


def refuse_output(url: str, output: str | None) -> None:
    """Raise InputError if `output`, a folder that a verb will write, lies inside the source at `url`.

    Or if it is named like a file: `convert SRC x.npz` would make a folder of that name.
    """
    ending = posixpath.splitext(Store(output).url)[1] if output else ""
    if any(each.claims(ending) for each in FORMATS.values()) or any(
        re.fullmatch(suffix, ending, re.IGNORECASE) for suffix, _ in _NAMES
    ):
        raise InputError(
            f"{output}: a folder is written, and {ending} is the ending of a file; name it without that"
        )
    # The next listing of the source would hold the output too. Of a purification only data/ is listed.
    source = Store(url)
    if output and Store(output).url.startswith(f"{source.url}/") and not source.exists(RUN_PLAN):
        raise InputError(f"{output}: the output lies inside the source {url}; name a folder outside it")


def _refuse_bad_names(entries: Iterable[Entry]) -> None:
    # Python stands for bytes that are not UTF-8 by surrogates, which can be written neither as text nor to Arrow.
    for entry in entries:
        try:
            entry.key.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{entry.key!a}: the name is not valid Unicode (UTF-8); rename the file") from error


def _passed_over(name: str, left: Sequence[str], read: set[str]) -> str:
    """Return a sentence on the files that no format reads, so that none is ignored without a word."""
    aids = {f"{key[:-4]}.idx" for key in read} if name == "webdataset" else set()
    aids |= set(published.META) if name == "cifar" else set()
    others = [key for key in left if key not in aids and key.rpartition("/")[2] not in aids]
    counts = Counter(posixpath.splitext(key)[1] or "without a suffix" for key in others)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5))
    files = "1 file is" if len(others) == 1 else f"{len(others):,} files are"
    return f"{files} passed over: {kinds}, such as {others[0]}" if others else ""


def _hint(store: Store, left: Sequence[str], data_config: DataConfig) -> str:
    tables = (key for key in left if key.lower().endswith(labels.TEXT_SUFFIXES) and not is_hidden(key))
    table = next(tables, None) if data_config.labels is None else None
    if table is None:
        return ""
    return f"; if it holds labels, read them with --set data.labels={store.url}/{table}"


class _Looked(NamedTuple):
    """Where a source lies, its files, the keys of those that a purification did not write, and how many images its
    note counts, None without a note or if only some of its files are named.
    """

    store: Store
    entries: list[Entry]
    strangers: set[str]
    images: int | None = None


def _look(url: str) -> _Looked:
    store = Store(url)
    if store.is_file():
        base, _, name = store.url.rpartition("/")
        if base.endswith(":/"):
            _refuse_no_file_name(url)
        parent = Store(base or "/")
        return _Looked(parent, [parent.entry(name)], set())
    if store.exists():
        return _look_in(url, store)
    base, _, pattern = store.url.rpartition("/")
    if set(pattern) & set("*?["):
        _refuse_no_file_name(url)
        parent = Store(base or "/")
        looked = _look_in(base, parent)
        inside = f"{parent.url}/".removeprefix(f"{looked.store.url}/")
        names = {entry.key.removeprefix(inside): entry for entry in looked.entries if entry.key.startswith(inside)}
        entries = [names[name] for name in names if fnmatch.fnmatchcase(name, pattern) and "/" not in name]
        if entries:
            all_match = len(entries) == len(looked.entries)
            return looked._replace(entries=entries, images=looked.images if all_match else None)
        raise InputError(f"{url}: no file matches this pattern; check it")
    raise InputError(f"{url}: there is nothing here{did_you_mean(url) or '; check the path or URL'}")


def _look_in(url: str, store: Store) -> _Looked:
    if store.exists(UNFINISHED):
        raise InputError(f"{url}: writing this dataset was interrupted; run its command again, or delete it")
    if store.exists(RUN_PLAN):
        # A purification may hold a report beside its data. Its pictures are not part of the dataset.
        entries = list(store.list("data", hidden=True))
        return _Looked(store, entries, _strangers(url, store, entries))
    listed = list(store.list(hidden=True))
    base, _, name = store.url.rpartition("/")
    if name == "data" and any(_OWN_NAME.fullmatch(entry.key) for entry in listed):
        # What its files should be lies beside the folder data/ that this package writes.
        parent = Store(base or "/")
        if any(parent.exists(key) for key in (RUN_PLAN, NOTE, UNFINISHED)):
            return _look_in(base, parent)
    note = read_note(store) if any(entry.key == NOTE for entry in listed) else {}
    return _Looked(store, _foreign(listed), set(), note.get("images"))


def _strangers(url: str, store: Store, entries: Sequence[Entry]) -> set[str]:
    """Return the keys in data/ that the manifest of a purification does not name.

    Raises InputError if the purification is not finished, or a file that it names is missing or has another size.
    """
    try:
        data = store.read(RUN_MANIFEST)
    except FileNotFoundError as error:
        raise InputError(f"{url}: this purification is not finished; run its command again") from error
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["object", "bytes"])
        written = zip(table["object"].to_pylist(), table["bytes"].to_pylist(), strict=True)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{url}: {RUN_MANIFEST} is damaged; run this purification again to mend it") from error
    found = {entry.key: entry.size for entry in entries}
    for key, size in written:
        # A shard whose images have all failed has no file.
        if key is not None and (there := found.pop(key, None)) != size:
            what = "is missing" if there is None else f"has {there:,} bytes, and {size:,} were written"
            raise InputError(f"{url}: {key} {what}; `eclipse-ray verify {url}` says how to make it again")
    return set(found)


def _foreign(entries: Iterable[Entry]) -> list[Entry]:
    # This package's own files are no part of a dataset.
    return [entry for entry in entries if not entry.key.startswith("_eclipse/")]


def _is_visible(key: str) -> bool:
    # Other names with _ are private to a tool.
    return not (folder.is_dotted(key) if folder.claims(key) else is_hidden(key))


def _refuse_mixed_splits(url: str, entries: Sequence[Entry], data_config: DataConfig) -> None:
    # If both splits were read as one dataset, training would silently include the test set. Classes are no splits.
    classes = int(data_config.labels == "folder")
    names = {entry.key: entry.key.split("/")[classes:] or [entry.key] for entry in entries}
    splits: dict[str, str] = {}
    for key, parts in names.items():
        split = next((word for part in parts if (word := folder.split_of(part))), None)
        if split is not None:
            splits.setdefault(split, key)
    tops = {parts[0]: key for key, parts in reversed(names.items())}
    if len(splits) < 2 and folder.are_splits(tops):
        splits = dict(sorted(tops.items())[:10])
    if len(splits) > 1:
        some = ", ".join(f"{name} ({key})" for name, key in splits.items())
        first = next(iter(splits.values()))
        raise InputError(
            f"{url}: holds more than one split: {some}; name one of them by a file, folder or pattern, "
            f"for example '{url.rstrip('/')}/{_pattern(first)}'"
            f"{folder.ARE_CLASSES if '/' in first and len(tops) > 1 and not classes else ''}"
        )


def _pattern(key: str) -> str:
    top, separator, _ = key.partition("/")
    if separator and folder.SPLIT_NAME.search(top):
        return top
    # Only numbers behind the word may vary, so that imagenet1k-train-0.tar does not become imagenet*.tar.
    base = key.rfind("/") + 1
    match = folder.SPLIT_NAME.search(key[base:])
    fixed = base + match.end() if match else base
    return key[:fixed] + re.sub(r"\d.*?(?=\.[a-z]+$|$)", "*", key[fixed:])
