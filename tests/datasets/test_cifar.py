import pickle

import numpy as np
import pytest

from eclipse_ray.datasets.formats import open_source, read_parts
from eclipse_ray.datasets.images import decode_image
from eclipse_ray.datasets.table import image_bytes
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import CONFIG, noise, read_all, read_rows, refused, time_out
from tests.support import pixels_of

IMAGES = noise(6)


def batch(**changes):
    content = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [3, 1, 4, 1, 5, 9],
        b"data": IMAGES.transpose(0, 3, 1, 2).reshape(6, -1),
        b"filenames": [b"%d.png" % n for n in range(6)],
    }
    return {**content, **{key.encode(): value for key, value in changes.items()}}


def dump(folder, content, name="data_batch_1", protocol=2):
    (folder / name).write_bytes(pickle.dumps(content, protocol))
    return str(folder)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_batches_of_every_protocol(tmp_path, protocol):
    names = [b"c%d" % n for n in range(10)]
    dump(tmp_path, {b"label_names": names}, "batches.meta", protocol)
    url = dump(tmp_path, batch(), protocol=protocol)
    rows = read_all(url)
    assert open_source(url, CONFIG).classes == [name.decode() for name in names]
    assert rows["label"].to_pylist() == [3, 1, 4, 1, 5, 9]
    assert rows["image"].to_pylist()[2]["path"] == "2.png"
    assert np.array_equal(pixels_of(rows), IMAGES)
    assert read_rows(url, 4, 6)["id"].to_pylist() == ["data_batch_1#4", "data_batch_1#5"]


def test_python_2_batches(tmp_path):
    # Python 2 wrote text as bytes, and numpy under its old module path.
    data = (
        b"\x80\x02}(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + bytes(3072) + b"tbU\x06labelsq\x02]K\x07au."
    )
    (tmp_path / "test_batch").write_bytes(data)
    rows = read_all(tmp_path / "test_batch")
    assert rows["label"].to_pylist() == [7]
    assert decode_image(image_bytes(rows)[0], 2000).shape == (32, 32, 3)


def test_cifar_100_keeps_coarse_labels(tmp_path):
    dump(tmp_path, {b"fine_label_names": [b"apple", b"bee"]}, "meta")
    data = IMAGES[:2].transpose(0, 3, 1, 2).reshape(2, -1)
    content = {"data": data, "fine_labels": [1, 0], "coarse_labels": np.array([7, 8], ">i4")}
    url = dump(tmp_path, content, "train", 4)
    assert open_source(url, CONFIG).classes == ["apple", "bee"]
    assert read_all(url)["label"].to_pylist() == [1, 0]
    assert read_all(url)["coarse_label"].to_pylist() == [7, 8]


def test_a_meta_file_beside_later_batches_alone_names_no_classes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        dump(tmp_path / name, batch())
    dump(tmp_path / "b", {b"label_names": [b"x", b"y"]}, "batches.meta")
    assert open_source(str(tmp_path), CONFIG).classes is None
    assert read_all(tmp_path)["label"].to_pylist() == 2 * [3, 1, 4, 1, 5, 9]


class Million:
    """Becomes an array of a million numbers when it is unpickled."""

    def __reduce__(self):
        return np.ndarray, ((10**6,),)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        batch(data=np.zeros((6, 100), np.uint8)),
        batch(data=np.zeros((6, 3072), np.float32)),
        batch(data=np.array([object()], object)),
        batch(data=Million()),
    ],
)
def test_other_pickles_are_refused(tmp_path, content):
    refused(dump(tmp_path, content), "data_batch_1")


@pytest.mark.parametrize("labels", [[1, 2], [0.5] * 6, [[1], [2, 3]], ["a"] * 6])
def test_wrong_labels_are_refused(tmp_path, labels):
    refused(dump(tmp_path, batch(labels=labels)), "6 integer labels")


@pytest.mark.parametrize("name", ["data_batch_1", "a.pkl"])
def test_a_batch_is_read_again_where_its_store_fails_for_a_moment(monkeypatch, tmp_path, name):
    store = Store(f"memory://batches-{tmp_path.name}")
    store.write(name, pickle.dumps(batch()))
    source = open_source(store.url, CONFIG)
    time_out(monkeypatch, 2)
    rows = read_parts(source, [(name, 0, 6)])
    assert np.array_equal(pixels_of(rows), IMAGES)


def test_garbage_is_refused_or_read_as_whole_rows(tmp_path):
    whole = pickle.dumps(batch(), 2)
    rng = np.random.default_rng(1)
    read = refused = 0
    for _ in range(200):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, min(400, len(damaged)), rng.choice([1, 3])):
            damaged[place] = rng.integers(256)
        (tmp_path / "data_batch_1").write_bytes(damaged)
        try:
            rows = read_all(tmp_path)
        except InputError:
            refused += 1
            continue
        read += 1
        assert rows["id"].to_pylist() == [f"data_batch_1#{row}" for row in range(rows.num_rows)]
        assert all(decode_image(data, 10**6).shape[2] == 3 for data in image_bytes(rows))
        labels = rows["label"].to_pylist() if "label" in rows.column_names else []
        assert all(isinstance(label, int) for label in labels)
    assert read > 10
    assert refused > 20
