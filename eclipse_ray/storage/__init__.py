"""Storage on a disk, on S3 or on any fsspec filesystem; this module holds the types and functions they share."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Bytes at the end of an object that are read at once and kept, so that a Parquet footer takes one request.
_TAIL_BYTES = 64 * 2**10


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


class ObjectFile(io.RawIOBase):
    """Random access to the bytes of an object by requests for parts of it, each of which is retried on its own.

    `read_part(entry, start, stop)` returns exactly these bytes. The tail is kept, because Parquet readers read it
    several times.
    """

    def __init__(self, read_part: Callable[[Entry, int, int], bytes], entry: Entry) -> None:
        super().__init__()
        self._read_part = read_part
        self._entry = entry
        self._position = 0
        self._tail: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._entry.size)
        if start >= stop:
            return 0
        buffer[: stop - start] = self._read(start, stop)
        self._position = stop
        return stop - start

    def readall(self) -> bytes:
        """Return the rest in one request; the base class would send one for each 8 KiB."""
        start, self._position = self._position, max(self._position, self._entry.size)
        return self._read(start, self._entry.size) if start < self._entry.size else b""

    def _read(self, start: int, stop: int) -> bytes:
        tail_start = max(0, self._entry.size - _TAIL_BYTES)
        if start < tail_start:
            return self._read_part(self._entry, start, stop)
        if self._tail is None:
            self._tail = self._read_part(self._entry, tail_start, self._entry.size)
        return self._tail[start - tail_start : stop - tail_start]
