import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig, content_hash
from eclipse_ray.datasets import folder, parquet
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import load_images, load_mixed, require_classes
from eclipse_ray.datasets.table import canonical_table
from eclipse_ray.datasets.write import write_dataset
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import CONFIG, fill, noise, read_all, table_of, write_set

CLASSES = ["zebra", "a/b", ".dot"]


@settings(max_examples=25)
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    cuts=st.integers(1, 5),
    layout=st.sampled_from(["parquet", "folder"]),
)
def test_what_is_written_loads_again(tmp_path_factory, labels, cuts, layout):
    url = str(tmp_path_factory.mktemp("set"))
    pixels = noise(len(labels), 4)
    whole = table_of(pixels, labels)
    pieces = [whole.slice(start, cuts) for start in range(0, len(labels), cuts)]
    assert write_dataset(url, pieces, classes=CLASSES, source="test", layout=layout) == len(labels)
    loaded = load_images(url, CONFIG)
    assert loaded.classes == CLASSES
    written = sorted((content_hash(p), label) for p, label in zip(pixels, labels, strict=True))
    assert sorted(zip(loaded.hashes(), loaded.labels.tolist(), strict=True)) == written


def test_images_keep_their_order_and_a_limit_takes_the_first(tmp_path):
    pixels = noise(9, 4)
    whole = table_of(pixels)
    write_set(tmp_path, whole.slice(0, 4), whole.slice(4))
    for limit, count in ((None, 9), (5, 5), (400, 9)):
        loaded = load_images(str(tmp_path), CONFIG, limit=limit)
        assert (loaded.ids, loaded.labels) == (whole["id"].to_pylist()[:count], None)
        assert np.array_equal(loaded.images, pixels[:count])
        assert loaded.hashes() == [content_hash(image) for image in pixels[:count]]
    with pytest.raises(InputError, match="no images"):
        load_images(str(tmp_path), CONFIG, limit=0)


SMALL = table_of(noise(1, 4))
UNREADABLE = {
    "sizes": ([SMALL, table_of(noise(1, 5), ids=["big"])], "im/000 is 4x4 and big is 5x5"),
    "damage": ([canonical_table(["bad"], [b"<html>"])], "image bad: not an image"),
    "ids": ([SMALL, SMALL], "id im/000 occurs more than once"),
}
UNLABELLED = {
    "none": ([SMALL], "has no labels"),
    "half": ([table_of(noise(2, 4), [1, None])], "row 1 of data/part-00000.parquet has no label"),
    "minus one": ([table_of(noise(2, 4), [-1, 1])], "row 0 of data/part-00000.parquet has no label"),
    "both": ([table_of(noise(2, 4), [None, -1])], r"has no labels .*data\.labels=FILE"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_sets_that_cannot_be_loaded_are_refused_by_name(tmp_path, name):
    tables, words = UNREADABLE[name]
    with pytest.raises(InputError, match=words):
        load_images(write_set(tmp_path, *tables), CONFIG)


@pytest.mark.parametrize("name", UNLABELLED)
def test_sets_whose_labels_are_needed_are_refused_by_name(tmp_path, name):
    tables, words = UNLABELLED[name]
    url = write_set(tmp_path, *tables)
    with pytest.raises(InputError, match=words):
        require_classes(url, open_source(url, CONFIG))


def test_a_missing_label_is_minus_one(tmp_path):
    write_dataset(str(tmp_path), [table_of(noise(2, 4), [1, None])], classes=None, source="test")
    assert load_images(str(tmp_path), CONFIG).labels.tolist() == [1, -1]


def test_files_are_bounded(tmp_path):
    store = Store(str(tmp_path))
    whole = table_of(noise(10, 4), [0] * 10)
    assert parquet.write(store, [whole.slice(0, 7), whole.slice(7)], max_images=4) == 10
    files = [entry.key for entry in store.list()]
    assert files == [f"data/part-{n:05d}.parquet" for n in range(3)]
    assert [pq.read_metadata(tmp_path / file).num_rows for file in files] == [4, 4, 2]
    other = Store(str(tmp_path / "other"))
    parquet.write(other, [whole.slice(n, 1) for n in range(10)], max_bytes=1)
    assert len(list(other.list())) == 10


def test_nothing_is_written_over(tmp_path):
    url = write_set(tmp_path / "a", SMALL)
    note = json.loads((tmp_path / "a" / "_eclipse" / "dataset.json").read_text())
    assert note == {"images": 1, "classes": None, "source": "test", "labelled": False}
    (tmp_path / "file").touch()
    for full, words in ((url, r"already holds data \(data/part-00000"), (tmp_path / "file", "is a file")):
        with pytest.raises(InputError, match=words):
            write_set(full)


def test_folder_keeps_bytes_and_names(tmp_path):
    jpeg = encode_image(noise(1, 16)[0], "jpeg:80")
    ids = ["zebra/x.JPG", "data#1", "a/b/y.png"]
    rows = canonical_table(ids, [jpeg, jpeg, b"broken"], [0, 2, 1])
    assert folder.write(Store(str(tmp_path)), [rows], classes=CLASSES) == 3
    files = {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {"zebra/x.JPG": jpeg, "%2Edot/data#1.jpg": jpeg, "a%2Fb/a%2Fb%2Fy.png": b"broken"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (table_of(noise(2, 4), ids=["x", "x.png"]), "named like"),
        (table_of(noise(2, 4), [0, None]), "has no label"),
        (table_of(noise(1, 4), ids=["x" * 300]), "too long to name a file"),
    ],
)
def test_folder_refuses_what_it_cannot_hold(tmp_path, rows, words):
    with pytest.raises(InputError, match=words):
        folder.write(Store(str(tmp_path)), [rows])


def test_unnamed_labels_keep_their_order(tmp_path):
    write_set(tmp_path, table_of(noise(3, 4), [10, 2, 10]), layout="folder")
    assert read_all(tmp_path)["label"].to_pylist() == [0, 1, 1]


def test_images_of_several_sizes_load_into_one_buffer(tmp_path):
    pixels = [noise(1, 4 + seed, seed=seed)[0][:, :3] for seed in range(3)]
    write_set(tmp_path, table_of(pixels))
    loaded = load_mixed(str(tmp_path), CONFIG)
    assert loaded.sizes.tolist() == [[4, 3], [5, 3], [6, 3]]
    assert np.array_equal(loaded.pixels, np.concatenate([image.reshape(-1) for image in pixels]))
    assert loaded.hashes == [content_hash(image) for image in pixels]
    resized = load_mixed(str(tmp_path), DataConfig(resize=16))
    assert resized.sizes.tolist() == [[16, 16]] * 3
    # Leakage is checked on the images as stored, whatever size is used for training.
    assert resized.hashes == loaded.hashes


def test_folders_written_by_others_may_look_escaped(tmp_path):
    names = ["100%", "a%2Fb", "plain"]
    loaded = load_images(fill(tmp_path, *(f"{name}/x.png" for name in names)), CONFIG)
    assert (loaded.classes, loaded.labels.tolist()) == (names, [0, 1, 2])
