"""A folder on any filesystem, with put-if-absent, on which every commit relies. The only user of fsspec."""

from __future__ import annotations

import io
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from eclipse_ray.contact import first_contact
from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.log import listen
from eclipse_ray.storage import Entry, ObjectFile, is_hidden, join
from eclipse_ray.storage.local import LocalFolder
from eclipse_ray.storage.retries import ShortReadError, retried
from eclipse_ray.storage.s3 import DELETE, LIST, READ, WRITE, S3Folder

__all__ = ["Entry", "Store"]

_MEMORY_LOCK = threading.Lock()
# Read-ahead of an opened object that is not on S3, as fsspec has it.
_BUFFER_BYTES = 5 * 2**20
# Most HTTP connections per process.
_CONNECTIONS = 32


class Store:
    """One folder or one file at a path or fsspec URL; keys are relative, with forward slashes.

    With `single_writer`, writes do without put-if-absent, for stores that do not support it. Two drivers on one
    output may then both believe that they committed a shard. Every method raises StorageError when the store
    refuses a request or does not answer.
    """

    def __init__(self, url: str, single_writer: bool = False) -> None:
        if not url:
            raise InputError("expected a folder, a file or a URL, found an empty text; write . for this folder")
        try:
            self.fs, root = _open(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url}: cannot open this kind of location: {error}") from error
        except OSError as error:
            raise StorageError(
                f"{url}: could not connect to it: {error}; check the address and the network, then run the same "
                "command again"
            ) from error
        self.local = isinstance(self.fs, LocalFileSystem)
        self.root = os.path.abspath(root) if self.local else root.rstrip("/")
        self.url = self.root if self.local else url.rstrip("/")
        self.single_writer = single_writer
        self.backend = _backend(self.fs, self.root)

    def __reduce__(self) -> tuple[type[Store], tuple[str, bool]]:
        # Only the URL is pickled. The other process makes its own connections and locks.
        return Store, (self.url, self.single_writer)

    @property
    def in_this_process_only(self) -> bool:
        """Whether only this process can see what is stored here (memory://)."""
        return isinstance(self.fs, MemoryFileSystem)

    def path(self, key: str) -> str:
        """Return the path of `key` in the filesystem."""
        return f"{self.root.rstrip('/')}/{key}" if key else self.root

    def exists(self, key: str = "") -> bool:
        """Return whether an object or folder `key` exists now."""
        return self.backend.exists(key)

    def is_file(self) -> bool:
        """Return whether the store's own URL is a single file."""
        return self.backend.is_file()

    def read(self, key: str = "") -> bytes:
        """Return a complete object. Raises FileNotFoundError if it does not exist."""
        return self.backend.read(key)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`, fewer at the end. Raises FileNotFoundError if there is no object."""
        return self.backend.read_range(key, start, stop)

    def open(self, key: str = "") -> BinaryIO:
        """Open an object for random access. Raises FileNotFoundError if it does not exist."""
        return self.backend.open(key)

    def entry(self, key: str) -> Entry:
        """Return the size and version of one object. Raises FileNotFoundError if it does not exist."""
        return self.backend.entry(key)

    def list(self, prefix: str = "", hidden: bool = False) -> Iterator[Entry]:
        """Yield every object below the folder `prefix`, sorted by key; nothing if there is no such folder.

        Unless `hidden`, objects are skipped if a name below `prefix` starts with `_` or `.`. Memory holds one page
        of 1,000 keys on Amazon S3, the names of one folder per level on a disk, and every entry on other stores,
        which do not list in sorted order.
        """
        return self.backend.walk(prefix, hidden)

    def write(self, key: str, data: bytes) -> None:
        """Write an object atomically, replacing an existing one."""
        self.backend.write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless `key` exists (put-if-absent); return whether this call wrote it."""
        if not self.single_writer:
            return self.backend.create(key, data)
        if self.backend.exists(key):
            return False
        self.backend.write(key, data)
        return True

    def delete(self, key: str) -> None:
        """Delete an object; an object that does not exist is no error."""
        self.backend.delete(key)

    def abort_uploads(self, prefix: str = "") -> int:
        """Abort all unfinished uploads below `prefix` and return how many there were.

        Unfinished uploads are invisible but cost storage. A live run starts an aborted upload again. Stores
        without unfinished uploads return 0.
        """
        return self.backend.abort_uploads(prefix) if isinstance(self.backend, S3Folder) else 0

    def seconds_ahead(self) -> float | None:
        """Return by how many seconds this machine's clock is ahead of that of S3; None for other stores."""
        return self.backend.seconds_ahead() if isinstance(self.backend, S3Folder) else None

    def probe(self) -> None:
        """Check that put-if-absent works here, and leave nothing.

        Raises StorageError if not, because two runs could then mix.
        """
        key, folder = f"_eclipse/probe-{uuid.uuid4().hex}", Path(self.root, "_eclipse")
        made = [each for each in (folder, *folder.parents) if self.local and not os.path.exists(each)]
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
        with suppress(OSError):
            for each in made:
                each.rmdir()

    def require_writable(self) -> None:
        """Raise StorageError or InputError if nothing can be written here. Called before hours of work."""
        Store(self.url, single_writer=True).probe()


class AnyFolder:
    """A folder on any other fsspec filesystem, for example memory://."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root

    def path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def where(self, key: str) -> str:
        return self.fs.unstrip_protocol(self.path(key))

    def exists(self, key: str) -> bool:
        # Not fs.exists, which is also false for a server that does not answer.
        try:
            self._info(key)
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        return self.exists("") and self._info("").get("type") == "file"

    def read(self, key: str) -> bytes:
        def call() -> bytes:
            data = self.fs.cat_file(self.path(key))
            size = self.fs.info(self.path(key)).get("size")
            if size is not None and len(data) != size:
                raise ShortReadError(f"{len(data)} bytes came, {size} were expected")
            return data

        return retried(READ, self.where(key), call)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        path = self.path(key)
        return retried(READ, self.where(key), lambda: self.fs.cat_file(path, start=start, end=stop))

    def open(self, key: str) -> BinaryIO:
        info = self._info(key)
        # A web server that does not send parts sends the whole, once.
        if info.get("size") is None or not info.get("partial", True):
            return retried(READ, self.where(key), lambda: self.fs.open(self.path(key), "rb"))
        entry = Entry(key, int(info["size"]), _version(info))
        return io.BufferedReader(ObjectFile(self.read_part, entry), _BUFFER_BYTES)

    def read_part(self, entry: Entry, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`, neither more nor fewer."""

        def call() -> bytes:
            data = self.fs.cat_file(self.path(entry.key), start=start, end=stop)
            if len(data) > stop - start:
                raise InputError(f"{self.where(entry.key)}: this server sends whole files only; download it first")
            if len(data) < stop - start:
                raise ShortReadError(f"{len(data)} bytes came, {stop - start} were expected")
            return data

        return retried(READ, self.where(entry.key), call)

    def entry(self, key: str) -> Entry:
        info = self._info(key)
        return Entry(key, int(info["size"]), _version(info))

    def walk(self, prefix: str, hidden: bool) -> Iterator[Entry]:
        """Yield the objects below a folder, sorted by key; memory holds the whole listing."""
        base = self.path(prefix)
        self.fs.invalidate_cache()

        def find() -> dict[str, dict[str, Any]]:
            return self.fs.find(base, detail=True) if self.fs.isdir(base) else {}

        for path, info in sorted(retried(LIST, self.where(prefix), find).items()):
            relative = path[len(base) :].lstrip("/")
            if hidden or not is_hidden(relative):
                yield Entry(join(prefix, relative), int(info["size"]), _version(info))

    def write(self, key: str, data: bytes) -> None:
        retried(WRITE, self.where(key), lambda: self.fs.pipe_file(self.path(key), data))

    def create(self, key: str, data: bytes) -> bool:
        if isinstance(self.fs, MemoryFileSystem):
            with _MEMORY_LOCK:
                if self.exists(key):
                    return False
                self.write(key, data)
                return True
        try:
            retried(WRITE, self.where(key), lambda: self.fs.pipe_file(self.path(key), data, mode="create"))
        except FileExistsError:
            return False
        return True

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            retried(DELETE, self.where(key), lambda: self.fs.rm_file(self.path(key)))

    def _info(self, key: str) -> dict[str, Any]:
        try:
            return retried(READ, self.where(key), lambda: self.fs.info(self.path(key)))
        except (ValueError, NotImplementedError) as error:  # Hugging Face refuses a name of a repository so.
            raise InputError(f"{self.where(key)}: is no location of this kind: {error}; correct it") from error


def _open(url: str) -> tuple[Any, str]:
    protocol = fsspec.utils.get_protocol(url)
    if protocol in ("file", "local", "memory"):
        return fsspec.core.url_to_fs(url)
    if protocol not in ("s3", "s3a"):
        # Some, such as ftp and sftp, connect at once.
        return first_contact(f"{url} to answer", lambda: fsspec.core.url_to_fs(url))
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    fs = _connect_s3(settings, os.getpid())
    return fs, fs._strip_protocol(url)


@lru_cache(maxsize=8)
def _connect_s3(settings: tuple[tuple[str, str], ...], process: int) -> Any:
    """Return the S3 filesystem for these AWS_* variables, made once per process.

    The cache of fsspec keeps one filesystem per thread and ignores later changes of the variables.
    """
    # They log a trace for a server of credentials that is away; our sentence says it.
    listen("aiobotocore", "botocore")
    environment = dict(settings)
    options: dict[str, Any] = {}
    # People set AWS_REGION because other SDKs read it. botocore reads only AWS_DEFAULT_REGION.
    if "AWS_REGION" in environment and "AWS_DEFAULT_REGION" not in environment:
        options["client_kwargs"] = {"region_name": environment["AWS_REGION"]}
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    once = {"retries": {"total_max_attempts": 1}, "max_pool_connections": _CONNECTIONS}
    fs = fsspec.filesystem(
        "s3", config_kwargs={**configured, **once}, use_listings_cache=False, skip_instance_cache=True, **options
    )
    # Retries of three layers would multiply and last for minutes without a message. Only retries.py retries.
    fs.retries = 1
    return fs


def _backend(fs: Any, root: str) -> LocalFolder | S3Folder | AnyFolder:
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
    # Some filesystems return a date for one object but seconds in a listing.
    return str(created.timestamp() if isinstance(created, datetime) else created)
