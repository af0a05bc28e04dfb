"""Seconds and memory of planning a large dataset, which is open_source and then plan_shards.

    python benchmarks/planning.py --work runs/planning --objects 1000 --rows 1000 --format parquet

Writes copies of one tiny image below --work unless they exist, then plans them in a second process. With `folder`
it writes objects x rows image files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eclipse_ray import ledger
from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import canonical_table, table_to_parquet
from eclipse_ray.datasets.tar import header_block, padding

CLASSES = [f"class {number}" for number in range(10)]
IMAGE = encode_image(np.zeros((2, 2, 3), np.uint8), "png")


def write_parquet(folder: Path, number: int, rows: int) -> None:
    """Write one Parquet file of `rows` rows."""
    ids = [f"{number:05d}/{row:06d}" for row in range(rows)]
    labels = [row % len(CLASSES) for row in range(rows)]
    data = table_to_parquet(canonical_table(ids, [IMAGE] * rows, labels, classes=CLASSES))
    (folder / f"{number:05d}.parquet").write_bytes(data)


def write_tar(folder: Path, number: int, rows: int) -> None:
    """Write one tar without an index; each of its `rows` samples has an image and a label."""
    buffer = io.BytesIO()
    for row in range(rows):
        for extension, data in (("png", IMAGE), ("cls", b"1")):
            buffer.write(header_block(f"{number:05d}/{row:06d}.{extension}", len(data)))
            buffer.write(data + padding(len(data)))
    buffer.write(bytes(1024))
    (folder / f"{number:05d}.tar").write_bytes(buffer.getvalue())


def write_files(folder: Path, number: int, rows: int) -> None:
    """Write `rows` image files into one class folder."""
    target = folder / f"class{number:05d}"
    target.mkdir(exist_ok=True)
    for row in range(rows):
        (target / f"{row:06d}.png").write_bytes(IMAGE)


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "parquet": write_parquet,
    "webdataset": write_tar,
    "folder": write_files,
}


def plan(folder: str) -> dict[str, float]:
    """Plan `folder` in this process and return the measurements."""
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.monotonic()
    source = open_source(folder, DataConfig())
    listed = time.monotonic()
    shards = ledger.plan_shards(source.parts, 512)
    return {
        "rows": sum(shard.rows for shard in shards),
        "objects": len(source.parts),
        "shards": len(shards),
        "list_s": listed - started,
        "plan_s": time.monotonic() - listed,
        "idle_mb": idle,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Write the data, plan it in a child process, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/planning"))
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000, help="rows per object")
    parser.add_argument("--format", choices=list(WRITERS), default="parquet")
    parser.add_argument("--plan", metavar="DIR", help="only plan DIR and print the measurements as JSON")
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan(options.plan)))
        return
    folder = options.work / f"{options.format}-{options.objects}x{options.rows}"
    if not folder.exists():
        folder.mkdir(parents=True)
        for number in range(options.objects):
            WRITERS[options.format](folder, number, options.rows)
    command = [sys.executable, __file__, "--plan", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    print(
        f"{options.format}: {found['rows']:,} rows in {found['objects']:,} objects, {found['shards']:,} shards: "
        f"listed in {found['list_s']:.1f} s, planned in {found['plan_s']:.1f} s, peak memory "
        f"{found['peak_mb']:.0f} MB ({found['idle_mb']:.0f} MB before), {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
