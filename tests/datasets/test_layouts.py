"""A layout gives back everything that it can hold and refuses everything else."""

import tarfile

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.table import canonical_table, image_bytes
from eclipse_ray.datasets.write import convert, write_dataset
from eclipse_ray.errors import InputError
from tests.datasets.helpers import CONFIG, noise, read_all, table_of, write_set

CLASSES = ["zebra", "a/b", ".dot"]
LONE_ARRAYS = ["npy", "pt", "pkl"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9).filter(lambda text: not text.endswith("\0"))


def put(url, images, labels, ids=None, extras=None, classes=CLASSES):
    ids = ids or [f"im/{n:03d}.png" for n in range(len(images))]
    return write_set(url, table_of(images, labels, ids, extras, classes), classes=classes)


@settings(max_examples=25)
@given(
    ids=st.lists(TEXT, min_size=1, max_size=9, unique=True),
    layout=st.sampled_from(["parquet", "webdataset", "npz"]),
    data=st.data(),
)
def test_everything_comes_back(tmp_path_factory, ids, layout, data):
    folder = tmp_path_factory.mktemp("layout")
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(ids), max_size=len(ids)))
    captions = data.draw(st.lists(TEXT, min_size=len(ids), max_size=len(ids)))
    source = put(folder / "src", noise(len(ids), 4), labels, ids, pa.table({"txt": captions}))
    assert convert(source, str(folder / "out"), CONFIG, layout) == len(ids)
    opened = open_source(str(folder / "out"), CONFIG)
    table, before = read_all(folder / "out"), read_all(source)
    assert (opened.format, opened.classes) == (layout, CLASSES)
    assert table.drop_columns("image").equals(before.drop_columns("image"))
    assert np.array_equal(load_images(str(folder / "out"), CONFIG).images, noise(len(ids), 4))
    assert image_bytes(table) == image_bytes(before)


def test_tars_are_what_their_readers_expect(tmp_path):
    source = put(tmp_path / "src", noise(3), [0, 1, 2], ["a", "b c", "d.e/f"], pa.table({"txt": ["x", None, "z"]}))
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
        *(
            (layout, {"txt": ["a", "b"]}, f"the {layout} layout cannot hold the column 'txt'")
            for layout in LONE_ARRAYS
        ),
    ],
)
def test_a_column_that_a_layout_cannot_hold_is_refused_unless_it_is_dropped(tmp_path, layout, extras, words):
    source = put(tmp_path / "src", noise(2), [0, 1], extras=pa.table(extras))
    out = str(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        convert(source, out, CONFIG, layout)
    assert words in str(caught.value)
    # The refused call left nothing, so the same output can be used.
    convert(source, out, DataConfig(extra_columns="drop"), layout)
    assert load_images(out, CONFIG).images.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("layout", ["folder", *LONE_ARRAYS])
def test_a_column_that_a_layout_cannot_hold_is_refused_before_the_rest_is_read(tmp_path, layout):
    tables = iter([table_of(noise(1), [0], extras=pa.table({"txt": ["a"]})), table_of(noise(1), [0])])
    with pytest.raises(
        InputError, match=f"the {layout} layout cannot hold the column 'txt'; use the parquet layout"
    ):
        write_dataset(str(tmp_path / "out"), tables, classes=None, source="src", layout=layout)
    assert len(list(tables)) == 1


@pytest.mark.parametrize("layout", LONE_ARRAYS)
def test_files_as_published_keep_pixels_labels_and_order(tmp_path, layout):
    source = put(tmp_path / "src", noise(5), [0, 1, 2, 2, 1])
    assert convert(source, str(tmp_path / "out"), CONFIG, layout) == 5
    loaded = load_images(str(tmp_path / "out"), CONFIG)
    assert np.array_equal(loaded.images, noise(5))
    assert loaded.labels.tolist() == [0, 1, 2, 2, 1]
    assert loaded.classes == CLASSES


TWO_SIZES = [*noise(1), *noise(1, 31)]
CANNOT_HOLD = {
    "a missing label": (["webdataset", "npz", *LONE_ARRAYS], table_of(noise(2), [0, None]), "im/001 has no label"),
    "two sizes": (["npz", *LONE_ARRAYS], table_of(TWO_SIZES, [0, 1]), "im/000 is 32x32 and im/001 is 31x31"),
    "damage": (["npz", *LONE_ARRAYS], canonical_table(["a"], [b"nothing"], [0]), "image a: not an image"),
}


@pytest.mark.parametrize("name", CANNOT_HOLD)
def test_what_a_layout_cannot_hold_is_refused(tmp_path, name):
    layouts, table, words = CANNOT_HOLD[name]
    source = write_set(tmp_path / "src", table, classes=CLASSES)
    for layout in layouts:
        with pytest.raises(InputError, match=words):
            convert(source, str(tmp_path / layout), CONFIG, layout)


@pytest.mark.parametrize("ids", [["0.png", "1.png"], ["data/0.png", "data/1.png"], ["a/0.png", "b/1.png"]])
@pytest.mark.parametrize("layout", ["folder", "webdataset", "npz"])
def test_images_without_labels_stay_so_and_keep_their_folders(tmp_path, ids, layout):
    source = put(tmp_path / "src", noise(2), None, ids, classes=None)
    convert(source, str(tmp_path / "out"), CONFIG, layout)
    assert layout != "folder" or all((tmp_path / "out" / name).is_file() for name in ids)
    loaded = load_images(str(tmp_path / "out"), CONFIG)
    assert (loaded.ids, loaded.labels, loaded.classes) == (ids, None, None)
    assert np.array_equal(loaded.images, noise(2))
