"""A folder on any filesystem, with the one operation that commits rest on: put-if-absent. The only fsspec."""

from __future__ import annotations

import os
import posixpath
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from eclipse_ray.errors import InputError, StorageError

_MEMORY_LOCK = threading.Lock()
_TRIES = 5


@dataclass(frozen=True)
class Entry:
    """A stored object: key relative to the store, size in bytes, version (ETag, or mtime_ns on disk)."""

    key: str
    size: int
    version: str


class Store:
    """One folder or one file at a path or fsspec URL; keys are relative, with forward slashes."""

    def __init__(self, url: str) -> None:
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url}: cannot open this kind of location: {error}") from error
        self.local = isinstance(self.fs, LocalFileSystem)
        self.root = os.path.abspath(root) if self.local else root.rstrip("/")
        self.url = self.root if self.local else url.rstrip("/")

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        # A store crosses process borders as its URL: connections and locks are made anew there.
        return Store, (self.url,)

    @property
    def in_this_process_only(self) -> bool:
        """Whether other processes cannot see what is stored here (memory://)."""
        return isinstance(self.fs, MemoryFileSystem)

    def path(self, key: str) -> str:
        """Return the filesystem's own path of `key`."""
        return posixpath.join(self.root, key) if key else self.root

    def exists(self, key: str = "") -> bool:
        """Return whether an object or folder `key` is there now."""
        return bool(self.fs.exists(self.path(key)))

    def is_file(self) -> bool:
        """Return whether the store's own URL is a single file."""
        return bool(self.fs.isfile(self.root))

    def read(self, key: str = "") -> bytes:
        """Return the whole object. Raises FileNotFoundError if it is not there."""
        return cast(bytes, self.fs.cat_file(self.path(key)))

    def open(self, key: str = "") -> BinaryIO:
        """Open an object for random access. Raises FileNotFoundError if it is not there."""
        return cast(BinaryIO, self.fs.open(self.path(key), "rb"))

    def entry(self, key: str) -> Entry:
        """Return size and version of one object. Raises FileNotFoundError if it is not there."""
        info = self.fs.info(self.path(key))
        return Entry(key, int(info["size"]), _version(info))

    def list(self, prefix: str = "", hidden: bool = False) -> Iterator[Entry]:
        """Yield every object below the folder `prefix`, sorted by key; nothing if there is no such folder.

        Names that start with `_` or `.` are the business of whoever wrote them and are passed over, below
        `prefix` only, unless `hidden`. Raises OSError for a local folder that cannot be read.
        """
        self.fs.invalidate_cache()
        base = self.path(prefix)
        for path, info in sorted(self._find(base).items()):
            relative = path[len(base) :].lstrip("/")
            if hidden or not any(part.startswith(("_", ".")) for part in relative.split("/")):
                yield Entry(posixpath.join(prefix, relative), int(str(info["size"])), _version(info))

    def write(self, key: str, data: bytes) -> None:
        """Store an object whole, replacing any other; a reader never sees half of it."""
        if self.local:
            self._place(key, data, os.replace)
        else:
            self.fs.pipe_file(self.path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Store an object unless `key` is taken; return whether this call stored it (put-if-absent)."""
        if self.local:
            try:
                self._place(key, data, os.link)
            except FileExistsError:
                return False
            return True
        if isinstance(self.fs, MemoryFileSystem):
            with _MEMORY_LOCK:
                if self.exists(key):
                    return False
                self.fs.pipe_file(self.path(key), data)
                return True
        try:
            self.fs.pipe_file(self.path(key), data, mode="create")
        except FileExistsError:
            return False
        return True

    def delete(self, key: str) -> None:
        """Remove an object; one that is already gone is no error."""
        try:
            self.fs.rm_file(self.path(key))
        except FileNotFoundError:
            return

    def probe(self) -> None:
        """Prove that put-if-absent works here. Raises StorageError, as without it two runs could mix."""
        key = f"_eclipse/probe-{uuid.uuid4().hex}"
        try:
            first, second = self.create(key, b"1"), self.create(key, b"2")
            content = self.read(key)
            self.delete(key)
        except (OSError, NotImplementedError) as error:
            raise StorageError(f"{self.url}: cannot write here: {error}; choose another output") from error
        if not first or second or content != b"1":
            raise StorageError(
                f"{self.url}: this store cannot create an object only if it is absent, so commits are not "
                "safe here; choose a local folder or a store with conditional writes as output"
            )

    def _find(self, base: str) -> dict[str, dict[str, object]]:
        if not self.fs.isdir(base):
            return {}
        if not self.local:
            return cast(dict[str, dict[str, object]], self.fs.find(base, detail=True))
        # fsspec lists a local folder that it may not read as empty, which would lose images without a word.
        found: dict[str, dict[str, object]] = {}
        for folder, folders, files in os.walk(base, onerror=_raise_unless_gone, followlinks=True):
            here = os.path.join(os.path.realpath(folder), "")
            folders[:] = [name for name in folders if not here.startswith(os.path.realpath(here + name) + os.sep)]
            for name in files:
                path = os.path.join(folder, name)
                try:
                    info = os.stat(path)
                except FileNotFoundError:
                    continue
                found[path] = {"size": info.st_size, "mtime_ns": info.st_mtime_ns}
        return found

    def _place(self, key: str, data: bytes, move: Callable[[str, str], None]) -> None:
        # Another run that has just finished may sweep away our temporary, taking it for a leftover.
        for _ in range(_TRIES):
            temporary = self._write_temporary(key, data)
            try:
                move(temporary, self.path(key))
            except FileNotFoundError:
                continue
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
            _sync_folder(os.path.dirname(self.path(key)))
            return
        raise StorageError(f"{self.path(key)}: temporary files vanish while they are written; try again")

    def _write_temporary(self, key: str, data: bytes) -> str:
        folder = os.path.dirname(self.path(key))
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        return temporary


def _sync_folder(folder: str) -> None:
    # A new name survives a power cut only once its folder is on disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _version(info: dict[str, object]) -> str:
    if "ETag" in info:
        return str(info["ETag"]).strip('"')
    if "mtime_ns" in info:
        return str(info["mtime_ns"])
    if "mtime" in info:
        return str(os.stat(str(info["name"])).st_mtime_ns)
    created = info.get("created", "")
    # Some filesystems give a date for one object and seconds in a listing.
    return str(created.timestamp() if isinstance(created, datetime) else created)
