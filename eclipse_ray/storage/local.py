"""A folder on a local disk: atomic writes, put-if-absent by hard link, listings sorted by key."""

from __future__ import annotations

import errno
import io
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.storage import Entry, is_hidden, join

# Attempts to write one file whose temporary file vanishes.
_TRIES = 5
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_BAD_NAMES = {
    errno.ENAMETOOLONG: "too long to name a file here; choose a shorter name, or for images the parquet layout",
    errno.ELOOP: "its links lead in a circle; delete or mend them",
    errno.EISDIR: "is a folder where a file should be; name a file, or move the folder elsewhere",
}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


class LocalFolder:
    """One folder or one file; keys are paths relative to `root`, with forward slashes."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, key: str) -> str:
        return os.path.join(self.root, key) if key else self.root

    def exists(self, key: str) -> bool:
        return self._mode(key) is not None

    def is_file(self) -> bool:
        return stat.S_ISREG(self._mode("") or 0)

    def _mode(self, key: str) -> int | None:
        # Not os.path.exists, which is also false for what may not be looked at.
        try:
            with _explained(self.path(key), "read"):
                return os.stat(self.path(key)).st_mode
        except (FileNotFoundError, ValueError):  # No name holds a zero byte.
            return None

    def read(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        with self.open(key) as file:
            file.seek(start)
            return file.read(stop - start)

    def open(self, key: str) -> BinaryIO:
        with _explained(self.path(key), "read"):
            return io.BufferedReader(_File(self.path(key)))

    def entry(self, key: str) -> Entry:
        with _explained(self.path(key), "read"):
            info = os.stat(self.path(key))
        return Entry(key, info.st_size, str(info.st_mtime_ns))

    def walk(self, prefix: str, hidden: bool) -> Iterator[Entry]:
        """Yield the files below a folder, sorted by key; memory holds the names of one folder per level."""
        base = self.path(prefix)
        with _explained(base, "read"):
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
        with suppress(FileNotFoundError), _explained(self.path(key), "remove"):
            os.unlink(self.path(key))

    def _place(self, key: str, data: bytes, move: Callable[[str, str], None]) -> None:
        path = self.path(key)
        folder = os.path.dirname(path)
        # Another run that has just finished may delete our temporary file as a leftover.
        for _ in range(_TRIES):
            temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
            try:
                with _explained(path, "write"):
                    _write_temporary(temporary, data)
                    move(temporary, path)
                    _sync_folder(folder)
                return
            except FileNotFoundError:
                continue
            finally:
                with suppress(OSError):
                    os.unlink(temporary)
        raise StorageError(f"{path}: temporary files vanish while they are written; try again")


class _File(io.FileIO):
    """A file whose disk may fail on the way."""

    def readinto(self, buffer: Any) -> int | None:
        with _explained(str(self.name), "read"):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with _explained(str(self.name), "read"):
            return super().readall()


def _write_temporary(path: str, data: bytes) -> None:
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, FileNotFoundError) as error:
        for each in (Path(folder), *Path(folder).parents):
            if each.is_symlink() and not each.exists():
                said = f"{each}: is a link to {each.readlink()}, where nothing is"
                raise InputError(f"{said}; make that folder, or delete the link") from error
        if isinstance(error, FileNotFoundError):
            raise
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
    except (FileNotFoundError, NotADirectoryError):
        return []
    return names if hidden else [name for name in names if not is_hidden(name)]


@contextmanager
def _explained(path: str, verb: str) -> Iterator[None]:
    """Turn what a disk refuses into one sentence. That a file is absent, or there already, passes."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except NotADirectoryError as error:
        if verb == "read":
            raise FileNotFoundError(errno.ENOENT, "there is no such file", path) from error
        raise InputError(f"{path}: a part of this path is a file, not a folder; choose another output") from error
    except OSError as error:
        # A listing fails at one of the folders below. Temporary files mean nothing to people.
        where = error.filename if verb == "read" and error.filename else path
        reason = f"({errno.errorcode.get(error.errno or 0, '?')}: {error.strerror})"
        if error.errno in _BAD_NAMES:
            raise InputError(f"{where}: {_BAD_NAMES[error.errno]} {reason}") from error
        if error.errno in _FULL:
            problem = f"could not {verb} it: the disk or a quota is full {reason}; make room"
        elif error.errno in _FORBIDDEN:
            needed = (
                "read permission for it and its folders" if verb == "read" else "write permission for its folder"
            )
            problem = f"not allowed to {verb} it {reason}; grant {needed}"
        else:
            problem = f"could not {verb} it {reason}; check the disk"
        raise StorageError(f"{where}: {problem}, then run the same command again") from error


def _sync_folder(folder: str) -> None:
    # A new name survives a power cut only after its folder has been synced too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
