"""A folder on a local disk: atomic writes, put-if-absent by hard link, listings sorted by key."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.storage import Entry, is_hidden, join

# Attempts to write one file whose temporary file vanishes.
_TRIES = 5
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


class LocalFolder:
    """One folder or one file; keys are paths relative to `root`, with forward slashes."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, key: str) -> str:
        return os.path.join(self.root, key) if key else self.root

    def exists(self, key: str) -> bool:
        return os.path.exists(self.path(key))

    def is_file(self) -> bool:
        return os.path.isfile(self.root)

    def read(self, key: str) -> bytes:
        with open(self.path(key), "rb") as file:
            return file.read()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        with self.open(key) as file:
            file.seek(start)
            return file.read(stop - start)

    def open(self, key: str) -> BinaryIO:
        return open(self.path(key), "rb")

    def entry(self, key: str) -> Entry:
        info = os.stat(self.path(key))
        return Entry(key, info.st_size, str(info.st_mtime_ns))

    def walk(self, prefix: str, hidden: bool) -> Iterator[Entry]:
        """Yield the files below a folder, sorted by key; memory holds the names of one folder per level."""
        base = self.path(prefix)
        if os.path.isdir(base):
            yield from _walk(base, prefix, hidden, (os.path.realpath(base),))

    def write(self, key: str, data: bytes) -> None:
        self._place(key, data, os.replace)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._place(key, data, _link)
        except FileExistsError:
            return False
        return True

    def delete(self, key: str) -> None:
        try:
            os.unlink(self.path(key))
        except FileNotFoundError:
            return
        except OSError as error:
            raise _explained(self.path(key), "remove", error) from error

    def _place(self, key: str, data: bytes, move: Callable[[str, str], None]) -> None:
        path = self.path(key)
        folder = os.path.dirname(path)
        # Another run that has just finished may delete our temporary file as a leftover.
        for _ in range(_TRIES):
            temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
            try:
                _write_temporary(temporary, data)
                move(temporary, path)
                _sync_folder(folder)
                return
            except FileNotFoundError:
                continue
            except FileExistsError:
                raise
            except OSError as error:
                raise _explained(path, "write", error) from error
            finally:
                with suppress(OSError):
                    os.unlink(temporary)
        raise StorageError(f"{path}: temporary files vanish while they are written; try again")


def _write_temporary(path: str, data: bytes) -> None:
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "is a file where a folder should be", folder) from error
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise StorageError(
                f"{path}: this filesystem has no hard links, by which a file is created only if it is absent; "
                "choose another output, or --single-writer if nobody else writes to it"
            ) from error
        raise


def _walk(folder: str, prefix: str, hidden: bool, above: tuple[str, ...]) -> Iterator[Entry]:
    # Folder names are sorted with their slash, as the keys of their files are: "a-b" comes before "a/x".
    for name in sorted(_names(folder, hidden)):
        path = os.path.join(folder, name)
        if name.endswith("/"):
            real = os.path.realpath(path)
            if real not in above and not os.path.join(above[-1], "").startswith(os.path.join(real, "")):
                yield from _walk(path[:-1], join(prefix, name[:-1]), hidden, (*above, real))
            continue
        info = _info(path)
        if info is not None:
            yield Entry(join(prefix, name), info.st_size, str(info.st_mtime_ns))


def _info(path: str) -> os.stat_result | None:
    # A link to a missing file is listed too, so that it becomes an error instead of vanishing.
    for look in (os.stat, os.lstat):
        with suppress(FileNotFoundError):
            return look(path)
    return None


def _names(folder: str, hidden: bool) -> list[str]:
    try:
        with os.scandir(folder) as found:
            names = [entry.name + "/" if entry.is_dir() else entry.name for entry in found]
    except FileNotFoundError:
        return []
    return names if hidden else [name for name in names if not is_hidden(name)]


def _explained(path: str, verb: str, error: OSError) -> Exception:
    name = errno.errorcode.get(error.errno or 0, "")
    if error.errno in _FULL:
        return StorageError(
            f"{path}: could not {verb} it: the disk or a quota is full ({name}: {error.strerror}); make room, "
            "then run the same command again"
        )
    if error.errno in _FORBIDDEN:
        return StorageError(
            f"{path}: not allowed to {verb} it ({name}: {error.strerror}); grant write permission to this "
            "folder, then run the same command again"
        )
    if error.errno == errno.ENOTDIR:
        return InputError(f"{path}: a part of this path is a file, not a folder; choose another output")
    return error


def _sync_folder(folder: str) -> None:
    # A new name survives a power cut only after its folder has been synced too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
