"""Number of requests to an object store per shard, and per run in addition to its shards.

    python benchmarks/shard_requests.py

Calls the stages and the ledger as workers and driver do, without Ray, against moto (an S3 server in this process).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from aiobotocore.client import AioBaseClient
from moto.server import ThreadedMotoServer

from eclipse_ray import ledger
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import canonical_table, table_to_parquet
from eclipse_ray.parameters import resolve
from eclipse_ray.purification.stages import (
    BUSY_COLUMN,
    CHANGE_COLUMNS,
    Job,
    Task,
    encode_and_commit,
    pack,
    read_and_decode,
    task_rows,
    unpack,
)
from eclipse_ray.storage.store import Store

ROWS, SIDE = 512, 32


@contextmanager
def counted() -> Iterator[collections.Counter[str]]:
    """Count the requests of all clients of this process by name."""
    found: collections.Counter[str] = collections.Counter()
    genuine = AioBaseClient._make_api_call

    async def call(self: Any, operation: str, parameters: Any) -> Any:
        found[operation] += 1
        return await genuine(self, operation, parameters)

    AioBaseClient._make_api_call = call
    try:
        yield found
    finally:
        AioBaseClient._make_api_call = genuine


def purify_one(job: Job, task: Task) -> None:
    """Run the three stages of a shard with a denoiser that changes nothing."""
    decoded = read_and_decode(task_rows([task])[0], job)
    ledger.begin(job.store(), task.shard.name, 0, job.stage("purify"))
    table, images, failures = unpack(decoded)
    for name in CHANGE_COLUMNS:
        table = table.append_column(f".{name}", pa.nulls(len(images), pa.float32()))
    columns = {name: decoded[name].to_pylist() for name in ("task", "input_sha256", "order", "seconds")}
    columns[BUSY_COLUMN] = [0.0]
    found = encode_and_commit(pack(columns, table, images, failures), job).to_pylist()[0]
    assert (found["ok"], found["fatal"]) == (ROWS, ""), found


def job_for(source: str, output: str) -> Job:
    """Return the job of a purification with default settings."""
    config = resolve(None, None, {"purify.shard_images": ROWS})
    opened = open_source(source, config.data)
    return Job(
        source=replace(opened, parts=(), classes=None),
        output=output,
        denoiser="",
        purify=config.purify,
        seed=0,
        compensation=config.compensation,
        sparse_hashes=frozenset(),
        session="00000000",
    )


def main() -> None:
    """Purify some shards and print the requests of the plan, one shard, a resume and the end of the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=8)
    shards = parser.parse_args().shards
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    os.environ["HOME"] = tempfile.mkdtemp()
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")).close()
    store, generator = Store("s3://bucket/source"), np.random.default_rng(0)
    for index in range(shards):
        images = generator.integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8)
        names = [f"{index}-{row}" for row in range(ROWS)]
        table = canonical_table(names, [encode_image(image, "png") for image in images], [0] * ROWS)
        store.write(f"{index:03d}.parquet", table_to_parquet(table))
    steps: dict[str, collections.Counter[str]] = {}
    with counted() as steps["plan and claim"]:
        job = job_for("s3://bucket/source", "s3://bucket/output")
        source = open_source(job.source.url, job.source.data)
        plan = ledger.plan_source(job.store(), source.parts, ROWS, None)
        ledger.open_run(job.store(), plan, ledger.Fingerprint({}, "", ledger.plan_digest(plan.base), 0), "")
    with counted() as steps["one shard"]:
        purify_one(job, Task(plan.shards[0]))
    for shard in plan.shards[1:]:
        purify_one(job, Task(shard))
    with counted() as steps[f"statuses of {shards} shards, as a resume reads them"]:
        ledger.read_statuses(job.store())
    with counted() as steps[f"end of a run of {shards} shards"]:
        ledger.finalise(job.store())
    for name, found in steps.items():
        print(json.dumps({"step": name, "requests": sum(found.values()), **dict(sorted(found.items()))}))
    manifest = store_bytes(job.store())
    print(json.dumps({"plan_and_manifest_bytes_a_shard": round(manifest / shards)}))
    server.stop()


def store_bytes(store: Store) -> int:
    """Return the size of plan and manifest in bytes."""
    return sum(len(store.read(f"_eclipse/{name}.parquet")) for name in ("plan", "manifest"))


if __name__ == "__main__":
    main()
