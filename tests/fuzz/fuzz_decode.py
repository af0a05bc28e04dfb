"""Mutates valid images, tars, NumPy, Parquet and torch files and CIFAR batches, and passes them to their readers.

    python -m tests.fuzz.fuzz_decode --seconds 300 --seed 0

A reader may return rows or raise ImageError or InputError; anything else is a crash, and its bytes are kept.
Prints one JSON object; exit code 1 if anything crashed.
"""

import argparse
import hashlib
import io
import json
import pickle
import random
import resource
import sys
import tarfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source, read_tables
from eclipse_ray.datasets.images import ImageError, decode_stored, encode_image
from eclipse_ray.datasets.table import canonical_table, table_to_parquet
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import tar_bytes
from tests.zoo import NOISE, saved, specimens

MAX_PIXELS = 1_000_000
POLICIES = [
    DataConfig(max_pixels=MAX_PIXELS),
    DataConfig(max_pixels=MAX_PIXELS, alpha="refuse", animated="refuse"),
]
WORDS = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x01", b"\x80", b"../", b"9" * 11, b"IDAT"]
KEPT_CRASHES = 20
# An input that needs more memory or seconds than this is kept too.
MUCH_MB, LONG_SECONDS = 100, 5


@dataclass
class Tally:
    """Counts for one reader."""

    executions: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    slowest: float = 0.0
    most_mb: int = 0
    kinds: set[str] = field(default_factory=set)


def seeds() -> dict[str, list[bytes]]:
    """Return small valid inputs for every reader."""
    arrays = NOISE.reshape(-1, 8, 8, 3)[:6]
    encoded = [encode_image(image, "png") for image in arrays]
    table = canonical_table([f"{n}" for n in range(6)], encoded, [0, 1, 0, 1, 0, 1], classes=["a", "b"])
    named = {"images": arrays, "labels": np.arange(6), "id": np.array([f"é{n}" for n in range(6)])}
    tensors = {"data": torch.from_numpy(arrays), "labels": torch.arange(6)}
    floats = torch.from_numpy(arrays) / 255, torch.arange(6)
    images = [specimen.data for specimen in specimens().values() if 0 < len(specimen.data) < 20_000]
    return {
        "image": [*images, saved(Image.new("RGB", (9, 7), "teal"), "BMP")],
        "tar": [
            _tar(encoded, format) for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
        ],
        "npz": [_bytes(save, **named) for save in (np.savez, np.savez_compressed)],
        "npy": [_bytes(np.save, arrays)],
        "parquet": [table_to_parquet(table)],
        "cifar": [pickle.dumps({"data": arrays[:, :, :, 0].reshape(6, -1)[:, :48], "labels": [0] * 6}, 2)],
        "published": [
            pickle.dumps([(image.tobytes(), 1) for image in arrays]),
            _bytes(lambda file: torch.save(tensors, file)),
            _bytes(lambda file: torch.save(floats, file, _use_new_zipfile_serialization=False)),
        ],
    }


def _bytes(save: Callable[..., None], *values: object, **named: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *values, **named)
    return buffer.getvalue()


def _tar(encoded: list[bytes], format: int) -> bytes:
    folder = "long/" * 30 if format != tarfile.USTAR_FORMAT else ""
    members = [
        (f"{folder}ü{number}.{extension}", content)
        for number, data in enumerate(encoded)
        for extension, content in (("png", data), ("cls", b"1"), ("json", b'{"label": 1}'))
    ]
    return tar_bytes(*members, format=format)


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return `data` with one to eight random changes, mostly one."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        place = rng.randrange(len(changed) + 1)
        # Half of the changes are near the start, because headers matter more than pixels.
        place = min(place, rng.randrange(600)) if rng.random() < 0.5 else place
        kind = rng.randrange(7)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(changed):
            changed[place] = rng.randrange(256)
        elif kind == 2:
            word = rng.choice(WORDS)
            changed[place : place + len(word)] = word
        elif kind == 3:
            del changed[place : place + rng.randrange(1, 64)]
        elif kind == 4:
            changed[place:place] = changed[place : place + rng.randrange(1, 64)]
        elif kind == 5 and rng.random() < 0.3:
            del changed[place:]
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            changed[place : place + 32] = other[start : start + rng.randrange(1, 64)]
    return bytes(changed)


def _decode(data: bytes, rng: random.Random) -> None:
    decoded = decode_stored(data, rng.choice(POLICIES))
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3
    assert decoded.shape[2] == 3
    assert decoded.shape[0] * decoded.shape[1] <= MAX_PIXELS


def _reader(key: str) -> Callable[[bytes, random.Random], None]:
    store = Store(f"memory://fuzz-{key}")

    def read(data: bytes, rng: random.Random) -> None:
        store.write(key, data)
        try:
            source = open_source(f"{store.url}/{key}", POLICIES[0])
            tables = list(read_tables(source))
        except InputError as error:
            if key in str(error):
                raise
            raise AssertionError(f"does not name its file: {error}") from error
        for table in tables:
            assert {"id", "image"} <= set(table.column_names)
            assert "label" not in table.column_names or pa.types.is_integer(table["label"].type)
        assert sum(table.num_rows for table in tables) == source.images

    return read


TARGETS: dict[str, Callable[[bytes, random.Random], None]] = {
    "image": _decode,
    "tar": _reader("a.tar"),
    "npz": _reader("a.npz"),
    "npy": _reader("a.npy"),
    "parquet": _reader("a.parquet"),
    "cifar": _reader("data_batch_1"),
    "published": _reader("a.pt"),
}


def fuzz(seconds: float, seed: int, keep: Path | None = None) -> dict[str, object]:
    """Run all readers in turn for `seconds`; return executions, crashes, and peak memory in MB."""
    rng = random.Random(seed)
    corpus = seeds()
    tallies = {name: Tally() for name in TARGETS}
    end = time.monotonic() + seconds
    names = list(TARGETS)
    executions = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.monotonic() < end:
            # Every second input is an image, because most of the code that reads untrusted bytes is Pillow.
            name = names[0] if executions % 2 else rng.choice(names)
            _execute(name, mutate(rng.choice(corpus[name]), corpus[name], rng), rng, tallies[name], keep)
            executions += 1
    return {
        "seconds": seconds,
        "seed": seed,
        "executions": executions,
        "crashes": sum(tally.crashes for tally in tallies.values()),
        "peak_rss_mb": _peak_mb(),
        "readers": {name: {**asdict(tally), "kinds": sorted(tally.kinds)} for name, tally in tallies.items()},
    }


def _execute(name: str, data: bytes, rng: random.Random, tally: Tally, keep: Path | None) -> None:
    started, before = time.monotonic(), _peak_mb()
    try:
        TARGETS[name](data, rng)
        tally.accepted += 1
    except (ImageError, InputError):
        tally.refused += 1
    except Exception as error:  # noqa: BLE001  finding out what else is raised is the whole point
        tally.crashes += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__}: {str(error)[:120]} ({Path(frame.filename).name}:{frame.lineno})"
        if len(tally.kinds) < KEPT_CRASHES and kind not in tally.kinds:
            _keep(keep, f"{name}-crash", data)
        tally.kinds.add(kind)
    seconds, grown = time.monotonic() - started, _peak_mb() - before
    if grown > MUCH_MB or seconds > LONG_SECONDS:
        _keep(keep, f"{name}-{grown}mb-{seconds:.0f}s", data)
    tally.executions += 1
    tally.slowest = max(tally.slowest, seconds)
    tally.most_mb = max(tally.most_mb, grown)


def _keep(folder: Path | None, name: str, data: bytes) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Parse arguments, fuzz, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for what crashed a reader")
    options = parser.parse_args()
    result = fuzz(options.seconds, options.seed, options.keep)
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["crashes"] else 0)


if __name__ == "__main__":
    main()
