"""WebDataset tars, in which the members with the same key form one sample. Each tar is one part.

Rows are counted from the headers of the tar or from an index beside it (NAME.idx, in the format of NVIDIA DALI's
wds2idx). A range of rows is then one range of bytes, and only these bytes are read.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import folder, tar
from eclipse_ray.datasets.images import SUFFIXES, suffix_of
from eclipse_ray.datasets.table import (
    CANONICAL,
    ESCAPED_KEYS,
    FILE_BYTES,
    FILE_IMAGES,
    Part,
    SourceFile,
    all_labels,
    canonical_table,
    check_label,
    extra_columns,
    image_bytes,
    label_like,
    label_text,
    noted_classes,
    read_note,
    regroup,
    whole_number,
)
from eclipse_ray.datasets.tar import Member, Read
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

# Compressed tars count, in order to be refused.
TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4"),
    *(".tgz", ".tbz", ".tbz2", ".txz"),
)
_DEFAULT_IMAGE_COLUMN = DataConfig.model_fields["image_column"].default
_DEFAULT_LABEL_COLUMN = DataConfig.model_fields["label_column"].default
# Tars whose headers are read at the same time.
_LISTING_THREADS = 16
# Bytes that are read at once from a remote tar: a few small members with headers, and little of an image.
_BLOCK_BYTES = 16 * 1024
# Largest .cls member and .json member in bytes.
_LONGEST_LABEL, _LONGEST_JSON = 64, 16 * 2**20

# Extensions of members that may hold a pickle and are refused.
PICKLED = frozenset({"pkl", "pickle", "pt", "pth", "npy", "npz", "pyd", "ten", "joblib"})
_TEXT = frozenset(
    {"txt", "text", "json", "jsonl", "csv", "tsv", "xml", "html", "md", "yaml", "yml", "caption", "cls", "url"}
)
# Besides, a folder that only macOS makes would be hidden.
_ESCAPED = re.compile(r"[%.\\\x00-\x20\x7f]|^/|(?<=/)/|/\Z|(?<![^/])_(?=_MACOSX/)")

Sample = dict[str, Member]
# Of one tar: keys, the offsets of each sample and of the end of the last one, and all extensions.
_Index = tuple[list[str], list[int], list[str]]


class _Look(NamedTuple):
    """What planning sees of one tar: its keys, the labels that are text, and the member of one that is a number.

    `examples` holds a key of a sample with (True) and without (False) a label, or of which it is unknown (None).
    `folders` are those in which its images lie, each with the key of a sample. `hidden` members are not read.
    """

    keys: list[str]
    examples: dict[bool | None, str]
    texts: set[str]
    number: str | None
    folders: dict[str, str]
    hidden: list[str]


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part per tar and the class names; reads headers and labels, or indexes, but no image.

    The class names are those in the note, else those that labels name, sorted.

    Raises InputError for compressed or damaged tars, for keys that are not unique, for folders of several splits,
    and if only some samples are labelled.
    """
    for entry in entries:
        if not entry.key.lower().endswith(".tar"):
            raise InputError(
                f"{store.url}/{entry.key}: is compressed, so its rows cannot be reached; make it a plain .tar"
            )
    classes = noted_classes(store, config.label_column)
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        looks = list(
            pool.map(lambda entry: _look(SourceFile(store, entry.key, config, classes), entry.size), entries)
        )
    inside = [key for look in looks for key in look.folders.values()]
    by_folder = config.labels == "folder" and not any(folder.top_folder(entry.key) for entry in entries)
    if not by_folder:
        folder.refuse_splits(store, folder.below_shared(inside))
    examples: dict[bool | None, str] = {}
    for look in reversed(looks):
        examples |= look.examples
    if config.labels is None and {True, False} <= examples.keys():
        raise InputError(
            f"{store.url}: sample {examples[True]!r} has a label and {examples[False]!r} has none; label both or "
            "neither"
        )
    if classes is None:
        texts = set[str]().union(*(look.texts for look in looks))
        number = next((look.number for look in looks if look.number), None)
        classes = folder.classes_of_texts(store.url, texts, number)
        by_folder = by_folder or (config.labels is None and examples.keys() == {False})
    named = config.label_column != _DEFAULT_LABEL_COLUMN and config.labels is None
    if named and examples.keys() <= {False}:
        raise InputError(
            f"{store.url}: no sample has a member {config.label_column!r}, and no .json member has such a field; "
            "name one that is there with --set data.label_column=NAME"
        )
    if by_folder:
        _refuse_numbered(store, entries, looks, config)
        classes = folder.classes_in_tars(store, inside, config)
        folder.refuse_doubtful(store, config, {entry.key: classes is not None for entry in entries})
    if config.tar_ids == "key":
        _refuse_repeated_keys(store, entries, looks)
    parts = [
        Part(entry.key, len(look.keys), entry.size, entry.version, tuple(look.hidden))
        for entry, look in zip(entries, looks, strict=True)
    ]
    return parts, classes


def _refuse_numbered(store: Store, entries: Sequence[Entry], looks: Sequence[_Look], config: DataConfig) -> None:
    # 00000.tar with 00000/1.jpg: the number may be that of a part, as img2dataset writes them, and not of a class.
    names = [entry.key.rpartition("/")[2][: -len(".tar")] for entry in entries]
    tops = [{folder.top_folder(key) for key in look.folders.values()} for look in looks]
    if config.labels is None and all(
        name.isdecimal() and top == {name} for name, top in zip(names, tops, strict=True)
    ):
        raise folder.question(
            store, f"the images of {entries[0].key} lie in a folder of its number, as all others do"
        )


def read_rows(source: SourceFile, start: int, stop: int) -> pa.Table:
    """Return samples `start` to `stop` of one tar as a canonical table; a sample without an image has b"".

    Raises InputError for a tar that is damaged or changed since it was listed.
    """
    where, store, key, column = source.where, source.store, source.key, source.config.image_column
    entry = store.entry(key)
    keys, begins, extensions = _index(store.url, key, entry.size, entry.version, column)
    if stop > len(keys):
        raise InputError(f"{where}: has no {stop} samples; it changed since it was listed, start again from there")
    begin, end = begins[start], begins[stop]
    with _reader(store, key) as read:
        data = read(begin, end)

    def cut(first: int, last: int) -> bytes:
        return data[first - begin : last - begin]

    samples = list(group_members(where, tar.members(where, cut, begin, end), column))
    if [name for name, _ in samples] != keys[start:stop] or len(data) != end - begin:
        raise InputError(
            f"{where}: rows {start} to {stop} are not the ones its index or listing names; "
            "delete the .idx beside it if there is one, and start again"
        )
    return _table(source, samples, extensions, cut)


def read_labels(source: SourceFile) -> NDArray[np.int64] | None:
    """Return the labels of one tar, -1 for none, or None if no sample has one; images are not read."""
    with _reader(source.store, source.key) as read:
        found, _ = _listed(source.store, source.key, source.store.entry(source.key).size, read)
        labels = _labels(source, group_members(source.where, found, source.config.image_column), read)
    return None if labels is None else np.array([-1 if label is None else label for label in labels], np.int64)


def likely_labels(source: SourceFile) -> str | None:
    """Return what may hold the label of the first sample by its name, None if nothing may, or if it has a label.

    It is a member or a field of the .json member.
    """
    store, key, config, _ = source
    with _reader(store, key) as read:
        found, _ = _listed(store, key, store.entry(key).size, read)
        _, sample = next(group_members(source.where, found, config.image_column))
        if _stored_label(source, sample, read) is not None:
            return None
        fields = _fields(source.where, sample["json"], read) if "json" in sample else {}
    return label_like([*sample, *(name for name, value in fields.items() if isinstance(value, str | int | float))])


@contextmanager
def _reader(store: Store, key: str) -> Iterator[Read]:
    if store.local:
        with store.open(key) as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            yield read
    else:
        yield _block_reader(store, key)


def _block_reader(store: Store, key: str) -> Read:
    # A file object of fsspec would read megabytes ahead, and so every image.
    held, place = b"", 0

    def read(start: int, stop: int) -> bytes:
        nonlocal held, place
        if not place <= start <= stop <= place + len(held):
            place, end = start, max(stop, start + _BLOCK_BYTES)
            held = store.read_range(key, start, end)
        return held[start - place : stop - place]

    return read


def _look(source: SourceFile, size: int) -> _Look:
    where, config = source.where, source.config
    keys: list[str] = []
    examples: dict[bool | None, str] = {}
    texts: set[str] = set()
    folders: dict[str, str] = {}
    hidden: list[str] = []
    number = None
    with _reader(source.store, source.key) as read:
        found, indexed = _listed(source.store, source.key, size, read)
        for key, sample in group_members(where, found, config.image_column, hidden):
            keys.append(key)
            if _image_of(sample, config) is not None:
                folders.setdefault(posixpath.dirname(key), key)
                _refuse_two_classes(where, sample, config)
                if indexed:
                    examples[_is_labelled(sample, config)] = key
                    continue
                label = _planned_label(source, sample, read)
                examples[label is not None] = key
                if isinstance(label, str):
                    texts.add(label)
                elif label is not None and label >= 0:
                    number = sample[_class_member(sample, config) or "json"].name
    if keys and not examples:
        kinds = config.image_column if is_image(config.image_column) else ", ".join(SUFFIXES)
        raise InputError(f"{where}: none of its {len(keys)} samples has an image ({kinds}); leave this tar out")
    return _Look(keys, examples, texts, number, folders, hidden)


def _is_labelled(sample: Sample, config: DataConfig) -> bool | None:
    # With an index, planning opens no member, so a label in a .json is known only to the worker that reads it.
    known = _class_member(sample, config) is not None
    return None if "json" in sample and not known else known


def _planned_label(source: SourceFile, sample: Sample, read: Read) -> str | int | None:
    """Return the label of one sample, text as it is stored unless the note names the classes."""
    label = _stored_label(source, sample, read) if source.classes is None else None
    return label if isinstance(label, str) else _label(source, sample, read, noted=True)


def _refuse_repeated_keys(store: Store, entries: Sequence[Entry], looks: Sequence[_Look]) -> None:
    home: dict[str, str] = {}
    for entry, look in zip(entries, looks, strict=True):
        for key in look.keys:
            if home.setdefault(key, entry.key) != entry.key:
                raise InputError(
                    f"{store.url}: {home[key]} and {entry.key} both have a sample {key!r}; ids must be unique, "
                    "so take the tar's name along with --set data.tar_ids=path"
                )


@lru_cache(maxsize=8)
def _index(url: str, key: str, size: int, version: str, image_column: str) -> _Index:
    # Size and version are part of the cache key, so that a changed tar is scanned again.
    store, where = Store(url), f"{url}/{key}"
    keys: list[str] = []
    begins: list[int] = []
    extensions: dict[str, None] = {}
    end = 0
    with _reader(store, key) as read:
        for name, sample in group_members(where, _listed(store, key, size, read)[0], image_column):
            keys.append(name)
            begins.append(min(member.begin for member in sample.values()))
            extensions |= dict.fromkeys(sample)
            end = max(member.end for member in sample.values())
    return keys, [*begins, end], sorted(extensions)


def _listed(store: Store, key: str, size: int, read: Read) -> tuple[Iterable[Member], bool]:
    """Return the members of a tar in their order, and whether the index beside it names them."""
    indexed = _indexed(store, key, size, read)
    if indexed is not None:
        return indexed, True
    return tar.members(f"{store.url}/{key}", read, 0, size, whole=True), False


def _indexed(store: Store, key: str, size: int, read: Read) -> list[Member] | None:
    """Return the members that the index beside a tar lists, or None if there is no index.

    Raises InputError for an index that does not fit the tar.
    """
    name = re.sub(r"\.tar$", ".idx", key, flags=re.IGNORECASE)
    try:
        version, *lines = store.read(name).decode().split("\n")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        version, lines = "", []
    where = f"{store.url}/{key}"
    misfit = InputError(f"{store.url}/{name}: does not describe {key}; delete it or write it anew")
    if version.startswith("v1.1 "):
        return None  # This version lists no members.
    words = [word for line in lines if line for word in line.split(" ")]
    if not version.startswith("v1.2 ") or len(words) % 4:
        raise misfit
    found: list[Member] = []
    place = 0
    for offset, length, path in zip(words[1::4], words[2::4], words[3::4], strict=True):
        if not (offset.isdigit() and length.isdigit() and place < int(offset) <= size):
            raise misfit
        member = Member(path.removeprefix("./"), place, int(offset), int(length))
        found += [*_left_out(where, read, place, member, size, misfit), member]
        place = member.end
    return [*found, *_left_out(where, read, place, None, size, misfit)]


def _left_out(
    where: str, read: Read, place: int, listed: Member | None, size: int, misfit: InputError
) -> Iterator[Member]:
    """Yield the hidden files from `place` on that an index leaves out, before the member `listed` or the end."""
    # One block is the header of the member. Further blocks may hold others.
    while listed.offset - place > tar.BLOCK if listed else not tar.is_end(where, read, place, size):
        member = tar.next_member(where, read, place, size)
        if listed and member[2:] == listed[2:]:
            return
        is_folder, place = member.name.endswith("/"), member.end
        over = listed is not None and place + tar.BLOCK > listed.offset
        if over or not (is_folder or folder.is_dotted(member.name)):
            raise misfit
        if not is_folder:
            yield member


def _table(
    source: SourceFile, samples: Sequence[tuple[str, Sample]], extensions: Sequence[str], read: Read
) -> pa.Table:
    config, names = source.config, [name for name, _ in samples]
    if read_note(source.store).get(ESCAPED_KEYS) is True:
        names = [unescape_key(name) for name in names]
    if config.tar_ids == "path":
        names = [f"{source.key}/{name}" for name in names]
    images = [_image_of(each, config) for _, each in samples]
    taken = {_class_member(each, config) for _, each in samples}
    taken |= {name for name in extensions if _may_be_image(name, config.image_column)}
    extras = {
        name: pa.array(
            [_content(source.where, each.get(name), read) for _, each in samples],
            pa.string() if is_text(name) else pa.binary(),
        )
        for name in extensions
        if name not in taken
    }
    return canonical_table(
        names,
        [b"" if image is None else read(image.offset, image.offset + image.size) for image in images],
        _labels(source, samples, read),
        pa.table(extras) if extras else None,
        source.classes,
        [None if image is None else image.name for image in images],
    )


def _content(where: str, member: Member | None, read: Read) -> bytes | str | None:
    if member is None:
        return None
    data = read(member.offset, member.offset + member.size)
    return _text(where, member, data) if is_text(member.name.rpartition(".")[2].lower()) else data


def _text(where: str, member: Member, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: member {member.name} is not UTF-8 text: {error}; mend it") from None


def _labels(source: SourceFile, samples: Iterable[tuple[str, Sample]], read: Read) -> list[int | None] | None:
    """Return the labels of samples, None if no one has one: those of members, else the classes of folders."""
    config = source.config
    noted = noted_classes(source.store, config.label_column) is not None
    by_folder = source.classes if config.labels == "folder" or (config.labels is None and not noted) else None
    labels: list[int | None] = []
    for name, sample in samples:
        label = _label(source, sample, read, noted)
        if label is None and by_folder is not None and _image_of(sample, config) is not None:
            label = folder.folder_label(source.store, name, by_folder)
        labels.append(label)
    return None if all(label is None for label in labels) else labels


def _label(source: SourceFile, sample: Sample, read: Read, noted: bool) -> int | None:
    """Return the label of one sample; a name becomes its index in the classes.

    If classes are `noted` or unknown, whole numbers that are text are such indices too. Otherwise they are names.
    """
    value, classes = _stored_label(source, sample, read), source.classes
    if value is None:
        return None
    where = f"{source.where}: member {sample[_class_member(sample, source.config) or 'json'].name}"
    number = whole_number(value) if isinstance(value, str) else value
    if classes is not None and number != -1 and (number is None or not noted):
        number = classes.index(value) if isinstance(value, str) and value in classes else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise InputError(
            f"{where} holds the label {value!r}, expected an integer or one of the classes; mend "
            "it, name another .json field with --set data.label_column=NAME, or delete the index if there is one"
        )
    check_label(where, number, classes)
    return number


def _stored_label(source: SourceFile, sample: Sample, read: Read) -> object:
    """Return the label of one sample as it is stored, in its class member or a field of its .json member.

    Floats that are whole numbers become integers. None if there is none, or data.labels says what the labels are.
    """
    where, config = source.where, source.config
    name = _class_member(sample, config)
    if config.labels is not None or (name is None and "json" not in sample):
        return None
    member = sample[name or "json"]
    fields = {} if name else _fields(where, member, read)
    value = _short(where, member, read, _LONGEST_LABEL) if name else fields.get(config.label_column)
    if isinstance(value, str):
        return label_text(f"{where}: member {member.name}", value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fields(where: str, member: Member, read: Read) -> dict[str, object]:
    try:
        tree = json.loads(_short(where, member, read, _LONGEST_JSON))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: member {member.name} is not readable JSON: {error}; mend it") from None
    return tree if isinstance(tree, dict) else {}


def _class_members(sample: Sample, config: DataConfig) -> list[str]:
    """Return the extensions that may hold the class: the one that data.label_column names, else .cls.

    Without .cls the last part of a compound extension counts (label.cls), as for images.
    """
    if config.label_column != _DEFAULT_LABEL_COLUMN:
        return [config.label_column] if config.label_column in sample else []
    return ["cls"] if "cls" in sample else [name for name in sample if name.endswith(".cls")]


def _class_member(sample: Sample, config: DataConfig) -> str | None:
    # Planning refuses several unless data.labels says what the labels are.
    found = _class_members(sample, config)
    return found[0] if len(found) == 1 else None


def _short(where: str, member: Member, read: Read, limit: int) -> str:
    if member.size > limit:
        raise InputError(
            f"{where}: member {member.name} has {member.size} bytes, more than a label may ({limit}); mend it"
        )
    # Some editors put a byte order mark before the text.
    return _text(where, member, read(member.offset, member.offset + member.size)).removeprefix("\ufeff")


def write(store: Store, tables: Iterable[pa.Table], classes: Sequence[str] | None, config: DataConfig) -> int:
    """Write canonical `tables` as part-00000.tar and so on, each with an index; return the number of images.

    Keys are ids with dots and similar characters escaped, which the note of the dataset records. Raises InputError
    for repeated ids, missing labels, and columns that are neither text nor bytes.
    """
    seen: set[str] = set()
    for number, table in enumerate(regroup(tables, FILE_IMAGES, FILE_BYTES)):
        _check_columns(store, table)
        archive, index = io.BytesIO(), [f"v1.2 {table.num_rows}"]
        for name, own in zip(table["id"].to_pylist(), _members(store, table), strict=True):
            if name in seen:
                raise InputError(f"{store.url}: id {name} occurs more than once; give every image its own id")
            seen.add(name)
            words: list[str] = []
            for extension, data in own.items():
                member = f"{escape_key(name)}.{extension}"
                archive.write(tar.header_block(member, len(data)))
                words += [extension, str(archive.tell()), str(len(data)), member]
                archive.write(data + tar.padding(len(data)))
            index.append(" ".join(words))
        archive.write(bytes(1024))
        store.write(f"part-{number:05d}.tar", archive.getvalue())
        store.write(f"part-{number:05d}.idx", ("\n".join(index) + "\n").encode())
    return len(seen)


def _members(store: Store, table: pa.Table) -> Iterator[dict[str, bytes]]:
    labels = all_labels(store.url, table)
    extras = extra_columns(table).to_pydict()
    for row, data in enumerate(image_bytes(table)):
        members = {(suffix_of(data) or ".png").removeprefix("."): data}
        if labels is not None:
            members["cls"] = str(labels[row]).encode()
        for name, values in extras.items():
            value = values[row]
            if value is not None:
                members[name] = value.encode() if isinstance(value, str) else value
        yield members


def _check_columns(store: Store, table: pa.Table) -> None:
    for field in extra_columns(table).schema:
        name, kind = field.name, field.type
        fits = not is_image(name) and kind == (pa.string() if is_text(name) else pa.binary())
        words = name.split(".")
        plain = name == name.lower() and all(words) and not set(name) & set(" /\\\n\t\r\0")
        if not fits or not plain or not PICKLED.isdisjoint(words) or name == "cls":
            raise InputError(
                f"{store.url}: column {name!r} ({kind}) cannot be a member of a WebDataset tar, which holds text "
                "under names such as txt and json, and bytes; use the parquet layout, or leave such columns out "
                "with --set data.extra_columns=drop"
            )


def group_members(
    where: str,
    found: Iterable[Member],
    image_column: str = _DEFAULT_IMAGE_COLUMN,
    hidden: list[str] | None = None,
) -> Iterator[tuple[str, Sample]]:
    """Yield (key, members by extension) per sample. Raises InputError if members of a sample are apart.

    A sample has one image; if it has several, `image_column` must be the extension of one. The names of hidden
    members are added to `hidden`.
    """
    last: dict[str, str] = {}
    current: str | None = None
    sample: Sample = {}
    for member in found:
        if folder.is_dotted(member.name):
            if hidden is not None:
                hidden.append(member.name)
            continue
        key, extension = _split_name(where, member.name)
        if key != current:
            if current is not None:
                yield current, sample
            if key in last:
                raise InputError(
                    f"{where}: sample {key!r} lies in two places, {last[key]} and {member.name}; "
                    "write the members of a sample one after another"
                )
            current, sample = key, {}
        _refuse_second(where, sample, extension, member, image_column)
        sample[extension] = member
        last[key] = member.name
    if current is not None:
        yield current, sample


def _split_name(where: str, name: str) -> tuple[str, str]:
    above, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    if not extension:
        raise InputError(f"{where}: member {name!r} has no extension, so it belongs to no sample; leave it out")
    if not PICKLED.isdisjoint(extension.split(".")):
        raise InputError(
            f"{where}: member {name!r} may hold a pickle, which can run code when it is opened; "
            "leave it out or store it as text"
        )
    if extension in CANONICAL:
        raise InputError(f"{where}: member {name!r} would be a column {extension!r}, which is taken; rename it")
    return above + slash + stem, extension


def _refuse_second(where: str, sample: Sample, extension: str, member: Member, image_column: str) -> None:
    same, hint = sample.get(extension), ""
    if same is None and _may_be_image(extension, image_column):
        same = next((other for name, other in sample.items() if _may_be_image(name, image_column)), None)
        hint = f", or say which is the image, for example --set data.image_column={extension}"
    if same is not None:
        raise InputError(
            f"{where}: {same.name} and {member.name} belong to one sample, as a key ends at the first dot; "
            f"rename one of them or leave it out{hint}"
        )


def _may_be_image(extension: str, image_column: str) -> bool:
    # Other names are those of a column of another set of the same command.
    return extension == image_column if is_image(image_column) else is_image(extension)


def _image_of(sample: Sample, config: DataConfig) -> Member | None:
    return next((sample[name] for name in sample if _may_be_image(name, config.image_column)), None)


def _refuse_two_classes(where: str, sample: Sample, config: DataConfig) -> None:
    if len(found := _class_members(sample, config)) > 1 and not config.labels:
        first, second = (sample[name].name for name in found[:2])
        raise InputError(
            f"{where}: {first} and {second} may both be the class of one sample; say which, for example "
            f"--set data.label_column={found[0]}, or data.labels=none"
        )


def is_image(extension: str) -> bool:
    """Return whether a member with this extension is the image of the sample."""
    return f".{extension}".endswith(SUFFIXES)


def is_text(extension: str) -> bool:
    """Return whether a member with this extension is text; other members are bytes."""
    return extension.rpartition(".")[2] in _TEXT


def escape_key(name: str) -> str:
    """Return `name` as the key of a sample; `unescape_key` reverses it."""
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", name) or "%"


def unescape_key(key: str) -> str:
    """Return the name from which `escape_key` made `key`."""
    return "" if key == "%" else re.sub("%([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), key)
