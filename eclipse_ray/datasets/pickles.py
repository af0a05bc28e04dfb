"""The one reader of pickles and of files of torch.save: it builds plain values and arrays, nothing else."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from eclipse_ray.datasets import damage_named
from eclipse_ray.errors import InputError

_ZIP_MAGIC = b"PK\x03\x04"
# The pickled number with which older versions of torch.save begin a file.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "u2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


@dataclass
class _Storage:
    """Values that tensors share: `numel` numbers from byte `start` of the file, or of `data` if it is given."""

    dtype: np.dtype[Any]
    bfloat16: bool
    numel: int
    start: int = -1
    data: bytes | None = None


@dataclass(frozen=True)
class Tensor:
    """A torch tensor whose values still lie in the file; `shape` and `strides` count numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the values that `rows` returns; bfloat16 becomes float32."""
        return np.dtype(np.float32) if self.storage.bfloat16 else self.storage.dtype.newbyteorder("=")

    def __getitem__(self, rows: slice) -> Tensor:
        """Return some rows as a tensor that is not read yet."""
        start, stop, _ = rows.indices(self.shape[0])
        shape = (max(0, stop - start), *self.shape[1:])
        return replace(self, offset=self.offset + start * self.strides[0], shape=shape)

    def read(self, file: BinaryIO) -> NDArray[Any]:
        """Return the whole tensor from `file`. Raises EOFError if the file ends before its last value."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        kind = self.storage.dtype
        length = 1 + sum((side - 1) * step for side, step in zip(self.shape, self.strides, strict=True))
        first = self.storage.start + self.offset * kind.itemsize
        source = file if self.storage.data is None else io.BytesIO(self.storage.data)
        source.seek(first)
        raw = source.read(length * kind.itemsize)
        if self.storage.start < 0 or len(raw) != length * kind.itemsize:
            raise EOFError("the values of a tensor end too soon")
        steps = [step * kind.itemsize for step in self.strides]
        values: NDArray[Any] = np.ndarray(self.shape, kind, raw, strides=steps)
        if self.storage.bfloat16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(kind.newbyteorder("="))


Values = NDArray[Any] | Tensor


def values_of(value: object) -> Values | None:
    """Return the array or tensor that a reader of this module built, None for every other value."""
    if isinstance(value, _Array):
        return value.value
    return value if isinstance(value, Tensor) else None


def read_file(where: str, file: BinaryIO, advice: str) -> Any:
    """Return the object in `file`, which pickle or torch.save (zip or legacy) wrote; arrays are for `values_of`.

    The values of tensors are not read yet. Raises InputError, which ends in `advice`, if the file is damaged or
    asks for anything that is not allowed.
    """
    with damage_named(f"{where}: not a readable pickle", advice):
        try:
            magic = file.read(len(_LEGACY_MAGIC))
            file.seek(0)
            if magic.startswith(_ZIP_MAGIC):
                return _load_zip(file)
            return _load_legacy(file, None) if magic == _LEGACY_MAGIC else _unpickle(file.read())
        except InputError as error:
            raise InputError(f"{where}: {error}, which can run code; {advice}") from None


def text_of(value: object) -> str:
    """Return text or bytes as text. Raises ValueError for every other value."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value
    raise ValueError(f"expected text, found {type(value).__name__}")


class _Dtype:
    """Replaces numpy.dtype in a pickle; allows only plain numbers."""

    def __init__(self, name: object, *_: object) -> None:
        self.value = np.dtype(text_of(name))
        if self.value.kind not in "biuf":
            raise ValueError(f"arrays of {self.value} are not allowed")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if text_of(state[1]) == ">":
            self.value = self.value.newbyteorder(">")


class _Array:
    """Replaces numpy.ndarray in a pickle; its values are made from raw bytes after checks."""

    def __init__(self) -> None:
        self.value: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_buffer(raw, dtype, shape, "F" if fortran else "C").value


class _Dict(dict[Any, Any]):
    """Replaces collections.OrderedDict in a pickle, and ignores attributes such as the version of a state dict."""

    def __setstate__(self, state: object) -> None:
        del state


def _from_buffer(raw: object, dtype: object, shape: object, order: object, axes: object = None) -> _Array:
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or text_of(order) not in ("C", "F", "K"):
        raise ValueError("an array is described wrongly")
    data = raw.encode("latin-1") if isinstance(raw, str) else raw
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array has no raw bytes")
    array = _Array()
    flat = np.frombuffer(data, dtype.value)
    array.value = flat.reshape(shape, order="F" if text_of(order) == "F" else "C")
    if isinstance(axes, tuple):
        # The values lie in the order of memory; `axes` leads back to the order of the array.
        array.value = array.value.transpose(axes)
    return array


def _scalar(dtype: object, raw: object) -> Any:
    return _from_buffer(raw, dtype, (), "C").value.item()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    # Protocol 2 writes bytes as text in latin-1. No other codec is needed.
    if not isinstance(text, str) or text_of(encoding) not in ("latin1", "latin-1"):
        raise ValueError("only latin-1 bytes are allowed")
    return text.encode("latin-1")


def _dict(*items: object) -> _Dict:
    if items:
        raise ValueError("a dict is described wrongly")
    return _Dict()


def _size(sides: object) -> tuple[Any, ...]:
    if not isinstance(sides, tuple):
        raise ValueError("a shape is described wrongly")
    return sides


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> Tensor:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor is described wrongly")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor is described wrongly")
    assert isinstance(offset, int)
    last = offset + sum((side - 1) * step for side, step in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.numel or (0 not in shape and last >= storage.numel):
        raise ValueError("a tensor describes more values than it holds")
    return Tensor(storage, offset, shape, strides)


def _storage_from_bytes(data: object) -> object:
    # A pickle of a tensor, unlike a file of torch.save, carries its values as a legacy file in bytes.
    if not isinstance(data, bytes):
        raise ValueError("a tensor is described wrongly")
    return _load_legacy(io.BytesIO(data), data)


_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",
    ("builtins", "bytes"): lambda: b"",
    ("collections", "OrderedDict"): _dict,
    ("numpy", "dtype"): _Dtype,
    # Occurs only as an argument of _reconstruct, which ignores it.
    ("numpy", "ndarray"): lambda *_: _Array(),
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "_load_from_bytes"): _storage_from_bytes,
}


# Makes a storage of its dtype, whether it holds bfloat16, its key and its number of values.
_Storages = Callable[[np.dtype[Any], bool, str, int], _Storage]


class _Unpickler(pickle.Unpickler):
    """Resolves only the names in `_ALLOWED` and the storages of torch, to replacements in this module."""

    storages: _Storages | None = None

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of `module.name`. Raises InputError for any other name."""
        if module == "torch" and name in _STORAGES:
            return name
        # NumPy 2 calls its package numpy._core.
        stand_in = _ALLOWED.get((re.sub(r"^numpy\._core\.", "numpy.core.", module), name))
        if stand_in is None:
            raise InputError(f"the pickle asks for {module}.{name}")
        # A new function each time, because a pickle may set attributes on the object that it gets.
        return lambda *arguments: stand_in(*arguments)

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that torch names by `pid`, on whichever device it was."""
        if self.storages is None or not isinstance(pid, tuple) or len(pid) < 5 or text_of(pid[0]) != "storage":
            raise ValueError("it refers to values outside of itself")
        _, name, key, _, numel, *view = pid
        if name not in _STORAGES or type(numel) is not int or numel < 0 or view not in ([], [None]):
            raise ValueError("a storage is described wrongly")
        return self.storages(np.dtype(_STORAGES[name]), name == "BFloat16Storage", text_of(key), numel)


def _unpickle(data: bytes, storages: _Storages | None = None) -> Any:
    _check_sizes(data)
    unpickler = _Unpickler(io.BytesIO(data), encoding="bytes")
    unpickler.storages = storages
    return unpickler.load()


def _check_sizes(data: bytes) -> None:
    # A few bytes can make the C unpickler allocate a memo of two billion places or a bytearray of any length.
    for opcode, argument, place in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and not 0 <= argument <= (place or 0):
            raise ValueError(f"it asks for a memo of {argument} places")


def _load_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        mains = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(mains) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("the zip file was not written by torch.save")
        top = mains[0].removesuffix("data.pkl")
        order = archive.read(f"{top}byteorder") if f"{top}byteorder" in members else sys.byteorder.encode()
        main = archive.read(mains[0])
    sign: Literal[">", "<"] = ">" if order == b"big" else "<"
    total = file.seek(0, io.SEEK_END)

    def storage(dtype: np.dtype[Any], bfloat16: bool, key: str, numel: int) -> _Storage:
        info = members[f"{top}data/{key}"]
        if numel * dtype.itemsize > min(info.file_size, total - info.header_offset):
            raise ValueError(f"storage {key} is too short")
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        return _Storage(dtype.newbyteorder(sign), bfloat16, numel, info.header_offset + 30 + name + extra)

    return _unpickle(main, storage)


def _load_legacy(file: BinaryIO, data: bytes | None) -> Any:
    # Pickles of magic number, version, system, object and storage keys; then each storage: its length and values.
    if file.read(len(_LEGACY_MAGIC)) != _LEGACY_MAGIC:
        raise ValueError("it was not written by torch.save")
    _next_pickle(file)
    system = _next_pickle(file)
    if not isinstance(system, dict) or system.get("little_endian", system.get(b"little_endian")) is not True:
        raise ValueError("its values are not little-endian")
    found: dict[str, _Storage] = {}

    def storage(dtype: np.dtype[Any], bfloat16: bool, key: str, numel: int) -> _Storage:
        return found.setdefault(key, _Storage(dtype.newbyteorder("<"), bfloat16, numel, data=data))

    result = _next_pickle(file, storage)
    for key in _next_pickle(file):
        each = found[text_of(key)]
        (length,) = struct.unpack("<q", file.read(8))
        if length < each.numel:
            raise ValueError("a storage is too short")
        each.start = file.tell()
        if length * each.dtype.itemsize > file.seek(0, io.SEEK_END) - each.start:
            raise ValueError("a storage is too short")
        file.seek(each.start + length * each.dtype.itemsize)
    return result


def _next_pickle(file: BinaryIO, storages: _Storages | None = None) -> Any:
    start = file.tell()
    for _ in pickletools.genops(file):
        pass
    size = file.tell() - start
    file.seek(start)
    return _unpickle(file.read(size), storages)
