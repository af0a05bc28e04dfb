"""A folder on any filesystem, with the one operation that commits rest on: put-if-absent. The only fsspec."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, Protocol, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.storage.entry import Entry, is_hidden, join
from eclipse_ray.storage.local import LocalFolder
from eclipse_ray.storage.retries import ShortReadError, retried
from eclipse_ray.storage.s3 import DELETE, LIST, READ, WRITE, S3Folder

__all__ = ["Entry", "Store"]

_MEMORY_LOCK = threading.Lock()
_CONNECTIONS = 32


class Backend(Protocol):
    """What a kind of store must do; keys are relative to its root."""

    def exists(self, key: str) -> bool: ...
    def is_file(self) -> bool: ...
    def read(self, key: str) -> bytes: ...
    def read_range(self, key: str, start: int, stop: int) -> bytes: ...
    def open(self, key: str) -> BinaryIO: ...
    def entry(self, key: str) -> Entry: ...
    def walk(self, prefix: str, hidden: bool) -> Iterator[Entry]: ...
    def write(self, key: str, data: bytes) -> None: ...
    def create(self, key: str, data: bytes) -> bool: ...
    def delete(self, key: str) -> None: ...
    def abort_uploads(self, prefix: str) -> int: ...


class Store:
    """One folder or one file at a path or fsspec URL; keys are relative, with forward slashes.

    `single_writer` writes without put-if-absent, for stores that have none: two drivers on one output may then
    both believe that they committed a shard. Every method raises StorageError when a store refuses or stays away.
    """

    def __init__(self, url: str, single_writer: bool = False) -> None:
        try:
            self.fs, root = _open(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url}: cannot open this kind of location: {error}") from error
        self.local = isinstance(self.fs, LocalFileSystem)
        self.root = os.path.abspath(root) if self.local else root.rstrip("/")
        self.url = self.root if self.local else url.rstrip("/")
        self.single_writer = single_writer
        self.backend = _backend(self.fs, self.root)

    def __reduce__(self) -> tuple[type[Store], tuple[str, bool]]:
        # A store crosses process borders as its URL: connections and locks are made anew there.
        return Store, (self.url, self.single_writer)

    @property
    def in_this_process_only(self) -> bool:
        """Whether other processes cannot see what is stored here (memory://)."""
        return isinstance(self.fs, MemoryFileSystem)

    def path(self, key: str) -> str:
        """Return the filesystem's own path of `key`."""
        return f"{self.root.rstrip('/')}/{key}" if key else self.root

    def exists(self, key: str = "") -> bool:
        """Return whether an object or folder `key` is there now."""
        return self.backend.exists(key)

    def is_file(self) -> bool:
        """Return whether the store's own URL is a single file."""
        return self.backend.is_file()

    def read(self, key: str = "") -> bytes:
        """Return the whole object, never less. Raises FileNotFoundError if it is not there."""
        return self.backend.read(key)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`, or to the end. Raises FileNotFoundError if it is not there."""
        return self.backend.read_range(key, start, stop)

    def open(self, key: str = "") -> BinaryIO:
        """Open an object for random access. Raises FileNotFoundError if it is not there."""
        return self.backend.open(key)

    def entry(self, key: str) -> Entry:
        """Return size and version of one object. Raises FileNotFoundError if it is not there."""
        return self.backend.entry(key)

    def list(self, prefix: str = "", hidden: bool = False) -> Iterator[Entry]:
        """Yield every object below the folder `prefix`, sorted by key; nothing if there is no such folder.

        Names that start with `_` or `.` are the business of whoever wrote them and are passed over, below
        `prefix` only, unless `hidden`. Memory holds a page of 1,000 keys on Amazon S3, the names of one folder
        on a disk, every entry on other stores, since those list in an order of their own. Raises OSError for
        a local folder that cannot be read.
        """
        return self.backend.walk(prefix, hidden)

    def write(self, key: str, data: bytes) -> None:
        """Store an object whole, replacing any other; a reader never sees half of it."""
        self.backend.write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Store an object unless `key` is taken; return whether this call stored it (put-if-absent)."""
        if not self.single_writer:
            return self.backend.create(key, data)
        if self.backend.exists(key):
            return False
        self.backend.write(key, data)
        return True

    def delete(self, key: str) -> None:
        """Remove an object; one that is already gone is no error."""
        self.backend.delete(key)

    def abort_uploads(self, prefix: str = "") -> int:
        """Abort all unfinished uploads below `prefix`, also those of a live run, which then begins them anew.

        Returns how many there were: invisible leftovers that cost storage; always 0 where there is no such thing.
        """
        return self.backend.abort_uploads(prefix)

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
                "safe here; choose a local folder or a store with conditional writes as output, or "
                "--single-writer if nobody else writes to it"
            )


class AnyFolder:
    """A folder of any fsspec filesystem, memory:// among them."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root

    def path(self, key: str) -> str:
        """Return the filesystem's own path of `key`."""
        return f"{self.root}/{key}" if key else self.root

    def exists(self, key: str) -> bool:
        """Return whether an object or folder is there."""
        return retried(READ, self.path(key), lambda: bool(self.fs.exists(self.path(key))))

    def is_file(self) -> bool:
        """Return whether the root is a file."""
        return retried(READ, self.root, lambda: bool(self.fs.isfile(self.root)))

    def read(self, key: str) -> bytes:
        """Return the whole object. Raises FileNotFoundError if it is not there."""

        def call() -> bytes:
            data = cast(bytes, self.fs.cat_file(self.path(key)))
            size = self.fs.info(self.path(key)).get("size")
            if size is not None and len(data) != size:
                raise ShortReadError(f"{len(data)} bytes came, {size} were expected")
            return data

        return retried(READ, self.path(key), call)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`, or to the end. Raises FileNotFoundError if it is not there."""
        path = self.path(key)
        return retried(READ, path, lambda: cast(bytes, self.fs.cat_file(path, start=start, end=stop)))

    def open(self, key: str) -> BinaryIO:
        """Open an object. Raises FileNotFoundError if it is not there."""
        return retried(READ, self.path(key), lambda: cast(BinaryIO, self.fs.open(self.path(key), "rb")))

    def entry(self, key: str) -> Entry:
        """Return size and version. Raises FileNotFoundError if it is not there."""
        info = retried(READ, self.path(key), lambda: self.fs.info(self.path(key)))
        return Entry(key, int(info["size"]), _version(info))

    def walk(self, prefix: str, hidden: bool) -> Iterator[Entry]:
        """Yield the objects below a folder, sorted by key; the listing is held in memory."""
        base = self.path(prefix)
        self.fs.invalidate_cache()
        for path, info in sorted(retried(LIST, base, lambda: self._find(base)).items()):
            relative = path[len(base) :].lstrip("/")
            if hidden or not is_hidden(relative):
                yield Entry(join(prefix, relative), int(info["size"]), _version(info))

    def write(self, key: str, data: bytes) -> None:
        """Store an object whole, replacing any other."""
        retried(WRITE, self.path(key), lambda: self.fs.pipe_file(self.path(key), data))

    def create(self, key: str, data: bytes) -> bool:
        """Store an object unless there is one; return whether this call did."""
        if isinstance(self.fs, MemoryFileSystem):
            with _MEMORY_LOCK:
                if self.exists(key):
                    return False
                self.write(key, data)
                return True
        try:
            retried(WRITE, self.path(key), lambda: self.fs.pipe_file(self.path(key), data, mode="create"))
        except FileExistsError:
            return False
        return True

    def delete(self, key: str) -> None:
        """Remove an object; one that is gone is no error."""
        try:
            retried(DELETE, self.path(key), lambda: self.fs.rm_file(self.path(key)))
        except FileNotFoundError:
            return

    def abort_uploads(self, prefix: str) -> int:
        """Return 0: fsspec knows no unfinished uploads."""
        return 0

    def _find(self, base: str) -> dict[str, dict[str, Any]]:
        if not self.fs.isdir(base):
            return {}
        return cast(dict[str, dict[str, Any]], self.fs.find(base, detail=True))


def _open(url: str) -> tuple[Any, str]:
    if fsspec.utils.get_protocol(url) not in ("s3", "s3a"):
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    fs = _connect_s3(settings, os.getpid())
    return fs, fs._strip_protocol(url)


@lru_cache(maxsize=8)
def _connect_s3(settings: tuple[tuple[str, str], ...], process: int) -> Any:
    """Return the S3 filesystem of this environment: fsspec keeps one a thread, whatever AWS_* says by now."""
    environment = dict(settings)
    options: dict[str, Any] = {}
    # Other SDKs read AWS_REGION, and people set it; botocore reads AWS_DEFAULT_REGION alone.
    if "AWS_REGION" in environment and "AWS_DEFAULT_REGION" not in environment:
        options["client_kwargs"] = {"region_name": environment["AWS_REGION"]}
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    once = {"retries": {"total_max_attempts": 1}, "max_pool_connections": _CONNECTIONS}
    fs = fsspec.filesystem(
        "s3", config_kwargs={**configured, **once}, use_listings_cache=False, skip_instance_cache=True, **options
    )
    # Three layers would each retry the others' retries, for minutes and without a word: ours is the only one.
    fs.retries = 1
    return fs


def _backend(fs: Any, root: str) -> Backend:
    if isinstance(fs, LocalFileSystem):
        return LocalFolder(root)
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return S3Folder(fs, root) if "s3" in protocols else AnyFolder(fs, root)


def _version(info: dict[str, Any]) -> str:
    if "ETag" in info:
        return str(info["ETag"]).strip('"')
    if "mtime_ns" in info:
        return str(info["mtime_ns"])
    created = info.get("created", info.get("mtime", ""))
    # Some filesystems give a date for one object and seconds in a listing.
    return str(created.timestamp() if isinstance(created, datetime) else created)
