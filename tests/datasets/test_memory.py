"""A sample of a large dataset reads a bounded part of it."""

import numpy as np
import pytest

from eclipse_ray.config import content_hash, load_config
from eclipse_ray.datasets import memory
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.memory import load_images, load_sample, load_squares, random_chunks, rows_in
from eclipse_ray.datasets.synthetic import write_synthetic
from eclipse_ray.errors import InputError
from tests.datasets.helpers import fill

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

    def counted(source, spans):
        read.append(rows_in(spans))
        return whole(source, spans)

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


def test_squares_are_the_middle_of_chosen_images_and_every_content_is_known(dataset):
    whole = load_images(dataset, DATA)
    squares, known = load_squares(dataset, DATA, 8, 100, seed=0)
    assert (len(squares.ids), squares.images.shape[1:]) == (100, (8, 8, 3))
    places = [whole.ids.index(name) for name in squares.ids]
    assert np.array_equal(squares.images, whole.images[places][:, 4:12, 4:12])
    assert np.array_equal(squares.labels, whole.labels[places])
    assert squares.stored == [whole.stored[place] for place in places]
    assert known.keys() == set(whole.stored)
    assert sum(len(labels) for labels in known.values()) == 300


def test_squares_leave_out_what_is_broken_or_too_small(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 12, 3), np.uint8)
    fill(tmp_path, "a/wide.png", "b/small.png", "b/broken.png", images=[images[0], images[1][:9], images[2]])
    (tmp_path / "b/broken.png").write_bytes((tmp_path / "b/broken.png").read_bytes()[:60])
    squares, known = load_squares(str(tmp_path), DATA, 10, 100, seed=0)
    assert np.array_equal(squares.images, images[:1, 5:15, 1:11])
    assert known == {content_hash(images[0]): [0], content_hash(images[1][:9]): [1]}
    with pytest.raises(InputError, match="no image has 13x13 pixels"):
        load_squares(str(tmp_path), DATA, 13, 100, seed=0)
