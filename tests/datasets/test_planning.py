"""A plan is made from listings, footers and headers, never from images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import npz, parquet
from eclipse_ray.datasets.table import canonical_table, table_to_parquet
from eclipse_ray.ledger import plan_shards
from eclipse_ray.storage.store import Store

CONFIG = DataConfig()
NOISE = np.random.default_rng(0).bytes(1_000 * 700)


def test_no_column_chunk_of_parquet_is_read(tmp_path, ranges_read):
    for number in range(12):
        ids = [f"{number}-{row}" for row in range(700)]
        images = [NOISE[1000 * row : 1000 * (row + 1)] for row in range(700)]
        data = table_to_parquet(canonical_table(ids, images, [0] * 700))
        (tmp_path / f"{number:02d}.parquet").write_bytes(data)
    store = Store(str(tmp_path))
    entries = list(store.list())
    parts, _ = parquet.list_parts(store, entries, CONFIG)
    shards = plan_shards(parts, 512)
    assert sum(shard.rows for shard in shards) == 12 * 700
    for key, start, stop in ranges_read:
        metadata = pq.read_metadata(tmp_path / key)
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                first = min(p for p in (chunk.dictionary_page_offset, chunk.data_page_offset) if p is not None)
                assert stop <= first or start >= first + chunk.total_compressed_size, chunk.path_in_schema
    read = sum(stop - start for _, start, stop in ranges_read)
    assert 0 < read < 0.01 * sum(entry.size for entry in entries)


def test_no_image_of_an_archive_is_read(tmp_path, ranges_read):
    images = np.zeros((400, 40, 40, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.zeros(400, int))
    store = Store(str(tmp_path))
    parts, _ = npz.list_parts(store, list(store.list()), CONFIG)
    assert parts[0].rows == 400
    assert sum(stop - start for _, start, stop in ranges_read) < 0.05 * images.nbytes


@pytest.mark.parametrize("format", ["parquet", "webdataset", "folder"])
def test_the_benchmark_runs(tmp_path, format):
    script = Path(__file__).parents[2] / "benchmarks" / "planning.py"
    command = [sys.executable, script, "--work", tmp_path, "--format", format, "--objects", "5", "--rows", "40"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "200 rows" in done.stdout
