"""Storage on a disk, on S3 or on any fsspec filesystem; this module holds the types and functions they share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object: its key relative to the store, its size in bytes, its version.

    The version is the ETag on S3 and mtime_ns on a disk.
    """

    key: str
    size: int
    version: str


def is_hidden(relative: str) -> bool:
    """Return whether any part of a path starts with `_` or `.`; such names are private to their writer."""
    return any(part.startswith(("_", ".")) for part in relative.split("/"))


def join(*parts: str) -> str:
    """Return the non-empty parts with slashes between them. An absolute part is not special."""
    return "/".join(part for part in parts if part)
