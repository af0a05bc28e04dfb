"""The cost of the ledger: its share of the time of a shard, and the memory and listings of a long run.

    python benchmarks/ledger.py --out runs/ledger                       both parts, on a local disk
    python benchmarks/ledger.py --out s3://bucket/run --parts overhead  only the ledger, on any store
    python benchmarks/ledger.py --out runs/ledger --parts soak --rows 200000 --shards 1000

`overhead` makes the ledger calls of workers for 200 shards and compares their time with shards of 10 s; it fails
above 3 %. `soak` purifies with a tiny denoiser on Ray; it fails above 50 MB of memory growth or 20 listings.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import write_untrained

from eclipse_ray import ledger, verbs
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import Part, canonical_table, table_to_parquet
from eclipse_ray.storage.store import Entry, Store

SHARDS, SHARD_SECONDS, SHARD_BYTES = 200, 10.0, 4 * 2**20
MAX_GROWTH = 50 * 10**6
OBJECTS = 20
SIDE = 16


def overhead(url: str, rows: int, shards: int) -> dict[str, Any]:
    """Measure plan, attempts, commits and end of a run of 200 shards of 4 MiB, one shard after another."""
    store = Store(f"{url}/overhead")
    parts = [Part(f"{index:05d}.parquet", 512, 1, "v1") for index in range(SHARDS)]
    data = _object(512)
    started = time.perf_counter()
    plan = ledger.plan_source(store, parts, 512, None)
    fingerprint = ledger.Fingerprint({}, "", ledger.plan_digest(plan.base), 0)
    ledger.open_run(store, plan, fingerprint, "")
    opened = time.perf_counter() - started
    started = time.perf_counter()
    for shard in plan.shards:
        for stage in ("decode", "purify"):
            ledger.begin(store, shard.name, 0, stage)
        ledger.commit_shard(store, shard, ok=data, ok_count=512, errors=[], input_sha256="0", seconds=0)
    each = (time.perf_counter() - started) / SHARDS
    started = time.perf_counter()
    ledger.finalise(store)
    ended = time.perf_counter() - started
    total = each + (opened + ended) / SHARDS
    return {
        "shards": SHARDS,
        "object_bytes": len(data),
        "open_seconds": opened,
        "commit_seconds_a_shard": each,
        "finalise_seconds": ended,
        "share_of_a_10_s_shard": total / SHARD_SECONDS,
    }


def _object(rows: int) -> bytes:
    # All images differ, because Parquet would store equal ones once.
    generator = np.random.default_rng(0)
    images = [generator.bytes(SHARD_BYTES // rows) for _ in range(rows)]
    return table_to_parquet(canonical_table([str(row) for row in range(rows)], images))


def soak(url: str, rows: int, shards: int) -> dict[str, Any]:
    """Purify `rows` tiny images in `shards` shards and measure the driver's memory and listing calls."""
    listings = _count_listings()
    with tempfile.TemporaryDirectory() as folder:
        source, denoiser = str(Path(folder) / "source"), str(Path(folder) / "denoiser")
        _write_source(source, rows)
        write_untrained(denoiser, {"denoiser.preset": "debug"})
        memory = Memory()
        started = time.perf_counter()
        result = verbs.purify(
            source,
            f"{url}/soak",
            denoiser=denoiser,
            settings={"purify.shard_images": rows // shards, "compensation.mode": "none"},
        )
        seconds = time.perf_counter() - started
        growth = memory.stop()
    checked = verbs.verify(f"{url}/soak")
    return {
        "rows": rows,
        "shards": verbs.status(f"{url}/soak").shards,
        "ok": result.ok,
        "verified": checked.ok,
        "seconds": seconds,
        "driver_growth_bytes": growth,
        "listing_calls": listings(),
    }


class Memory:
    """Samples the memory of this process once per second."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append(pages * resource.getpagesize())

    def stop(self) -> int:
        """Return the growth in bytes from the end of the first tenth of the run to the largest sample."""
        self.done.set()
        self.thread.join()
        first = len(self.seen) // 10
        return max(self.seen[first:]) - self.seen[first]


def _count_listings() -> Callable[[], int]:
    calls = 0
    genuine = Store.list

    def counted(self: Store, prefix: str = "", hidden: bool = False) -> Iterator[Entry]:
        nonlocal calls
        calls += 1
        return genuine(self, prefix, hidden)

    Store.list = counted  # type: ignore[method-assign]
    return lambda: calls


def _write_source(folder: str, rows: int) -> None:
    store, each = Store(folder), rows // OBJECTS
    generator = np.random.default_rng(0)
    images = [encode_image(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), "png") for _ in range(64)]
    for index in range(OBJECTS):
        names = [f"{index:03d}-{row:06d}" for row in range(each)]
        table: pa.Table = canonical_table(names, [images[row % 64] for row in range(each)], [0] * each)
        store.write(f"{index:03d}.parquet", table_to_parquet(table))


PARTS: dict[str, Callable[[str, int, int], dict[str, Any]]] = {"overhead": overhead, "soak": soak}


def main() -> None:
    """Run the chosen parts, print one JSON object per part, and fail if a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/ledger", help="folder or URL that may be overwritten")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=1000)
    options = parser.parse_args()
    if Store(options.out).local:
        shutil.rmtree(options.out, ignore_errors=True)
    found = {name: PARTS[name](options.out, options.rows, options.shards) for name in options.parts.split(",")}
    for name, figures in found.items():
        print(json.dumps({"part": name, **figures}))
    if "overhead" in found and found["overhead"]["share_of_a_10_s_shard"] > 0.03:
        sys.exit("the ledger takes more than 3 % of a shard of 10 s")
    if "soak" in found:
        soaked = found["soak"]
        # Plan, resume, clean-up, manifest, its check, status and verify each list a fixed number of folders.
        if soaked["driver_growth_bytes"] > MAX_GROWTH or soaked["listing_calls"] > 20 or not soaked["verified"]:
            sys.exit("the soak broke a bound: see driver_growth_bytes, listing_calls and verified")


if __name__ == "__main__":
    main()
