"""A sample of a large dataset reads a bounded part of it."""

from __future__ import annotations

import numpy as np
import pytest

from eclipse_ray.config import load_config
from eclipse_ray.datasets import memory
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.memory import load_sample, random_chunks, rows_in
from eclipse_ray.datasets.synthetic import write_synthetic

DATA = load_config().data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("many") / "set")
    write_synthetic(folder, 300, 16, 0)
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK_IMAGES", 10)
    monkeypatch.setattr(memory, "CANDIDATES", 3)


def test_a_sample_reads_no_more_chunks_than_it_needs(dataset, small_chunks, monkeypatch):
    read, whole = [], memory.read_parts

    def counted(url, format, classes, spans, data_config):
        read.append(rows_in(spans))
        return whole(url, format, classes, spans, data_config)

    monkeypatch.setattr(memory, "read_parts", counted)
    sample = load_sample(dataset, DATA, 20, seed=0)
    assert len(sample.ids) == 20
    # Labels first, then the chosen images: 3 times 20 rows, twice.
    assert sum(read) == 120


def test_chunks_are_chosen_by_seed_and_come_in_stored_order(dataset, small_chunks):
    parts = open_source(dataset, DATA).parts
    first, again, other = (random_chunks(parts, 20, seed) for seed in (0, 0, 1))
    assert first == again != other
    starts = [start for spans in first for _, start, _ in spans]
    assert starts == sorted(starts)
    everything = random_chunks(parts, 200, 0)
    assert sum(rows_in(spans) for spans in everything) == 300


def test_a_set_that_is_not_larger_is_taken_whole(dataset):
    sample = load_sample(dataset, DATA, 1000, seed=0)
    assert len(sample.ids) == 300
    assert np.array_equal(np.unique(sample.labels), np.arange(10))
