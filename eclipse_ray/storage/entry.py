"""What a listing yields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored object: key relative to the store, size in bytes, version (ETag, or mtime_ns on disk)."""

    key: str
    size: int
    version: str


def is_hidden(relative: str) -> bool:
    """Return whether any part of a path starts with `_` or `.`: the business of whoever wrote it."""
    return any(part.startswith(("_", ".")) for part in relative.split("/"))


def join(*parts: str) -> str:
    """Return the parts that are not empty with slashes between them; an absolute one starts nothing anew."""
    return "/".join(part for part in parts if part)
