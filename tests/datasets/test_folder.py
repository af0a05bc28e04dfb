import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.folder import folder_name
from eclipse_ray.datasets.formats import open_source, read_parts
from eclipse_ray.datasets.images import decode_image, encode_image
from eclipse_ray.datasets.table import image_bytes
from eclipse_ray.errors import InputError

CONFIG = DataConfig()
PNG = encode_image(np.zeros((2, 2, 3), np.uint8), "png")


def fill(folder, *keys):
    for key in keys:
        file = folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG + key.encode())
    return str(folder)


def test_class_folders_give_labels_and_ids(tmp_path):
    url = fill(tmp_path, "dog/a.png", "cat/deep/b c.JPG", "cat/ü%2F.webp", "dog/readme.txt", "dog/.hidden.png")
    source = open_source(url, CONFIG)
    assert (source.format, source.classes) == ("folder", ["cat", "dog"])
    spans = [(part.key, 0, part.rows) for part in reversed(source.parts)]
    rows = read_parts(source.url, source.format, source.classes, spans, CONFIG)
    assert rows["id"].to_pylist() == ["dog/a.png", "cat/ü%2F.webp", "cat/deep/b c.JPG"]
    assert rows["label"].to_pylist() == [1, 0, 0]
    assert image_bytes(rows)[0] == PNG + b"dog/a.png"
    assert rows["image"].to_pylist()[0]["path"] == "dog/a.png"


def test_a_flat_folder_has_no_labels(tmp_path):
    source = open_source(fill(tmp_path, "a.png", "b.png"), CONFIG)
    assert source.classes is None
    rows = read_parts(source.url, source.format, None, [("b.png", 0, 1)], CONFIG)
    assert rows.column_names == ["id", "image"]


def test_one_folder_is_no_set_of_classes(tmp_path):
    source = open_source(fill(tmp_path, "data/0.png", "data/1.png"), CONFIG)
    assert (source.classes, source.images) == (None, 2)


@pytest.mark.parametrize("name", ["train", "dev", "Evaluation"])
def test_a_folder_named_after_a_split_is_no_class(tmp_path, name):
    url = fill(tmp_path, f"{name}/cat/a.png", f"{name}/dog/b.png")
    with pytest.raises(InputError, match=rf"the split {name}, .* {url}/{name}"):
        open_source(url, CONFIG)
    assert open_source(f"{url}/{name}", CONFIG).classes == ["cat", "dog"]


def test_images_and_classes_may_begin_with_an_underscore(tmp_path):
    url = fill(
        tmp_path, "cat/_MG_1.JPG", "_other/a.png", "dog/b.png", "_eclipse/x/c.png", "dog/._b.png", ".d/e.png"
    )
    source = open_source(url, CONFIG)
    assert [part.key for part in source.parts] == ["_other/a.png", "cat/_MG_1.JPG", "dog/b.png"]
    assert source.classes == ["_other", "cat", "dog"]


def test_a_link_to_nowhere_keeps_its_class_and_is_named(tmp_path):
    url = fill(tmp_path, "dog/b.png")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").symlink_to(tmp_path / "nowhere")
    source = open_source(url, CONFIG)
    assert source.classes == ["cat", "dog"]
    rows = read_parts(source.url, source.format, source.classes, [("dog/b.png", 0, 1)], CONFIG)
    assert rows["label"].to_pylist() == [1]
    with pytest.raises(InputError, match=r"cat/a\.png"):
        read_parts(source.url, source.format, source.classes, [("cat/a.png", 0, 1)], CONFIG)


def test_layouts_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"beside them \(b.png\)"):
        open_source(fill(tmp_path / "mixed", "cat/a.png", "b.png"), CONFIG)
    with pytest.raises(InputError, match="splits test, train"):
        open_source(fill(tmp_path / "splits", "train/cat/a.png", "test/cat/a.png"), CONFIG)


def test_noted_class_order_keeps_the_labels(tmp_path):
    url = fill(tmp_path, "dog/a.png", "cat/b.png")
    note = tmp_path / "_eclipse" / "dataset.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"classes": ["dog", "emu", "cat"]}))
    source = open_source(url, CONFIG)
    spans = [("cat/b.png", 0, 1), ("dog/a.png", 0, 1)]
    rows = read_parts(source.url, source.format, source.classes, spans, CONFIG)
    assert rows["label"].to_pylist() == [2, 0]


def test_an_image_that_went_away_is_named(tmp_path):
    source = open_source(fill(tmp_path, "cat/a.png", "dog/b.png"), CONFIG)
    (tmp_path / "dog" / "b.png").unlink()
    with pytest.raises(InputError, match=r"dog/b\.png"):
        read_parts(source.url, source.format, source.classes, [("dog/b.png", 0, 1)], CONFIG)


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
    rows = read_parts(source.url, source.format, source.classes, [(part.key, 0, 1)], CONFIG)
    assert rows["label"].to_pylist() == [41]
    assert decode_image(image_bytes(rows)[0], CONFIG.max_pixels).ndim == 3
