"""Headers of plain tar archives: names, offsets and sizes of the files in them. Nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from eclipse_ray.errors import InputError

BLOCK = 512
# Most zero bytes after the end mark. A tar is padded to its record size, which is 10 KiB by default.
_MOST_PADDING = 2**20
_LONGEST_NOTE = 2**20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

Read = Callable[[int, int], bytes]


class Member(NamedTuple):
    """One file in a tar: its name, offset of its first header, offset of its bytes, and number of bytes."""

    name: str
    begin: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the next member."""
        return _padded(self.offset + self.size)


class _Header(NamedTuple):
    """The content of one header block."""

    name: str
    size: int
    kind: bytes
    is_folder: bool


def members(where: str, read: Read, place: int, end: int, *, whole: bool = False) -> Iterator[Member]:
    """Yield the files whose records fill bytes `place` to `end` exactly; `read` returns bytes start to stop.

    Of a `whole` tar they end at an end mark. Raises InputError for a damaged or truncated archive, links,
    devices, and names that lead out of the archive.
    """
    while (not is_end(where, read, place, end)) if whole else place < end:
        member = next_member(where, read, place, end)
        if member.offset + member.size > end:
            raise InputError(f"{where}: member {member.name!r} is cut short; copy the archive again")
        place = member.end
        if not member.name.endswith("/"):
            yield member


def is_end(where: str, read: Read, place: int, size: int) -> bool:
    """Return whether the end mark of a tar of `size` bytes is at `place`.

    Raises InputError if the file ends without an end mark, or if anything but zeros follows it.
    """
    if place + BLOCK > size:
        raise InputError(f"{where}: has no end mark, so it was cut short; copy the archive again or write it anew")
    if any(read(place, place + BLOCK)):
        return False
    if size - place > _MOST_PADDING or any(read(place, size)):
        raise InputError(
            f"{where}: has data behind its end mark, as archives joined by `cat` do; write it anew as one archive"
        )
    return True


def next_member(where: str, read: Read, begin: int, end: int) -> Member:
    """Return the member whose first header is at `begin`; the name of a folder ends in a slash.

    Raises InputError as `members` does.
    """
    place = begin
    note: dict[str, str] = {}
    while True:
        header = _header(where, read, place, end)
        body = place + BLOCK
        if header.kind not in _EXTENSIONS:
            break
        if header.size > _LONGEST_NOTE:
            raise InputError(f"{where}: a name of {header.size} bytes is no name; write the archive anew")
        note |= _note(where, header, read(body, body + header.size))
        place = _padded(body + header.size)
    name = note.get("path", header.name)
    _check_kind(where, header, name, note)
    if header.is_folder:
        return Member(_safe_name(where, name).rstrip("/") + "/", begin, body, 0)
    return Member(_safe_name(where, name), begin, body, _size(where, note.get("size", str(header.size))))


def header_block(name: str, size: int) -> bytes:
    """Return the header records of a file `name` of `size` bytes; equal arguments give equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def padding(size: int) -> bytes:
    """Return the zeros that pad a file of `size` bytes to whole blocks."""
    return bytes(_padded(size) - size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(where: str, read: Read, place: int, end: int) -> _Header:
    # The parser of tarfile reads all thirteen fields and takes minutes instead of seconds for a million headers.
    block = read(place, place + BLOCK) if place + BLOCK <= end else b""
    try:
        if len(block) != BLOCK or sum(block) - sum(block[148:156]) + 256 != _number(block[148:156]):
            raise ValueError("its checksum is wrong")
        name, size, kind = _text(block[:100]), _number(block[124:136]), block[156:157]
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{_text(block[345:500])}/{name}"
    except ValueError as error:
        raise InputError(
            f"{where}: no tar header at byte {place} ({error}); copy the archive again or write it anew"
        ) from error
    folder = kind == tarfile.DIRTYPE or (kind == tarfile.AREGTYPE and name.endswith("/"))
    return _Header(name, size, kind, folder)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    # A number is octal digits or, if it is too large for them, a set bit followed by the binary number.
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits and not digits.isdigit():
        raise ValueError(f"{digits!r} is no octal number")
    return int(digits or b"0", 8)


def _note(where: str, header: _Header, data: bytes) -> dict[str, str]:
    """Return the path, size and link of the next member that a pax or GNU extension header sets."""
    if header.kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if header.kind == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": ""}
    known: dict[str, str] = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record, data = data[len(digits) + 1 : length], data[length:]
        name, separator, value = record.rstrip(b"\n").partition(b"=")
        if not separator or length > len(record) + len(digits) + 1:
            raise InputError(f"{where}: a damaged pax header; copy the archive again or write it anew")
        if name in (b"path", b"size", b"linkpath") or name.startswith(b"GNU.sparse"):
            known[name.decode("ascii", "replace")] = value.decode("utf-8", "surrogateescape")
    if header.kind == tarfile.XGLTYPE and known:
        raise InputError(f"{where}: one header sets {', '.join(known)} for all members; write the archive anew")
    return known


def _size(where: str, digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise InputError(f"{where}: a member of {digits[:40]!r} bytes; copy the archive again or write it anew")
    return int(digits)


def _check_kind(where: str, header: _Header, name: str, note: dict[str, str]) -> None:
    kind = _KINDS.get(header.kind)
    if any(key.startswith("GNU.sparse") for key in note):
        kind = "a sparse file"
    elif kind is None and header.kind not in _REGULAR and not header.is_folder:
        kind = f"of unknown type {header.kind!r}"
    if kind is not None:
        raise InputError(f"{where}: member {name!r} is {kind}; only plain files are read, so leave it out")


def _safe_name(where: str, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: member {name!a} has a name that is not valid Unicode; rename it") from None
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise InputError(f"{where}: member {name!r} points out of the archive; nothing is read from such archives")
    return name.removeprefix("./")
