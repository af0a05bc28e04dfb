import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eclipse_ray.datasets.folder import folder_name
from eclipse_ray.datasets.formats import open_source, read_parts
from eclipse_ray.datasets.images import decode_image
from eclipse_ray.datasets.table import image_bytes
from eclipse_ray.errors import InputError
from tests.datasets.helpers import CONFIG, fill, noise, read_all
from tests.support import pixels_of


def test_class_folders_give_labels_and_ids(tmp_path):
    keys = ["dog/a.png", "cat/deep/b c.JPG", "cat/ü%2F.webp"]
    fill(tmp_path, *keys, images=noise(3))
    source = open_source(fill(tmp_path, "dog/readme.txt", "dog/.hidden.png"), CONFIG)
    assert (source.format, source.classes) == ("folder", ["cat", "dog"])
    rows = read_parts(source, [(key, 0, 1) for key in keys])
    assert rows["id"].to_pylist() == [image["path"] for image in rows["image"].to_pylist()] == keys
    assert rows["label"].to_pylist() == [1, 0, 0]
    assert (pixels_of(rows) == noise(3)).all()


@pytest.mark.parametrize("keys", [("a.png", "b.png"), ("data/0.png", "data/1.png")])
def test_a_folder_without_two_classes_has_no_labels(tmp_path, keys):
    source = open_source(fill(tmp_path, *keys), CONFIG)
    assert (source.classes, source.images) == (None, 2)
    assert read_all(source.url).column_names == ["id", "image"]


def test_images_and_classes_may_begin_with_an_underscore(tmp_path):
    url = fill(
        tmp_path, "cat/_MG_1.JPG", "_other/a.png", "dog/b.png", "_eclipse/x/c.png", "dog/._b.png", ".d/e.png"
    )
    source = open_source(url, CONFIG)
    assert [part.key for part in source.parts] == ["_other/a.png", "cat/_MG_1.JPG", "dog/b.png"]
    assert source.classes == ["_other", "cat", "dog"]


@pytest.mark.parametrize("link", [True, False])
def test_an_image_that_went_away_keeps_its_class_and_is_named(tmp_path, link):
    url = fill(tmp_path, "dog/b.png", "cat/a.png")
    source = open_source(url, CONFIG)
    (tmp_path / "cat/a.png").unlink()
    if link:
        (tmp_path / "cat/a.png").symlink_to(tmp_path / "nowhere")
        source = open_source(url, CONFIG)
    assert source.classes == ["cat", "dog"]
    rows = read_parts(source, [("dog/b.png", 0, 1)])
    assert rows["label"].to_pylist() == [1]
    with pytest.raises(InputError, match=r"cat/a\.png"):
        read_parts(source, [("cat/a.png", 0, 1)])


def test_noted_class_order_keeps_the_labels(tmp_path):
    url = fill(tmp_path, "dog/a.png", "cat/b.png")
    note = tmp_path / "_eclipse" / "dataset.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"classes": ["dog", "emu", "cat"]}))
    assert read_all(url)["label"].to_pylist() == [2, 0]


@given(st.text(max_size=6), st.text(max_size=6))
def test_folder_names_are_single_visible_and_distinct(one, other):
    name = folder_name(one)
    assert name
    assert "/" not in name
    assert not name.startswith((".", "_"))
    assert (name == folder_name(other)) == (one == other)


def test_real_photographs(shared_data):
    source = open_source(str(shared_data / "imagenet-samples"), CONFIG)
    assert source.classes is not None
    assert len(source.classes) == len(source.parts) == 100
    part = source.parts[41]
    rows = read_parts(source, [(part.key, 0, 1)])
    assert rows["label"].to_pylist() == [41]
    assert decode_image(image_bytes(rows)[0], CONFIG.max_pixels).ndim == 3
