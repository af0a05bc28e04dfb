import os
import pickle

import numpy as np
import pytest

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source, read_parts
from eclipse_ray.datasets.images import decode_image
from eclipse_ray.datasets.table import image_bytes
from eclipse_ray.errors import InputError

CONFIG = DataConfig()
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)


def batch(**changes):
    content = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [3, 1, 4, 1, 5, 9],
        b"data": PIXELS.reshape(6, -1),
        b"filenames": [b"%d.png" % n for n in range(6)],
    }
    return {**content, **{key.encode(): value for key, value in changes.items()}}


def dump(folder, content, name="data_batch_1", protocol=2):
    (folder / name).write_bytes(pickle.dumps(content, protocol))
    return str(folder)


def read_all(url):
    source = open_source(url, CONFIG)
    spans = [(part.key, 0, part.rows) for part in source.parts]
    return source, read_parts(source.url, source.format, source.classes, spans, CONFIG)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_batches_of_every_protocol(tmp_path, protocol):
    dump(tmp_path, {b"label_names": [b"c%d" % n for n in range(10)]}, "batches.meta", protocol)
    source, rows = read_all(dump(tmp_path, batch(), protocol=protocol))
    assert source.classes == [f"c{n}" for n in range(10)]
    assert rows["id"].to_pylist()[5] == "data_batch_1#5"
    assert rows["label"].to_pylist() == [3, 1, 4, 1, 5, 9]
    assert rows["image"].to_pylist()[2]["path"] == "2.png"
    for data, pixels in zip(image_bytes(rows), PIXELS, strict=True):
        assert np.array_equal(decode_image(data, 2000), pixels.transpose(1, 2, 0))
    part = read_parts(source.url, source.format, None, [("data_batch_1", 4, 6)], CONFIG)
    assert part["id"].to_pylist() == ["data_batch_1#4", "data_batch_1#5"]


def test_python_2_batches(tmp_path):
    # Python 2 wrote text as bytes, and numpy under its old module path.
    data = (
        b"\x80\x02}(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + bytes(3072) + b"tbU\x06labelsq\x02]K\x07au."
    )
    (tmp_path / "test_batch").write_bytes(data)
    _, rows = read_all(str(tmp_path / "test_batch"))
    assert rows["label"].to_pylist() == [7]
    assert decode_image(image_bytes(rows)[0], 2000).shape == (32, 32, 3)


def test_cifar_100_keeps_coarse_labels(tmp_path):
    dump(tmp_path, {b"fine_label_names": [b"apple", b"bee"]}, "meta")
    content = {
        "data": PIXELS[:2].reshape(2, -1),
        "fine_labels": [1, 0],
        "coarse_labels": np.array([7, 8], ">i4"),
    }
    source, rows = read_all(dump(tmp_path, content, "train", 4))
    assert source.classes == ["apple", "bee"]
    assert rows["label"].to_pylist() == [1, 0]
    assert rows["coarse_label"].to_pylist() == [7, 8]


class Run:
    """Becomes a call of `function` when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", ["system", "eval"])
def test_malicious_pickles_are_refused_and_run_nothing(tmp_path, protocol, function):
    canary = tmp_path / "canary"
    attack = (
        Run(os.system, f"touch {canary}")
        if function == "system"
        else Run(eval, f"open({str(canary)!r}, 'w').close()")
    )
    for content in (attack, batch(extra=attack), [attack]):
        url = dump(tmp_path, content, "data_batch_1", protocol)
        with pytest.raises(InputError, match="can run code"):
            open_source(url, CONFIG)
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        batch(data=np.zeros((6, 100), np.uint8)),
        batch(data=np.zeros((6, 3072), np.float32)),
        batch(data=np.array([object()], object)),
        batch(data=Run(np.ndarray, (10**6,))),
    ],
)
def test_other_pickles_are_refused(tmp_path, content):
    with pytest.raises(InputError, match="data_batch_1"):
        open_source(dump(tmp_path, content), CONFIG)


@pytest.mark.parametrize("labels", [[1, 2], [0.5] * 6, [[1], [2, 3]], ["a"] * 6])
def test_wrong_labels_are_refused(tmp_path, labels):
    with pytest.raises(InputError, match="6 integer labels"):
        read_all(dump(tmp_path, batch(labels=labels)))


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
            source, rows = read_all(str(tmp_path))
        except InputError:
            refused += 1
            continue
        read += 1
        assert rows["id"].to_pylist() == [f"data_batch_1#{row}" for row in range(source.images)]
        assert all(decode_image(data, 10**6).shape[2] == 3 for data in image_bytes(rows))
        labels = rows["label"].to_pylist() if "label" in rows.column_names else []
        assert all(isinstance(label, int) for label in labels)
    assert read > 10
    assert refused > 20


def test_damaged_pixels_change_those_pixels_and_nothing_else(tmp_path):
    whole = pickle.dumps(batch(), 4)
    start = whole.index(PIXELS.tobytes())
    rng = np.random.default_rng(2)
    for _ in range(20):
        pixels = PIXELS.copy()
        pixels.reshape(-1)[rng.integers(0, PIXELS.size, 3)] ^= 255
        damaged = whole[:start] + pixels.tobytes() + whole[start + PIXELS.size :]
        (tmp_path / "data_batch_1").write_bytes(damaged)
        _, rows = read_all(str(tmp_path))
        assert rows["label"].to_pylist() == [3, 1, 4, 1, 5, 9]
        found = np.stack([decode_image(data, 2000) for data in image_bytes(rows)])
        assert np.array_equal(found, pixels.transpose(0, 2, 3, 1))
