"""A layout gives back everything that it can hold and refuses everything else."""

import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.table import canonical_table, image_bytes
from eclipse_ray.datasets.write import convert, write_dataset
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
    assert image_bytes(table) == image_bytes(before)


def test_pixels_labels_and_classes_come_back_from_a_folder(tmp_path):
    source = put(tmp_path / "src", pixels(7), [0, 1, 2, 2, 1, 0, 1])
    convert(source, str(tmp_path / "out"), CONFIG, "folder")
    before, after = load_images(source, CONFIG), load_images(str(tmp_path / "out"), CONFIG)
    assert after.classes == CLASSES
    pairs = [sorted(zip(each.hashes(), each.labels.tolist(), strict=True)) for each in (before, after)]
    assert pairs[0] == pairs[1]


def test_unlabelled_sets_stay_unlabelled(tmp_path):
    source = put(tmp_path / "src", pixels(3), None, classes=None)
    for layout in ("folder", "webdataset", "npz"):
        convert(source, str(tmp_path / layout), CONFIG, layout)
        loaded = load_images(str(tmp_path / layout), CONFIG)
        assert (loaded.labels, loaded.classes) == (None, None)
        assert np.array_equal(loaded.images, pixels(3))


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
    ("layout", "extras", "words"),
    [
        ("folder", {"txt": ["a", "b"]}, "cannot hold the column 'txt'"),
        ("webdataset", {"weight": [1, 2]}, "column 'weight' (int64)"),
        ("webdataset", {"Txt": ["a", "b"]}, "column 'Txt' (string)"),
        ("webdataset", {"pkl": [b"a", b"b"]}, "column 'pkl' (binary)"),
        ("npz", {"tags": [["a"], ["b"]]}, "column 'tags'"),
        ("npz", {"n": [1, None]}, "column 'n' (int64, 1 empty)"),
        ("npz", {"x": [1, 2]}, "another meaning"),
    ],
)
def test_a_column_that_a_layout_cannot_hold_is_refused_unless_it_is_dropped(tmp_path, layout, extras, words):
    source = put(tmp_path / "src", pixels(2), [0, 1], extras=pa.table(extras))
    out = str(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        convert(source, out, CONFIG, layout)
    assert words in str(caught.value)
    # The refused call left nothing, so the same output can be used.
    convert(source, out, DataConfig(extra_columns="drop"), layout)
    assert load_images(out, CONFIG).images.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("layout", ["webdataset", "npz"])
def test_a_layout_that_cannot_hold_a_missing_label_refuses_it(tmp_path, layout):
    source = put(tmp_path / "src", pixels(2), [0, None])
    with pytest.raises(InputError, match=r"im/001\.png has no label"):
        convert(source, str(tmp_path / "out"), CONFIG, layout)


def test_arrays_need_images_of_one_size_that_can_be_decoded(tmp_path):
    mixed = canonical_table(["a", "b"], [encode_image(pixels(1, side)[0], "png") for side in (32, 31)])
    write_dataset(str(tmp_path / "mixed"), [mixed], classes=None, source="test")
    with pytest.raises(InputError, match="a is 32x32 and b is 31x31"):
        convert(str(tmp_path / "mixed"), str(tmp_path / "one"), CONFIG, "npz")
    broken = canonical_table(["a"], [b"nothing"])
    write_dataset(str(tmp_path / "broken"), [broken], classes=None, source="test")
    with pytest.raises(InputError, match="image a: not an image"):
        convert(str(tmp_path / "broken"), str(tmp_path / "two"), CONFIG, "npz")


@pytest.mark.parametrize("layout", ["npy", "pt", "pkl"])
def test_files_as_published_keep_pixels_labels_and_order_and_refuse_the_rest(tmp_path, layout):
    source = put(tmp_path / "src", pixels(5), [0, 1, 2, 2, 1])
    assert convert(source, str(tmp_path / "out"), CONFIG, layout) == 5
    loaded = load_images(str(tmp_path / "out"), CONFIG)
    assert np.array_equal(loaded.images, pixels(5))
    assert loaded.labels.tolist() == [0, 1, 2, 2, 1]
    assert loaded.classes == CLASSES
    source = put(tmp_path / "more", pixels(2), [0, 1], extras=pa.table({"txt": ["a", "b"]}))
    with pytest.raises(InputError, match="an array file cannot hold the column 'txt'"):
        convert(source, str(tmp_path / "refused"), CONFIG, layout)
    source = put(tmp_path / "half", pixels(2), [0, None])
    with pytest.raises(InputError, match="has no label"):
        convert(source, str(tmp_path / "half refused"), CONFIG, layout)
    one, other = (put(tmp_path / f"side {side}", pixels(1, side), [0], [f"{side}"]) for side in (16, 32))
    (tmp_path / "two").mkdir()
    for number, url in enumerate((one, other)):
        (file,) = (tmp_path / url / "data").iterdir()
        file.rename(tmp_path / "two" / f"{number}.parquet")
    with pytest.raises(InputError, match="differ in size"):
        convert(str(tmp_path / "two"), str(tmp_path / "two refused"), CONFIG, layout)


@pytest.mark.parametrize("ids", [["0.png", "1.png"], ["data/0.png", "data/1.png"], ["a/0.png", "b/1.png"]])
def test_images_without_labels_keep_their_folders(tmp_path, ids):
    source = put(tmp_path / "src", pixels(2), None, ids, classes=None)
    convert(source, str(tmp_path / "out"), CONFIG, "folder")
    assert [(tmp_path / "out" / name).is_file() for name in ids] == [True, True]
    loaded = load_images(str(tmp_path / "out"), CONFIG)
    assert (loaded.ids, loaded.labels) == (ids, None)
