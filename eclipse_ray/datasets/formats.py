"""Opening a dataset of any format: its parts and classes are listed first, and workers read rows of it later."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pyarrow as pa

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import cifar, folder, npz, parquet, published, webdataset
from eclipse_ray.datasets.table import Part, Span, extra_columns, with_classes
from eclipse_ray.errors import InputError, did_you_mean
from eclipse_ray.log import say
from eclipse_ray.storage import is_hidden
from eclipse_ray.storage.store import Entry, Store

# Exists while a dataset is being written; readers refuse the dataset.
UNFINISHED = "_eclipse/unfinished"
# A purification writes its plan first and its manifest last. Only then data/ holds each image exactly once.
RUN_PLAN, RUN_MANIFEST = "_eclipse/plan.parquet", "_eclipse/manifest.parquet"
# Threads that read the spans of one table.
_READING_THREADS = 8
# A word in a file or folder name that names a split, between separators.
_SPLIT_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(folder.SPLITS)}|data_batch)(?=[-_.\d]|$)", re.IGNORECASE)


class Format(NamedTuple):
    """The functions of one format."""

    claims: Callable[[str], bool]
    list_parts: Callable[[Store, Sequence[Entry], DataConfig], tuple[list[Part], list[str] | None]]
    read_rows: Callable[[Store, str, int, int, DataConfig, Sequence[str] | None], pa.Table]


FORMATS: dict[str, Format] = {
    "parquet": Format(parquet.claims, parquet.list_parts, parquet.read_rows),
    "folder": Format(folder.claims, folder.list_parts, folder.read_rows),
    "webdataset": Format(webdataset.claims, webdataset.list_parts, webdataset.read_rows),
    "npz": Format(npz.claims, npz.list_parts, npz.read_rows),
    "cifar": Format(cifar.claims, cifar.list_parts, cifar.read_rows),
    "published": Format(published.claims, published.list_parts, published.read_rows),
}


@dataclass(frozen=True)
class Source:
    """A listed dataset; keys of `parts` are relative to `url`, and labels are indices into `classes`, if known."""

    url: str
    format: str
    parts: list[Part]
    classes: list[str] | None

    @property
    def images(self) -> int:
        """Number of images in all parts."""
        return sum(part.rows for part in self.parts)


def open_source(url: str, data_config: DataConfig) -> Source:
    """List the dataset at `url` without reading its images, except that CIFAR batches and labels in tars are read.

    `url` is a folder, one file, or a folder and a pattern of file names (`DIR/train-*.parquet`). Raises
    InputError if it cannot be read as one dataset.
    """
    _refuse_output_inside(url, data_config.output)
    store, entries = _look(url)
    _refuse_bad_names(entries)
    found = {
        name: claimed
        for name, each in FORMATS.items()
        if (claimed := [entry for entry in entries if each.claims(entry.key)])
    }
    if not found:
        raise InputError(
            f"{url}: found {len(entries)} files, none of them Parquet (.parquet), an image (.png, .jpg, ...), a "
            "WebDataset (.tar), a NumPy file (.npz, .npy), a CIFAR batch (data_batch_1, ...) or a "
            "published poison (.pt, .pth, .pkl); name the folder that holds the data"
        )
    if len(found) > 1:
        some = ", ".join(f"{len(claimed)} {name} ({claimed[0].key})" for name, claimed in found.items())
        raise InputError(f"{url}: holds more than one kind of data: {some}; name a folder with one kind")
    ((name, claimed),) = found.items()
    _say_passed_over(url, name, entries, claimed)
    if name != "folder":
        _refuse_mixed_splits(url, claimed)
    try:
        parts, classes = FORMATS[name].list_parts(store, claimed, data_config)
    except FileNotFoundError as error:
        raise InputError(f"{url}: a file of it is missing or a link to a missing file: {error}") from error
    if not parts:
        raise InputError(f"{url}: has no images in it; name a dataset with at least one")
    return Source(store.url, name, parts, classes)


def read_parts(
    url: str, format: str, classes: Sequence[str] | None, spans: Sequence[Span], data_config: DataConfig
) -> pa.Table:
    """Return the rows of `spans` (key, start, stop), in that order, as one canonical table.

    `url`, `format` and `classes` are those of the Source, so that the source need not be listed again. Raises
    InputError for an object that is missing, damaged or has other columns than the others.
    """
    store = Store(url)
    read = partial(_read_span, store, FORMATS[format], classes, data_config)
    if len(spans) == 1:
        tables = [read(spans[0])]
    else:
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            tables = list(pool.map(read, spans))
    if data_config.extra_columns == "drop":
        tables = [table.drop_columns(extra_columns(table).column_names) for table in tables]
    try:
        return with_classes(pa.concat_tables(tables, promote_options="default"), classes)
    except pa.ArrowException as error:
        raise InputError(
            f"{url}: the columns of {spans[0][0]} and {spans[-1][0]} differ: {error}; make them alike"
        ) from error


def read_tables(
    source: Source, data_config: DataConfig, max_images: int = 2048, max_bytes: int = 64 * 2**20
) -> Iterator[pa.Table]:
    """Yield all rows in order as canonical tables of at most `max_images` and about `max_bytes` each."""
    for spans in chunk_spans(source.parts, max_images, max_bytes):
        yield read_parts(source.url, source.format, source.classes, spans, data_config)


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


def _read_span(
    store: Store, format: Format, classes: Sequence[str] | None, data_config: DataConfig, span: Span
) -> pa.Table:
    try:
        return format.read_rows(store, *span, data_config, classes)
    except FileNotFoundError as error:
        raise InputError(
            f"{store.url}/{span[0]}: is a link to a missing file, or was deleted after the source was listed; "
            "put the file back, or delete the link"
        ) from error


def _refuse_output_inside(url: str, output: str | None) -> None:
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


def _say_passed_over(url: str, name: str, entries: Sequence[Entry], claimed: Sequence[Entry]) -> None:
    """State how many files no format reads, so that a table of labels is not ignored without a word."""
    read = {entry.key for entry in claimed}
    left = [e.key for e in entries if e.key not in read and not (name == "webdataset" and e.key.endswith(".idx"))]
    if left:
        counts = Counter(posixpath.splitext(key)[1] or "without a suffix" for key in left)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5))
        say(f"{url}: {len(left)} files are passed over: {kinds}, such as {left[0]}", passed_over=len(left))


def _look(url: str) -> tuple[Store, list[Entry]]:
    store = Store(url)
    if store.is_file():
        base, _, name = store.url.rpartition("/")
        parent = Store(base or "/")
        return parent, [parent.entry(name)]
    if store.exists():
        if store.exists(UNFINISHED):
            raise InputError(f"{url}: writing this dataset was interrupted; delete it and write it again")
        if store.exists(RUN_PLAN) and not store.exists(RUN_MANIFEST):
            raise InputError(f"{url}: this purification is not finished; run its command again to finish it")
        # A purification may hold a report beside its data. Its pictures are not part of the dataset.
        return store, _visible(store.list("data" if store.exists(RUN_PLAN) else "", hidden=True))
    base, _, pattern = store.url.rpartition("/")
    if set(pattern) & set("*?["):
        parent = Store(base or "/")
        listed = _visible(parent.list(hidden=True))
        entries = [e for e in listed if fnmatch.fnmatchcase(e.key, pattern) and "/" not in e.key]
        if entries:
            return parent, entries
        raise InputError(f"{url}: no file matches this pattern; check it")
    raise InputError(f"{url}: there is nothing here{did_you_mean(url) or '; check the path or URL'}")


def _visible(entries: Iterable[Entry]) -> list[Entry]:
    # Cameras name images _MG_0001.JPG and people name classes _other. Other names with _ are private to a tool.
    return [
        entry
        for entry in entries
        if not is_hidden(entry.key)
        or (folder.claims(entry.key) and not any(n[:1] == "." or n == "_eclipse" for n in entry.key.split("/")))
    ]


def _refuse_mixed_splits(url: str, entries: Sequence[Entry]) -> None:
    # If both splits were read as one dataset, training would silently include the test set.
    splits: dict[str, str] = {}
    for entry in entries:
        found = (_SPLIT_NAME.search(part) for part in entry.key.split("/"))
        word = next((match[1].lower() for match in found if match), None)
        if word is not None:
            splits.setdefault(folder.SPLITS.get(word, "train"), entry.key)
    if len(splits) > 1:
        some = ", ".join(f"{name} ({key})" for name, key in splits.items())
        first = next(iter(splits.values()))
        raise InputError(
            f"{url}: holds more than one split: {some}; name one of them by a file, folder or pattern, "
            f"for example '{url.rstrip('/')}/{_pattern(first)}'"
        )


def _pattern(key: str) -> str:
    top, separator, _ = key.partition("/")
    if separator and _SPLIT_NAME.search(top):
        return top
    # Only numbers behind the word may vary, so that imagenet1k-train-0.tar does not become imagenet*.tar.
    base = key.rfind("/") + 1
    match = _SPLIT_NAME.search(key[base:])
    fixed = base + match.end() if match else base
    return key[:fixed] + re.sub(r"\d.*?(?=\.[a-z]+$|$)", "*", key[fixed:])
