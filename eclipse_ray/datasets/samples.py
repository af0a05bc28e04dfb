"""What the members of a WebDataset tar mean: which belong together, what each is, and how ids become keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from eclipse_ray.datasets.images import SUFFIXES
from eclipse_ray.datasets.table import CANONICAL
from eclipse_ray.datasets.tar import Member
from eclipse_ray.errors import InputError

PICKLED = frozenset({"pkl", "pickle", "pt", "pth", "npy", "npz", "pyd", "ten", "joblib"})
_TEXT = frozenset(
    {"txt", "text", "json", "jsonl", "csv", "tsv", "xml", "html", "md", "yaml", "yml", "caption", "cls", "url"}
)
_ESCAPED = re.compile(r"[%.\\\x00-\x20\x7f]|^/|(?<=/)/|/\Z")

Sample = dict[str, Member]


def group_members(where: str, found: Iterable[Member]) -> Iterator[tuple[str, Sample]]:
    """Yield (key, members by extension) of samples that lie in one piece. Raises InputError for all others."""
    last: dict[str, str] = {}
    current: str | None = None
    sample: Sample = {}
    for member in found:
        split = _split_name(where, member.name)
        if split is None:
            continue
        key, extension = split
        if key != current:
            if current is not None:
                yield current, sample
            if key in last:
                raise InputError(
                    f"{where}: sample {key!r} lies in two places, {last[key]} and {member.name}; "
                    "write the members of a sample one after another"
                )
            current, sample = key, {}
        _refuse_second(where, sample, extension, member)
        sample[extension] = member
        last[key] = member.name
    if current is not None:
        yield current, sample


def _split_name(where: str, name: str) -> tuple[str, str] | None:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    if not stem:
        return None  # Hidden files, such as macOS adds to archives.
    if not extension:
        raise InputError(f"{where}: member {name!r} has no extension, so it belongs to no sample; leave it out")
    if not PICKLED.isdisjoint(extension.split(".")):
        raise InputError(
            f"{where}: member {name!r} may hold a pickle, which can run code when it is opened; "
            "leave it out or store it as text"
        )
    if extension in CANONICAL:
        raise InputError(f"{where}: member {name!r} would be a column {extension!r}, which is taken; rename it")
    return folder + slash + stem, extension


def _refuse_second(where: str, sample: Sample, extension: str, member: Member) -> None:
    same = sample.get(extension)
    if same is None and is_image(extension):
        same = next((other for name, other in sample.items() if is_image(name)), None)
    if same is not None:
        raise InputError(
            f"{where}: {same.name} and {member.name} belong to one sample, as a key ends at the first dot; "
            "rename one of them or leave it out"
        )


def is_image(extension: str) -> bool:
    """Return whether a member of this extension is the sample's image."""
    return f".{extension}".endswith(SUFFIXES)


def is_text(extension: str) -> bool:
    """Return whether a member of this extension is text rather than bytes."""
    return extension.rpartition(".")[2] in _TEXT


def escape_key(name: str) -> str:
    """Return `name` as the key of a sample; different names have different keys, and `unescape_key` undoes it."""
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", name) or "%"


def unescape_key(key: str) -> str:
    """Return the name that `escape_key` made into `key`."""
    return "" if key == "%" else re.sub("%([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), key)
