import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig, content_hash
from eclipse_ray.datasets import folder, parquet
from eclipse_ray.datasets.formats import open_source, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import load_images, load_mixed, require_classes
from eclipse_ray.datasets.table import canonical_table
from eclipse_ray.datasets.write import write_dataset
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

CONFIG = DataConfig()
CLASSES = ["zebra", "a/b", ".dot"]


def images(count, seed=0, size=4):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def table(pixels, labels=None, ids=None, classes=None):
    names = [f"im/{n:03d}" for n in range(len(pixels))] if ids is None else ids
    return canonical_table(names, [encode_image(p, "png") for p in pixels], labels, classes=classes)


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    cuts=st.integers(1, 5),
    layout=st.sampled_from(["parquet", "folder"]),
)
def test_what_is_written_loads_again(tmp_path_factory, labels, cuts, layout):
    url = str(tmp_path_factory.mktemp("set"))
    pixels = images(len(labels))
    whole = table(pixels, labels)
    pieces = [whole.slice(start, cuts) for start in range(0, len(labels), cuts)]
    assert write_dataset(url, pieces, classes=CLASSES, source="test", layout=layout) == len(labels)
    loaded = load_images(url, CONFIG)
    assert loaded.classes == CLASSES
    written = sorted((content_hash(p), label) for p, label in zip(pixels, labels, strict=True))
    assert sorted(zip(loaded.hashes(), loaded.labels.tolist(), strict=True)) == written


def test_parquet_keeps_the_order(tmp_path):
    pixels = images(9)
    whole = table(pixels, [2, 0, 1] * 3)
    write_dataset(str(tmp_path), [whole.slice(0, 4), whole.slice(4)], classes=CLASSES, source="test")
    loaded = load_images(str(tmp_path), CONFIG)
    assert loaded.ids == whole["id"].to_pylist()
    assert np.array_equal(loaded.images, pixels)


def test_limit_takes_the_first(tmp_path):
    pixels = images(9)
    write_dataset(str(tmp_path), [table(pixels)], classes=None, source="test")
    loaded = load_images(str(tmp_path), CONFIG, limit=4)
    assert np.array_equal(loaded.images, pixels[:4])
    assert loaded.labels is None
    assert len(loaded.ids) == len(loaded.hashes()) == 4
    assert len(load_images(str(tmp_path), CONFIG, limit=400).ids) == 9
    with pytest.raises(InputError, match="no images"):
        load_images(str(tmp_path), CONFIG, limit=0)


def test_bad_sets_are_refused_by_name(tmp_path):
    def refused(name, *tables, classes=None, read=lambda url: load_images(url, CONFIG)):
        url = str(tmp_path / name)
        write_dataset(url, tables, classes=classes, source="test")
        with pytest.raises(InputError) as caught:
            read(url)
        return str(caught.value)

    def labelled(url):
        return require_classes(url, open_source(url, CONFIG), CONFIG)

    sizes = refused("a", table(images(1)), table(images(1, size=5), ids=["big"]))
    assert "im/000 is 4x4 and big is 5x5" in sizes
    assert "image bad: not an image" in refused("b", canonical_table(["bad"], [b"<html>"]))
    assert "id im/000 occurs more than once" in refused("c", table(images(1)), table(images(1)))
    assert "has no labels" in refused("d", table(images(1)), read=labelled)
    half = refused("e", table(images(2), [1, None]), read=labelled)
    assert "row 1 of data/part-00000.parquet has no label" in half
    beyond = refused("f", table(images(2), [1, 3]), classes=CLASSES, read=labelled)
    assert "label 3 is out of range, there are 3 classes" in beyond


def test_a_missing_label_is_minus_one(tmp_path):
    write_dataset(str(tmp_path), [table(images(2), [1, None])], classes=None, source="test")
    assert load_images(str(tmp_path), CONFIG).labels.tolist() == [1, -1]


def test_files_are_bounded(tmp_path):
    store = Store(str(tmp_path))
    whole = table(images(10), [0] * 10)
    assert parquet.write(store, [whole.slice(0, 7), whole.slice(7)], max_images=4) == 10
    files = [entry.key for entry in store.list()]
    assert files == [f"data/part-{n:05d}.parquet" for n in range(3)]
    assert [pq.read_metadata(tmp_path / file).num_rows for file in files] == [4, 4, 2]
    other = Store(str(tmp_path / "other"))
    parquet.write(other, [whole.slice(n, 1) for n in range(10)], max_bytes=1)
    assert len(list(other.list())) == 10


def test_nothing_is_written_over(tmp_path):
    write_dataset(str(tmp_path / "a"), [table(images(1))], classes=None, source="test")
    note = json.loads((tmp_path / "a" / "_eclipse" / "dataset.json").read_text())
    assert note == {"images": 1, "classes": None, "source": "test", "labelled": False}
    with pytest.raises(InputError, match=r"already holds data \(data/part-00000"):
        write_dataset(str(tmp_path / "a"), [], classes=None, source="test")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        write_dataset(str(tmp_path / "file"), [], classes=None, source="test")


def test_an_interrupted_write_is_seen(tmp_path):
    def tables():
        yield table(images(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path), tables(), classes=None, source="test")
    (tmp_path / "data").mkdir(exist_ok=True)
    with pytest.raises(InputError, match="interrupted"):
        open_source(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match="interrupted"):
        write_dataset(str(tmp_path), [], classes=None, source="test")


def test_folder_keeps_bytes_and_names(tmp_path):
    jpeg = encode_image(images(1, size=16)[0], "jpeg:80")
    ids = ["zebra/x.JPG", "data#1", "a/b/y.png"]
    rows = canonical_table(ids, [jpeg, jpeg, b"broken"], [0, 2, 1])
    assert folder.write(Store(str(tmp_path)), [rows], classes=CLASSES) == 3
    files = {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {"zebra/x.JPG": jpeg, "%2Edot/data#1.jpg": jpeg, "a%2Fb/a%2Fb%2Fy.png": b"broken"}


def test_folder_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(InputError, match="named like"):
        folder.write(Store(str(tmp_path / "a")), [table(images(2), ids=["x", "x.png"])])
    with pytest.raises(InputError, match="has no label"):
        folder.write(Store(str(tmp_path / "b")), [table(images(2), [0, None])])


def test_unnamed_labels_keep_their_order(tmp_path):
    write_dataset(str(tmp_path), [table(images(3), [10, 2, 10])], classes=None, source="t", layout="folder")
    (rows,) = read_tables(open_source(str(tmp_path), CONFIG), CONFIG)
    assert rows["label"].to_pylist() == [0, 1, 1]


def test_images_of_several_sizes_load_into_one_buffer(tmp_path):
    pixels = [images(1, seed, 4 + seed)[0][:, :3] for seed in range(3)]
    write_dataset(str(tmp_path), [table(pixels)], classes=None, source="test")
    loaded = load_mixed(str(tmp_path), CONFIG)
    assert loaded.sizes.tolist() == [[4, 3], [5, 3], [6, 3]]
    assert np.array_equal(loaded.pixels, np.concatenate([image.reshape(-1) for image in pixels]))
    assert loaded.hashes == [content_hash(image) for image in pixels]
    resized = load_mixed(str(tmp_path), DataConfig(resize=16))
    assert resized.sizes.tolist() == [[16, 16]] * 3
    # Leakage is checked on the images as stored, whatever size is used for training.
    assert resized.hashes == loaded.hashes


def test_ids_too_long_for_a_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="too long to name a file"):
        folder.write(Store(str(tmp_path)), [table(images(1), ids=["x" * 300])])


def test_folders_written_by_others_may_look_escaped(tmp_path):
    for name in ("100%", "a%2Fb", "plain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encode_image(images(1)[0], "png"))
    loaded = load_images(str(tmp_path), CONFIG)
    assert loaded.classes == ["100%", "a%2Fb", "plain"]
    assert loaded.labels.tolist() == [0, 1, 2]
