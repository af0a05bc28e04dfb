"""What one layout holds, it gives back; what it cannot hold, it refuses."""

import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray import verbs
from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import load_images, write_dataset
from eclipse_ray.datasets.table import canonical_table, image_bytes
from eclipse_ray.datasets.transform import convert
from eclipse_ray.errors import InputError

CONFIG = DataConfig()
CLASSES = ["zebra", "a/b", ".dot"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9).filter(lambda text: not text.endswith("\0"))


def pixels(count, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def put(url, images, labels, ids=None, extras=None, classes=CLASSES):
    ids = [f"im/{n:03d}.png" for n in range(len(images))] if ids is None else ids
    table = canonical_table(ids, [encode_image(each, "png") for each in images], labels, extras, classes)
    write_dataset(str(url), [table], classes=classes, source="test")
    return str(url)


def read_all(url):
    source = open_source(url, CONFIG)
    return source, pa.concat_tables(read_tables(source, CONFIG))


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(TEXT, min_size=1, max_size=9, unique=True),
    layout=st.sampled_from(["parquet", "webdataset", "npz"]),
    data=st.data(),
)
def test_everything_comes_back(tmp_path_factory, ids, layout, data):
    folder = tmp_path_factory.mktemp("layout")
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(ids), max_size=len(ids)))
    captions = data.draw(st.lists(TEXT, min_size=len(ids), max_size=len(ids)))
    source = put(folder / "src", pixels(len(ids), 4), labels, ids, pa.table({"txt": captions}))
    assert convert(source, str(folder / "out"), CONFIG, layout) == len(ids)
    opened, table = read_all(str(folder / "out"))
    _, before = read_all(source)
    assert opened.format == layout
    assert opened.classes == CLASSES
    assert table.drop_columns("image").equals(before.drop_columns("image"))
    assert np.array_equal(load_images(str(folder / "out"), CONFIG).images, pixels(len(ids), 4))
    if layout == "webdataset":
        assert image_bytes(table) == image_bytes(before)


@pytest.mark.parametrize("layout", ["folder", "cifar"])
def test_pixels_labels_and_classes_come_back(tmp_path, layout):
    source = put(tmp_path / "src", pixels(7), [0, 1, 2, 2, 1, 0, 1])
    convert(source, str(tmp_path / "out"), CONFIG, layout)
    before, after = load_images(source, CONFIG), load_images(str(tmp_path / "out"), CONFIG)
    assert after.classes == CLASSES
    pairs = [sorted(zip(each.hashes(), each.labels.tolist(), strict=True)) for each in (before, after)]
    assert pairs[0] == pairs[1]


def test_unlabelled_sets_stay_unlabelled(tmp_path):
    source = put(tmp_path / "src", pixels(3), None, classes=None)
    for layout in ("folder", "webdataset", "npz", "cifar"):
        convert(source, str(tmp_path / layout), CONFIG, layout)
        loaded = load_images(str(tmp_path / layout), CONFIG)
        assert (loaded.labels, loaded.classes) == (None, None)
        assert np.array_equal(loaded.images, pixels(3))


@pytest.mark.parametrize("encoding", ["bytes", "latin1"])
def test_cifar_batches_are_what_their_readers_expect(tmp_path, encoding):
    source = put(
        tmp_path / "src", pixels(5), [0, 1, 2, 0, 1], extras=pa.table({"coarse_label": [3, 300, -1, 0, 2]})
    )
    convert(source, str(tmp_path / "hundred"), CONFIG, "cifar")
    convert(source, str(tmp_path / "ten"), DataConfig(extra_columns="drop"), "cifar")

    def load(*path):
        with tmp_path.joinpath(*path).open("rb") as file:
            found = pickle.load(file, encoding=encoding)
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}

    batch = load("ten", "data_batch_1")
    assert list(batch) == ["batch_label", "data", "labels", "filenames"]
    assert batch["data"].dtype == np.uint8
    assert np.array_equal(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), pixels(5))
    assert batch["labels"] == [0, 1, 2, 0, 1]
    assert len(load("ten", "batches.meta")["label_names"]) == 3
    train = load("hundred", "train")
    assert train["fine_labels"] == [0, 1, 2, 0, 1]
    assert train["coarse_labels"] == [3, 300, -1, 0, 2]
    assert len(load("hundred", "meta")["fine_label_names"]) == 3
    _, table = read_all(str(tmp_path / "hundred"))
    assert table["coarse_label"].to_pylist() == [3, 300, -1, 0, 2]


def test_tars_are_what_their_readers_expect(tmp_path):
    source = put(
        tmp_path / "src", pixels(3), [0, 1, 2], ["a", "b c", "d.e/f"], pa.table({"txt": ["x", None, "z"]})
    )
    convert(source, str(tmp_path / "out"), CONFIG, "webdataset")
    with tarfile.open(tmp_path / "out" / "part-00000.tar") as archive:
        names = archive.getnames()
        content = {name: archive.extractfile(name).read() for name in names}
    assert names == [
        "a.png", "a.cls", "a.txt", "b%20c.png", "b%20c.cls", "d%2Ee/f.png", "d%2Ee/f.cls", "d%2Ee/f.txt",
    ]  # fmt: skip
    assert content["b%20c.cls"] == b"1"
    assert content["d%2Ee/f.txt"] == b"z"


@pytest.mark.parametrize(
    ("layout", "extras", "labels", "side", "words"),
    [
        ("folder", {"txt": ["a", "b"]}, [0, 1], 32, "cannot hold the column 'txt'"),
        ("webdataset", {"weight": [1, 2]}, [0, 1], 32, "column 'weight' (int64)"),
        ("webdataset", {"Txt": ["a", "b"]}, [0, 1], 32, "column 'Txt' (string)"),
        ("webdataset", {"pkl": [b"a", b"b"]}, [0, 1], 32, "column 'pkl' (binary)"),
        ("webdataset", {}, [0, None], 32, "im/001.png has no label"),
        ("npz", {"tags": [["a"], ["b"]]}, [0, 1], 32, "column 'tags'"),
        ("npz", {"n": [1, None]}, [0, 1], 32, "column 'n' (int64, 1 empty)"),
        ("npz", {"x": [1, 2]}, [0, 1], 32, "another meaning"),
        ("npz", {}, [0, None], 32, "im/001.png has no label"),
        ("cifar", {"txt": ["a", "b"]}, [0, 1], 32, "cannot hold the column 'txt'"),
        ("cifar", {"coarse_label": [0.5, 1.5]}, [0, 1], 32, "cannot hold the column 'coarse_label'"),
        ("cifar", {}, [0, 1], 16, "--resize 32"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_and_leaves_nothing(tmp_path, layout, extras, labels, side, words):
    source = put(tmp_path / "src", pixels(2, side), labels, extras=pa.table(extras) if extras else None)
    out = str(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        convert(source, out, CONFIG, layout)
    assert words in str(caught.value)
    if None not in labels and side == 32 and "x" not in extras:
        convert(source, out, DataConfig(extra_columns="drop"), layout)
        assert load_images(out, CONFIG).images.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("layout", ["npz", "cifar"])
def test_arrays_need_images_of_one_size_that_can_be_decoded(tmp_path, layout):
    mixed = canonical_table(["a", "b"], [encode_image(pixels(1, side)[0], "png") for side in (32, 31)])
    write_dataset(str(tmp_path / "mixed"), [mixed], classes=None, source="test")
    with pytest.raises(InputError, match="a is 32x32 and b is 31x31"):
        convert(str(tmp_path / "mixed"), str(tmp_path / "one"), CONFIG, layout)
    broken = canonical_table(["a"], [b"nothing"])
    write_dataset(str(tmp_path / "broken"), [broken], classes=None, source="test")
    with pytest.raises(InputError, match="image a: not an image"):
        convert(str(tmp_path / "broken"), str(tmp_path / "two"), CONFIG, layout)


def test_many_cifar_images_fill_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("eclipse_ray.datasets.cifar_writer._BATCH_IMAGES", 3)
    source = put(tmp_path / "src", pixels(8), [0, 1, 2, 0, 1, 2, 0, 1])
    result = verbs.convert(source, str(tmp_path / "out"), layout="cifar")
    assert result.images == 8
    assert [part.rows for part in open_source(str(tmp_path / "out"), CONFIG).parts] == [3, 3, 2]
    assert np.array_equal(load_images(str(tmp_path / "out"), CONFIG).images, pixels(8))
