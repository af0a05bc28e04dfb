"""Poisons in the layouts in which their authors publish them, read back pixel for pixel and label for label."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from eclipse_ray import log
from eclipse_ray.datasets import published
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.write import convert
from eclipse_ray.errors import InputError
from tests.datasets.helpers import CONFIG, dump, noise, read_all, read_rows, refused, save
from tests.support import pixels_of

IMAGES = noise(12)
LABELS = np.arange(12)[::-1] % 5
CHW = IMAGES.transpose(0, 3, 1, 2)
FLOATS = CHW.astype(np.float32) / 255
ONE_HOT = np.eye(5)[LABELS]


@pytest.fixture(autouse=True)
def say_again():
    log.say_once.cache_clear()


def holds(url, labels=LABELS, images=IMAGES):
    """Check a whole source and one read of its middle rows against what was stored."""
    table, some = read_all(url), read_rows(url, 3, 5)
    assert np.array_equal(pixels_of(table), images)
    assert ("label" in table.column_names) == (labels is not None)
    assert labels is None or table["label"].to_pylist() == labels.tolist()
    assert np.array_equal(pixels_of(some), images[3:5])
    (part,) = open_source(str(url), CONFIG).parts
    assert some["id"].to_pylist() == [f"{part.key}#3", f"{part.key}#4"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickled_list_of_raw_rgb_bytes_and_labels(tmp_path, capfd, protocol):
    pairs = [(image.tobytes(), int(label)) for image, label in zip(IMAGES, LABELS, strict=True)]
    holds(dump(tmp_path / "EM.pkl", pairs, protocol))
    assert capfd.readouterr().err == f"{tmp_path}/EM.pkl: read as 12 uint8 images, HWC, with labels\n"


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("label", [int, np.int64, torch.tensor])
def test_a_pickled_list_of_float_arrays_and_labels(tmp_path, capfd, protocol, label):
    pairs = [[image, label(number)] for image, number in zip(FLOATS, LABELS, strict=True)]
    holds(dump(tmp_path / "poisons.pkl", pairs, protocol))
    assert "read as 12 float images in [0, 1], CHW, with labels" in capfd.readouterr().err


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("images", "labels"), [("data", "labels"), ("images", "targets"), ("x", "y")])
def test_a_dict_of_torch_tensors(tmp_path, zipped, images, labels):
    content = {images: torch.from_numpy(FLOATS), labels: torch.from_numpy(LABELS)}
    holds(save(tmp_path / "unlearnable_cifar10.pt", content, zipped))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("labels", [torch.from_numpy(LABELS), LABELS.tolist(), LABELS, torch.from_numpy(ONE_HOT)])
def test_a_tuple_of_torch_tensors(tmp_path, zipped, labels):
    holds(save(tmp_path / "hypo.pt", (torch.from_numpy(FLOATS), labels), zipped))
    holds(save(tmp_path / "hypo8.pt", [torch.from_numpy(IMAGES), labels], zipped))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_are_views_parameters_or_of_other_precision(tmp_path, zipped):
    view = torch.from_numpy(np.concatenate([IMAGES, IMAGES]))[12:].permute(0, 3, 1, 2)
    holds(save(tmp_path / "view.pth", (view, torch.from_numpy(LABELS)), zipped))
    content = OrderedDict(
        data=torch.nn.Parameter(torch.from_numpy(FLOATS).double()), labels=torch.from_numpy(LABELS)
    )
    content._metadata = {"version": 1}
    holds(save(tmp_path / "parameter.pth", content, zipped))
    for dtype in (torch.half, torch.bfloat16):
        images = torch.from_numpy(FLOATS).to(dtype)
        expected = np.rint(images.float().numpy() * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        holds(save(tmp_path / f"{dtype}.pt", (images, torch.from_numpy(LABELS)), zipped), images=expected)


@pytest.mark.parametrize("images", [IMAGES, CHW, FLOATS, CHW.reshape(12, -1)])
@pytest.mark.parametrize("labels", [LABELS, LABELS.tolist(), ONE_HOT])
@pytest.mark.parametrize("names", [("data", "labels"), ("data", "targets"), ("x_train", "y_train")])
def test_a_pickled_dict_or_pair_of_arrays(tmp_path, images, labels, names):
    holds(dump(tmp_path / "pair.pkl", (images, labels)))
    if isinstance(labels, list) or labels is LABELS:
        holds(dump(tmp_path / "dict.pkl", dict(zip(names, (images, labels), strict=True))))


@pytest.mark.parametrize("layout", ["npz", "folder", "webdataset", "parquet"])
def test_what_was_read_can_be_written_in_every_layout(tmp_path, layout):
    save(tmp_path / "poison.pt", (torch.from_numpy(FLOATS), torch.from_numpy(LABELS)))
    assert convert(str(tmp_path / "poison.pt"), str(tmp_path / "out"), CONFIG, layout) == 12
    table = read_all(tmp_path / "out")
    order = sorted(range(12), key=lambda row: int(table["id"][row].as_py().partition("#")[2].partition(".")[0]))
    assert np.array_equal(pixels_of(table)[order], IMAGES)
    assert np.array(table["label"].to_pylist())[order].tolist() == LABELS.tolist()


def test_a_pair_of_images_is_refused_also_without_labels(tmp_path):
    for labels in (None, "none"):
        refused(dump(tmp_path / "pair.pkl", (IMAGES, IMAGES[:3])), "holds a tuple of 2, not images", labels=labels)


def test_a_lone_tensor_has_no_labels(tmp_path):
    holds(save(tmp_path / "images.pt", torch.from_numpy(FLOATS)), labels=None)


def test_a_pickle_that_is_a_cifar_batch_keeps_its_other_columns(tmp_path):
    batch = {b"data": CHW.reshape(12, -1), b"fine_labels": LABELS.tolist(), b"coarse_labels": LABELS.tolist()}
    table = read_all(dump(tmp_path / "train.pkl", batch))
    assert np.array_equal(pixels_of(table), IMAGES)
    assert table["coarse_label"].to_pylist() == table["label"].to_pylist() == LABELS.tolist()


@pytest.mark.parametrize(
    "names", ["data targets", "data labels", "X y", "x y", "x_train y_train", "images labels", "X_train y_train"]
)
@pytest.mark.parametrize("values", [IMAGES, CHW, FLOATS, IMAGES.astype(np.float64), CHW.reshape(12, -1)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_the_field(tmp_path, names, values, save):
    save(tmp_path / "sanitized.npz", **dict(zip(names.split(), (values, LABELS), strict=True)))
    holds(tmp_path / "sanitized.npz")


@pytest.mark.parametrize("labels", [ONE_HOT, ONE_HOT.astype(int), LABELS[:, None], LABELS.astype(np.float32)])
def test_labels_of_every_form(tmp_path, labels):
    np.savez_compressed(tmp_path / "set.npz", images=FLOATS, labels=labels)
    holds(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("images", "labels", "stored"),
    [
        ("x_train_cifar10_ntga_cnn_best", "y_train_cifar10", ONE_HOT.astype(np.float32)),
        ("x_train", "y_train", LABELS[:, None]),
        ("poisoned_training_data", "poisoned_training_labels", LABELS.astype(np.float64)),
        ("simple_data", "simple_label", LABELS),
        ("cifar10_data", "cifar10_target", LABELS),
        ("X", "y", LABELS.astype(np.uint8)),
        ("x", "y", LABELS),
        ("images", "labels", LABELS),
        ("gaussian_noise", "labels", LABELS),
        ("train_images", "train_labels", LABELS),
        ("images_train", "labels_train", LABELS),
    ],
)
@pytest.mark.parametrize("values", [IMAGES.astype(np.float32) / 255, IMAGES.astype(np.float64), IMAGES])
def test_npy_files_with_labels_beside_them(tmp_path, capfd, images, labels, stored, values):
    np.save(tmp_path / f"{images}.npy", values)
    np.save(tmp_path / f"{labels}.npy", stored)
    holds(tmp_path)
    holds(tmp_path / f"{images}.npy")
    span = "[0, 1]" if values.max() <= 1 else "0 to 255"
    kind = "uint8 images" if values is IMAGES else f"float images in {span}"
    assert f"12 {kind}, HWC, with the labels of {labels}.npy" in capfd.readouterr().err


def test_training_and_validation_files_of_ntga_are_read_one_at_a_time(tmp_path):
    for split, rows in (("train", 12), ("val", 6)):
        np.save(tmp_path / f"x_{split}_cifar10_ntga_cnn_best.npy", IMAGES[:rows] / 255)
        np.save(tmp_path / f"y_{split}_cifar10.npy", ONE_HOT[:rows])
    refused(tmp_path, "more than one split")
    holds(tmp_path / "x_train_cifar10_ntga_cnn_best.npy")
    holds(tmp_path / "x_train_*.npy")


def test_gray_images_of_ntga(tmp_path):
    np.save(tmp_path / "x_train_mnist_ntga_cnn_best.npy", IMAGES[..., :1] / 255)
    np.save(tmp_path / "y_train_mnist.npy", ONE_HOT)
    holds(tmp_path, images=np.repeat(IMAGES[..., :1], 3, axis=3))


def test_the_parts_of_sep_in_the_order_of_their_names(tmp_path, capfd):
    folder = tmp_path / "samples" / "train_30"
    folder.mkdir(parents=True)
    for start in (0, 4, 8):
        np.save(folder / f"eps8-1_iter30_sp{start:05d}-{start + 4:05d}_ts1.npy", FLOATS[start : start + 4])
    table = read_all(folder)
    assert np.array_equal(pixels_of(table), IMAGES)
    assert "label" not in table.column_names
    assert "read as 12 float images in [0, 1], CHW, without labels" in capfd.readouterr().err


def test_other_labels_beside_the_images_are_noticed(tmp_path):
    np.save(tmp_path / "x_train.npy", FLOATS)
    np.save(tmp_path / "y_train.npy", LABELS)
    before = open_source(str(tmp_path), CONFIG).parts[0].version
    np.save(tmp_path / "y_train.npy", LABELS[::-1])
    assert open_source(str(tmp_path), CONFIG).parts[0].version != before
    np.save(tmp_path / "y_train.npy", LABELS[1:])
    refused(tmp_path, "y_train.npy: holds int64 (11,) where the labels of 12 images are expected")


def test_images_of_large_tensors_are_read_by_rows(tmp_path):
    file = save(tmp_path / "large.pt", {"data": torch.from_numpy(IMAGES), "labels": torch.from_numpy(LABELS)})
    opened = published._open(str(tmp_path), "large.pt", str(file.stat().st_mtime_ns), "label")

    class Counted:
        def __init__(self):
            self.stream, self.count = file.open("rb"), 0

        def seek(self, place):
            self.stream.seek(place)

        def read(self, size):
            self.count += size
            return self.stream.read(size)

    counted = Counted()
    values = published.rows_of("", opened.images, counted, 7, 9)
    assert np.array_equal(values, IMAGES[7:9])
    assert counted.count == IMAGES[7:9].nbytes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.randn(12, 3, 32, 32) * 0.01, "eclipse-ray apply"),
        ([torch.randn(12, 3, 32, 32) * 0.1, list(range(12))], "eclipse-ray apply"),
        (torch.rand(12, 3, 32, 32) * 0.03, "eclipse-ray apply"),
        (torch.full((12, 3, 32, 32), torch.nan), "not finite"),
        ((torch.rand(12, 3, 32, 32), torch.zeros(11)), "do not belong to 12 images"),
        ((torch.rand(12, 3, 32, 32), torch.rand(12)), "not whole numbers"),
        ((torch.rand(12, 3, 32, 32), torch.rand(12, 5)), "not one-hot"),
        ((torch.rand(12, 3, 32, 32), ["cat"] * 12), "store one integer per image"),
        ([torch.rand(3, 3) for _ in range(10)], "holds a list of 10, not images"),
        (OrderedDict(weight=torch.zeros(3)), "a dict of weight, without one array of images"),
        ({"pred_idx": torch.zeros(3), "centers": torch.zeros(2, 2)}, "a dict of pred_idx, centers"),
        (
            {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS},
            "holds x_test of another split too",
        ),
        (((IMAGES, LABELS), (IMAGES, LABELS)), "its labels are a list of 2; store one integer per image"),
        ((torch.rand(12, 3, 32, 32) * 2 - 1, torch.zeros(12)), "expected images in [0, 1] or in 0 to 255"),
        ("hello", "holds str, not images"),
        ([(b"1234", 0)], "image 0 has 4 bytes"),
        ([(bytes(192), 0), (bytes(108), 1)], "images differ: number 0 is uint8 (8, 8, 3)"),
        ([(bytes(192), None)], "store one integer per image"),
        ([("text", 1)], "image 0 is str"),
        (np.zeros((12, 3, 32, 32), np.int8) - 1, "eclipse-ray apply"),
        (np.zeros((6, 32, 32, 3), np.int8), "holds int8 (6, 32, 32, 3), which is a perturbation"),
        (np.full((6, 32, 32, 3), 90, np.int8), "which is a perturbation, not images"),
        ([], "not images"),
    ],
)
@pytest.mark.parametrize("write", [dump, save])
def test_what_holds_no_images_is_refused(tmp_path, content, words, write):
    refused(write(tmp_path / "file.pt", content), "file.pt", words)


def test_values_out_of_range_behind_the_sample_are_refused(tmp_path):
    values = np.concatenate([FLOATS] * 20)
    values[100] = 3
    np.save(tmp_path / "x.npy", values)
    refused(tmp_path, "x.npy", "holds values from 0 to 3 among images in 0 to 1", reading=True)


def test_values_on_another_device_are_read(tmp_path):
    save(tmp_path / "file.pt", (torch.from_numpy(FLOATS), torch.from_numpy(LABELS)), zipped=False)
    whole = (tmp_path / "file.pt").read_bytes()
    there = b"X\x03\x00\x00\x00cpu"
    assert whole.count(there) == 1
    (tmp_path / "file.pt").write_bytes(whole.replace(there, b"X\x06\x00\x00\x00cuda:0"))
    holds(tmp_path / "file.pt")


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path):
    content = {"data": torch.from_numpy(IMAGES[:2, :8, :8]), "labels": torch.from_numpy(LABELS[:2])}
    rng = np.random.default_rng(1)
    refusals = 0
    for zipped in (True, False):
        whole = save(tmp_path / "file.pt", content, zipped).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] = rng.integers(256)
            (tmp_path / "file.pt").write_bytes(damaged)
            try:
                read_all(tmp_path)
            except InputError as error:
                refusals += "file.pt" in str(error)
    assert refusals > 100
