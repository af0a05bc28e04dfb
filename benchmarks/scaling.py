"""How purify scales with workers when the denoiser takes a fixed time: the cost of the pipeline itself.

    python benchmarks/scaling.py --out runs/scaling                       1, 2, 4 and 8 workers, 10 s per shard
    python benchmarks/scaling.py --out runs/scaling --workers 1 --seconds 2

The denoiser is a stub that sleeps, so that two cores can hold eight workers; reading, decoding, encoding, the
ledger and Ray are the real ones. Rates are of the steady state, from the commit at which every worker can have
finished a shard to the last one; the time before it is reported as the start. `efficiency` is the rate divided by
the number of workers and by the rate of a bare loop that only calls the same stub.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from common import write_untrained

import eclipse_ray.purification.run as room
from eclipse_ray import verbs
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import canonical_table, table_to_parquet
from eclipse_ray.purification.stages import Outcome, Pixels, Purifier, Task
from eclipse_ray.storage.store import Store

SIDE, ROWS = 32, 64
SERVICE = "ECLIPSE_RAY_SCALING_SECONDS"


def stub(images: Sequence[Pixels]) -> dict[int, Outcome]:
    """Sleep for the service time of a shard, and return its images as they are."""
    time.sleep(float(os.environ[SERVICE]))
    return dict(enumerate(images))


class Sleeper(Purifier):
    """The actor of the pool with the stub for its denoiser; it still loads one, as the real actor does."""

    def _outcomes(self, task: Task, images: Sequence[Pixels], ids: Sequence[str]) -> dict[int, Outcome]:
        return stub(images)


def bare(shards: int) -> float:
    """Return shards per second of a loop around the stub."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    started = time.monotonic()
    for _ in range(shards):
        stub([image] * ROWS)
    return shards / (time.monotonic() - started)


def measure(folder: Path, workers: int, shards: int) -> dict[str, Any]:
    """Purify `shards` shards with `workers` workers on a cluster of this machine; return rates and the start."""
    output = folder / f"out-{workers}"
    write_source(folder / f"source-{workers}", shards)
    # One CPU per actor, and four for reading and encoding. They are logical CPUs, because the actors mostly sleep.
    ray.init(
        address="local", num_cpus=workers + 4, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    began, used = time.time(), time.process_time()
    verbs.purify(
        str(folder / f"source-{workers}"),
        str(output),
        denoiser=str(folder / "denoiser"),
        settings={"purify.shard_images": ROWS, "purify.actors": workers, "compensation.mode": "none"},
    )
    ended, used = time.time(), time.process_time() - used
    ray.shutdown()
    assert verbs.verify(str(output)).ok
    commits = sorted(path.stat().st_mtime for path in (output / "_eclipse/status").glob("*/*.json"))
    steady = commits[-1] - commits[workers - 1]
    return {
        "workers": workers,
        "shards": shards,
        "start_seconds": round(commits[0] - began, 1),
        "steady_seconds": round(steady, 1),
        "end_seconds": round(ended - commits[-1], 1),
        "shards_a_second": round((shards - workers) / steady, 4),
        "driver_cpu_seconds": round(used, 1),
    }


def write_source(folder: Path, shards: int) -> None:
    """Write one Parquet file per shard, with images that do not compress."""
    store, generator = Store(str(folder)), np.random.default_rng(0)
    for index in range(shards):
        images = generator.integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8)
        encoded = [encode_image(image, "png") for image in images]
        names = [f"{index:04d}-{row:04d}" for row in range(ROWS)]
        table: pa.Table = canonical_table(names, encoded, [0] * ROWS)
        store.write(f"{index:04d}.parquet", table_to_parquet(table))


def main() -> None:
    """Measure the bare loop and every number of workers; print one JSON object each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--seconds", type=float, default=10.0, help="service time of the stub for a shard")
    parser.add_argument("--rounds", type=int, default=8, help="shards per worker in the steady state")
    options = parser.parse_args()
    os.environ[SERVICE] = str(options.seconds)
    room.Purifier = Sleeper  # type: ignore[attr-defined]
    shutil.rmtree(options.out, ignore_errors=True)
    write_untrained(str(options.out / "denoiser"), {"denoiser.preset": "debug"})
    loop = bare(3)
    print(json.dumps({"bare_shards_a_second": round(loop, 4), "load": os.getloadavg()}), flush=True)
    for workers in map(int, options.workers.split(",")):
        found = measure(options.out, workers, (options.rounds + 1) * workers)
        found["efficiency"] = round(found["shards_a_second"] / (workers * loop), 4)
        print(json.dumps({**found, "load": os.getloadavg()}), flush=True)


if __name__ == "__main__":
    main()
