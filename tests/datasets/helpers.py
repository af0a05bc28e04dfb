"""What tests of datasets share: small images and files, and what is read of them."""

import io
import itertools
import pickle
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFile

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source, read_parts, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import canonical_table
from eclipse_ray.datasets.write import write_dataset
from eclipse_ray.errors import InputError

CONFIG = DataConfig()
PNG = encode_image(np.zeros((2, 2, 3), np.uint8), "png")


def noise(count: int, height: int = 32, width: int | None = None, seed: int = 0) -> np.ndarray:
    """Draw uint8 (count, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width or height, 3), np.uint8)


def fill(folder: Path, *keys: str, images: Sequence[np.ndarray] | np.ndarray | None = None) -> str:
    """Write an image at each key, `PNG` if `images` are not given, and return the folder's location."""
    for number, key in enumerate(keys):
        file = folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG if images is None else encode_image(images[number], "png"))
    return str(folder)


def table_of(images: Iterable[np.ndarray], labels=None, ids=None, extras=None, classes=None) -> pa.Table:
    """Return a table of images as PNG; their ids are im/000, im/001 and so on unless given."""
    encoded = [encode_image(image, "png") for image in images]
    return canonical_table(
        ids or [f"im/{row:03d}" for row in range(len(encoded))], encoded, labels, extras, classes
    )


def write_set(url: object, *tables: pa.Table, classes: list[str] | None = None, **options: str) -> str:
    """Write a dataset of these tables and return its location."""
    write_dataset(str(url), tables, classes=classes, source="test", **options)
    return str(url)


def read_all(url: object, **settings: object) -> pa.Table:
    """Return all rows of a dataset."""
    config = DataConfig(**settings)
    return pa.concat_tables(read_tables(open_source(str(url), config)))


def read_rows(url: object, start: int, stop: int) -> pa.Table:
    """Return these rows of the only file of a dataset."""
    source = open_source(str(url), CONFIG)
    (part,) = source.parts
    return read_parts(source, [(part.key, start, stop)])


def refused(url: object, *words: str, reading: bool = False, **settings: object) -> str:
    """Check that a dataset is refused in one sentence with all `words`, opened or by `reading`; return that."""
    config = DataConfig(**settings)
    source = open_source(str(url), config) if reading else None
    with pytest.raises(InputError) as caught:
        list(read_tables(source)) if source else open_source(str(url), config)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    return message


def time_out(monkeypatch: pytest.MonkeyPatch, times: int, after: int = 0) -> None:
    """Let `times` reads of files in memory:// time out, after some that do not, without an errno."""
    reads = itertools.count()

    def read(file: MemoryFile, size: int | None = -1) -> bytes:
        if after <= next(reads) < after + times:
            raise TimeoutError
        return io.BytesIO.read(file, size)

    monkeypatch.setattr(MemoryFile, "read", read)


def dump(file: Path, content: object, protocol: int | None = None) -> Path:
    """Write a pickle and return its place."""
    file.write_bytes(pickle.dumps(content, protocol))
    return file


def save(file: Path, content: object, zipped: bool = True) -> Path:
    """Write what torch.save makes of `content` and return its place."""
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file


def tar(file: Path, *members: tarfile.TarInfo | tuple[str, bytes], **options: object) -> str:
    """Write (name, bytes) members, or TarInfo objects, as a tar; return the location of its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(tar_bytes(*members, **options))
    return str(file.parent)


def tar_bytes(*members: tarfile.TarInfo | tuple[str, bytes], mode: str = "w", **options: object) -> bytes:
    """Return a tar of (name, bytes) members or TarInfo objects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()
