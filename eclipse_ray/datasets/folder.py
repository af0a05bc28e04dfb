"""Image files in one folder per class, or in one folder without labels. Each image is one part."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache

import pyarrow as pa

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.images import SUFFIXES, suffix_of
from eclipse_ray.datasets.table import (
    LABEL_NAMES,
    LABELLED,
    Part,
    SourceFile,
    all_labels,
    canonical_table,
    image_bytes,
    noted_classes,
    read_note,
    whole_number,
)
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Entry, Store

# Names of folders that hold a part of a dataset rather than a class, if there are several folders.
_CONTAINERS = {"images", "image", "img", "imgs", "jpegimages", "data", "all", "masks", "annotations", "labels"}
# What a person says whose classes are called like splits.
ARE_CLASSES = "; if these folders are classes, say so with --set data.labels=folder"
# The split that each word in the name of a folder or file stands for.
SPLITS = {
    **dict.fromkeys(("train", "training", "data_batch"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORDS = "|".join(SPLITS)
# To Hugging Face any NAME-00000-of-00001 is of the split NAME. Else such a word counts, between separators.
SPLIT_NAME = re.compile(
    rf"^(\w+(?:\.\w+)*)(?=-\d{{5}}-of-\d{{5}})|(?:^|[-_.=])({_WORDS})(?:set|data)?(?=[-_.\d]|$)", re.IGNORECASE
)
# These name splits only beside others.
_LABELLED = re.compile(r"^(?:un)?labell?ed(?=\.\w+$|$)", re.IGNORECASE)
# A word between spaces or before a capital, as in "train images" and trainA. Names of classes may look like that.
_LOOSE_NAME = re.compile(rf"(.*[-_. ])?((?i:{_WORDS}))((?:(?:[-_. ]|(?<=[a-z])[A-Z]).*)?)")


def claims(key: str) -> bool:
    """Return whether this format reads an object of this name."""
    return key.lower().endswith(SUFFIXES)


def is_dotted(key: str) -> bool:
    """Return whether a file, of a folder or in a tar, is hidden, or lies in a folder that is."""
    # Cameras name images _MG_0001.JPG and people name classes _other. Only macOS makes __MACOSX.
    return any(name == "__MACOSX" or (name != "." and name.startswith(".")) for name in key.split("/"))


def list_parts(store: Store, entries: Sequence[Entry], config: DataConfig) -> tuple[list[Part], list[str] | None]:
    """Return one part per image, and the names of the classes if the folders are classes.

    Raises InputError for folders that may or may not be classes, unless data.labels says so.
    """
    parts = [Part(entry.key, 1, entry.size, entry.version) for entry in entries]
    return parts, class_folders(store, [part.key for part in parts], config)


def read_rows(source: SourceFile, start: int, stop: int) -> pa.Table:
    """Return one image as one canonical row; its label is the index of its top folder in the classes."""
    store, key, _, classes = source
    labels = None if classes is None else [folder_label(store, key, classes)]
    table = canonical_table([key], [store.read(key)], labels, None, classes, [key])
    return table.slice(start, stop - start)


def folder_label(store: Store, key: str, classes: Sequence[str]) -> int:
    """Return the index in `classes` of the first folder of `key` that is one. Raises InputError if none is.

    It is the top folder, except in tars whose images share a folder.
    """
    places = _places(tuple(classes))
    names = [places.get(name) or places.get(_partition(name)[1], set()) for name in key.split("/")[:-1]]
    found = next(filter(None, names), set[int]())
    if len(found) != 1:
        raise InputError(
            f"{store.url}/{key}: its folder is {'not' if not found else 'more than'} one of the classes "
            f"{', '.join(classes[:20])}; rename that folder"
        )
    return min(found)


@lru_cache(maxsize=8)
def _places(classes: tuple[str, ...]) -> dict[str, set[int]]:
    # Folders written by this package are named by folder_name, other folders like their class.
    places: dict[str, set[int]] = {}
    for place, name in enumerate(classes):
        for folder in (name, folder_name(name)):
            places.setdefault(folder, set()).add(place)
    return places


# ---- Whether folders are classes


def top_folder(key: str) -> str | None:
    """Return the first folder of a key, None if it lies in none; keys of S3 may have folders without a name."""
    return next((name for name in key.split("/")[:-1] if name), None)


def class_folders(store: Store, keys: Sequence[str], config: DataConfig) -> list[str] | None:
    """Return the classes that the top folders of `keys` stand for, in the order of labels; None for no labels.

    Raises InputError, a question that data.labels answers, if the folders may mean something else.
    """
    tops = {top for key in keys if (top := top_folder(key))}
    beside = [key for key in keys if top_folder(key) is None]
    words = {word for top in tops if (word := split_of(top))}
    note, noted = read_note(store), noted_classes(store)
    # Without the note, classes that are not in sorted order would get other labels.
    known = bool(noted and tops and not beside and tops <= {folder_name(name) for name in noted})
    splits = all(top.lower() in SPLITS for top in tops) or are_splits(tops)
    if tops and splits and not known and config.labels != "folder":
        raise InputError(
            f"{store.url}: holds the split{'s' * (len(tops) > 1)} {', '.join(sorted(tops))}, not classes; "
            f"name one of them, for example {store.url}/{max(tops)}{ARE_CLASSES}"
        )
    if config.labels == "none" or config.label_file or note.get(LABELLED) is False:
        return None
    if known:
        return noted
    if tops and beside:
        raise question(store, f"images lie in class folders ({min(tops)}/) and beside them ({beside[0]})")
    if config.labels == "folder":
        if not tops:
            raise InputError(f"{store.url}: its images lie in no folder, so data.labels cannot be folder")
        return _classes(tops)
    if tops and not note and (doubt := _doubt(store, keys, tops, words, config)):
        raise question(store, doubt)
    # One folder is no set of classes. It is more likely named images or data than after its only class.
    return _classes(tops) if len(tops) > 1 or any(is_label(key, config) for key in keys) else None


def _classes(tops: Iterable[str]) -> list[str]:
    return _ordered([_partition(top)[1] for top in tops])


def classes_of_texts(url: str, texts: set[str], number: str | None) -> list[str] | None:
    """Return the classes that the different labels of a set name, None if they are whole numbers, also as text.

    `number` is a file or row whose labels are stored as numbers, None if there is none. Raises InputError if there
    are names beside it.
    """
    numbers = {text: whole_number(text) for text in texts}
    names = [text for text in texts if numbers[text] is None]
    if names and number is not None:
        raise InputError(
            f"{url}: the labels of {number} are numbers, others are names, such as {min(names)}; write all alike"
        )
    return _ordered([text for text in texts if numbers[text] != -1]) if names else None


def _ordered(names: Collection[str]) -> list[str]:
    # Numbers decide if all else is equal.
    numbers = numbers_in(names)
    return sorted(names) if numbers is None else [name for _, name in sorted(zip(numbers, names, strict=True))]


def numbers_in(names: Collection[str]) -> list[list[int]] | None:
    """Return the numbers in each of some names that are alike without them, None for other names."""
    if len({re.sub("[0-9]+", "0", name) for name in names}) > 1:
        return None
    return [[int(number) for number in re.findall("[0-9]+", name)] for name in names]


def split_of(name: str) -> str | None:
    """Return the split that a name of a file or folder contains, such as val2017 or imagenet-train-0.tar."""
    match = SPLIT_NAME.search(name)
    if match is None or _partition(name)[0].lower() in LABEL_NAMES:
        return None
    word: str = match[1] or match[2]
    return SPLITS.get(word.lower(), word)


def are_splits(names: Collection[str]) -> bool:
    """Return whether all these folders or files are named after splits, and after more than one."""
    words = {split_of(name) or next(iter(_LABELLED.findall(name)), None) for name in names}
    if len(words) > 1 and None not in words:
        return True
    # What remains without the word must be the same for each split: "bullet train" and "test tube" are classes.
    rests: dict[str, set[tuple[str | None, str]]] = defaultdict(set)
    for name in names:
        if (match := _LOOSE_NAME.fullmatch(name)) is None:
            return False
        rests[SPLITS[match[2].lower()]].add((match[1], match[3]))
    return len(rests) > 1 and len({frozenset(rest) for rest in rests.values()}) == 1


def below_shared(keys: Iterable[str]) -> list[str]:
    """Return keys of samples in tars without the folders that all of them share, except for the last one."""
    paths = [[name for name in key.split("/") if name not in ("", ".")] for key in keys]
    while any(len(path) > 2 for path in paths) and all(path[0] == paths[0][0] and path[1:] for path in paths):
        paths = [path[1:] for path in paths]
    return ["/".join(path) for path in paths]


def refuse_splits(store: Store, keys: Iterable[str]) -> None:
    """Raise InputError if the top folders in which the images of tars lie are those of several splits."""
    tops = {top_folder(key) or "" for key in keys}
    exact = {word for top in tops if (word := SPLITS.get(top.lower()))}
    if (len(exact) > 1 or are_splits(tops)) and not read_note(store):
        raise InputError(
            f"{store.url}: the images in its tars lie in folders of more than one split: "
            f"{', '.join(sorted(tops)[:10])}; make tars of one split each and name those, or unpack them and name "
            f"one of the folders{ARE_CLASSES}"
        )


def classes_in_tars(store: Store, keys: Sequence[str], config: DataConfig) -> list[str] | None:
    """Return the classes that the top folders of samples in tars stand for, None if there are no two of them."""
    below = below_shared(keys)
    tops = {top_folder(key) for key in below}
    classes = class_folders(store, below, config) if len(tops) > 1 or config.labels == "folder" else None
    if classes and len({folder_label(store, key, classes) for key in keys}) < len(tops):
        raise InputError(
            f"{store.url}: all images in its tars lie in a folder that is named like one of the classes "
            f"{', '.join(classes[:20])} in it; write the tars anew without that folder, or read them "
            "without labels: --set data.labels=none"
        )
    return classes


def is_label(key: str, config: DataConfig) -> bool:
    """Return whether a folder of a key names a label as a partition does: label=3/part.parquet."""
    columns = (_partition(name)[0].lower() for name in key.split("/")[:-1])
    return any(column in (*LABEL_NAMES, config.label_column.lower()) for column in columns)


def question(store: Store, found: str) -> InputError:
    """Return an error that asks what the labels of a set are."""
    return InputError(
        f"{store.url}: {found}; say what the labels are: --set data.labels=folder (one class per top folder), "
        "none, or a file with the labels"
    )


def refuse_doubtful(store: Store, config: DataConfig, labelled: Mapping[str, bool]) -> None:
    """Raise InputError if some files of a set, by their keys, have labels and others have none.

    It is a question if none has any, and the folders in which they lie may be the labels.
    """
    yes, no = (next((key for key, has in labelled.items() if has is wanted), None) for wanted in (True, False))
    if config.labels is not None or no is None:
        return
    if yes is not None:
        raise InputError(
            f"{store.url}: {yes} has labels and {no} has none; name only files of one kind, or say what the "
            "labels are: --set data.labels=none, or a file with the labels"
        )
    tops = sorted({top for key in labelled if (top := top_folder(key))})
    if len(tops) > 1:
        some = ", ".join(f"{top}/" for top in tops[:10])
        raise question(
            store, f"its files hold no {config.label_column!r}, and the folders {some} may be the labels"
        )


def _partition(top: str) -> tuple[str, str]:
    # label=3 is how Hive, Spark and Ray name the folders of a partition.
    column, equals, value = top.partition("=")
    return (column, value) if equals and column.isidentifier() and value else ("", top)


def _doubt(store: Store, keys: Sequence[str], tops: set[str], words: set[str], config: DataConfig) -> str | None:
    """Return why the folders `tops`, in which all images lie, may be no classes; None if they are."""
    listed = ", ".join(f"{top}/" for top in sorted(tops)[:10])
    partitions = any(_partition(top)[0] for top in tops)
    plain = sorted(int(name) for top in tops if re.fullmatch("[0-9]{1,18}", name := _partition(top)[1]))
    below: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        top, inner, *_ = [*(name for name in key.split("/")[:-1] if name), "", ""]
        below[top].add(inner)
    nested = max((sorted(names) for names in below.values() if "" not in names), key=len, default=[])
    inside = ", ".join(nested[:10])
    if len(tops) == 1:
        if len(nested) < 2:
            return None
        return (
            f"all images lie below {listed}, in {len(nested)} folders ({inside}); if these are the classes, name "
            f"{store.url}/{min(tops)} instead; otherwise"
        )
    if len(words) > 1 or any(SPLITS.get(top.lower(), "train") != "train" for top in tops):
        return f"some of the folders {listed} are named after splits; name one of them; otherwise"
    if partitions and not all(is_label(f"{top}/", config) for top in tops):
        return f"the folders {listed} are partitions of something else than labels"
    if any(top.lower() in _CONTAINERS for top in tops):
        return f"the folders {listed} may be parts of a dataset and not classes"
    if all("" not in names for names in below.values()) and len(nested) > 1:
        return f"no image lies in {listed} but all in folders below, such as {inside}"
    if len({unicodedata.normalize("NFC", top).casefold() for top in tops}) < len(tops):
        return f"some of the folders {listed} have names that differ only in their case"
    if len(plain) == len(tops) and plain[-1] - plain[0] >= len(plain):
        return f"the folders {listed} are numbered with gaps, so label {len(plain) - 1} may not mean {plain[-1]}"
    return None


def write(store: Store, tables: Iterable[pa.Table], *, classes: Sequence[str] | None = None) -> int:
    """Write the unchanged bytes of each image into one folder per class, or one folder if there are no labels.

    Returns the number of images. Raises InputError if only some rows have labels, and for two ids that give the
    same file name.
    """
    images = 0
    for table in tables:
        known = all_labels(store.url, table, least=0)
        labels: Sequence[int | None] = [None] * table.num_rows if known is None else known
        for name, data, label in zip(table["id"].to_pylist(), image_bytes(table), labels, strict=True):
            if not store.create(_file_key(name, data, label, classes), data):
                raise InputError(f"{store.url}: two images would be named like {name}; use the parquet layout")
            images += 1
    return images


def folder_name(text: str) -> str:
    """Return `text` as one file or folder name that is not hidden; different texts give different names."""
    escaped = "".join(f"%{ord(c):02X}" if c in "/\\%" or ord(c) < 32 else c for c in text)
    if escaped.startswith((".", "_")) or not escaped:
        return f"%{ord(escaped[0]):02X}{escaped[1:]}" if escaped else "%"
    return escaped


def _file_key(name: str, data: bytes, label: int | None, classes: Sequence[str] | None) -> str:
    suffix = suffix_of(data)
    named = name.lower().endswith(suffix or SUFFIXES) or (suffix == ".jpg" and name.lower().endswith(".jpeg"))
    file = name if named else name + (suffix or ".png")
    if label is None:
        return "/".join(map(folder_name, file.split("/")))
    known = classes is not None and 0 <= label < len(classes)
    raw = classes[label] if classes is not None and known else f"{label:05d}"
    top = folder_name(raw)
    # An id that came from a class folder already begins with the class name, escaped or not.
    first, slash, rest = file.partition("/")
    return f"{top}/{folder_name(rest if slash and first in (raw, top) else file)}"
