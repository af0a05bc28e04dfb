import zipfile

import numpy as np
import pytest
import torch

from eclipse_ray.datasets.formats import Source, open_source, read_parts
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import CONFIG, noise, read_all, refused
from tests.support import pixels_of

IMAGES = noise(11, 5, 4)
LABELS = np.arange(11) % 3


def put(folder, name="set.npz", compress=False, **arrays):
    folder.mkdir(exist_ok=True)
    (np.savez_compressed if compress else np.savez)(folder / name, **arrays)
    return str(folder)


def test_labels_beside_images_are_read_in_one_opening(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", IMAGES)
    np.save(tmp_path / "labels.npy", LABELS)
    opened, genuine = [], Store.open
    monkeypatch.setattr(Store, "open", lambda store, key="": opened.append(key) or genuine(store, key))
    table = read_parts(Source(str(tmp_path), "npz", None, CONFIG), [("images.npy", 0, 11)])
    assert (table["label"].to_pylist(), opened.count("labels.npy")) == (LABELS.tolist(), 1)


WRITERS = [
    (".npy", np.save),
    (".npz", lambda file, image: np.savez(file, images=image)),
    (".pt", lambda file, image: torch.save(torch.from_numpy(image), file)),
]


@pytest.mark.parametrize("shape", [(3, 32, 32), (32, 32, 3), (32, 20, 1)])
@pytest.mark.parametrize(("suffix", "write"), WRITERS)
def test_one_image_per_file_and_several_gray_ones_look_alike(tmp_path, shape, suffix, write):
    for key in ("cat/0", "dog/1"):
        (tmp_path / key).parent.mkdir()
        write(f"{tmp_path / key}{suffix}", np.zeros(shape, np.uint8))
    words = f"may be one image or {shape[0]} gray ones; stack the images"
    for labels in (None, "folder", "none"):
        refused(tmp_path, f"cat/0{suffix}: holds uint8 {shape}, which {words}", labels=labels)


@pytest.mark.parametrize(("suffix", "write"), WRITERS)
def test_shards_of_other_lengths_tell_that_three_rows_are_three_gray_images(tmp_path, suffix, write):
    for name, rows in (("a", 3), ("b", 4), ("c", 1)):
        write(f"{tmp_path / name}{suffix}", IMAGES[:rows, ..., 0])
    for labels in (None, "none"):
        found = pixels_of(read_all(tmp_path, labels=labels))
        assert np.array_equal(found[..., 1], IMAGES[[0, 1, 2, 0, 1, 2, 3, 0], ..., 0])
    (tmp_path / f"b{suffix}").unlink()
    refused(tmp_path, "one image or 3 gray ones")
    write(f"{tmp_path}/b{suffix}", IMAGES[:4, :4, :, 0])
    refused(tmp_path, "one image or 3 gray ones")


def test_labels_tell_that_three_rows_are_three_gray_images_even_if_they_are_not_read(tmp_path):
    images, labels = IMAGES[:3, ..., 0], LABELS[:3]
    put(tmp_path / "npz", images=images, labels=labels)
    for name in ("npy", "pt"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "npy/images.npy", images)
    np.save(tmp_path / "npy/labels.npy", labels)
    torch.save((torch.from_numpy(images), torch.from_numpy(labels)), tmp_path / "pt/a.pt")
    for name in ("npz", "npy", "pt"):
        table = read_all(tmp_path / name, labels="none")
        assert table.column_names == ["id", "image"]
        assert np.array_equal(pixels_of(table)[..., 0], images)


def test_gray_images_that_are_no_single_image_stay_gray_images(tmp_path):
    gray = np.repeat(IMAGES[..., :1], 3, axis=3)
    labelled = read_all(put(tmp_path / "labelled", images=IMAGES[:3, ..., 0], labels=LABELS[:3]))
    assert np.array_equal(pixels_of(labelled), gray[:3])
    assert labelled["label"].to_pylist() == [0, 1, 2]
    assert np.array_equal(pixels_of(read_all(put(tmp_path / "one", images=IMAGES[:1, ..., 0]))), gray[:1])
    given = {"labels": str(tmp_path / "l.npy")}
    np.save(given["labels"], [2, 0, 1])
    found = read_all(put(tmp_path / "given", images=IMAGES[:3, ..., 0]), **given)
    assert found["label"].to_pylist() == [2, 0, 1]
    assert np.array_equal(pixels_of(found), gray[:3])


def test_classes_that_only_a_later_file_names_are_not_those_of_the_first(tmp_path):
    put(tmp_path / "s", "a.npz", images=IMAGES, labels=LABELS)
    url = put(tmp_path / "s", "b.npz", images=IMAGES, labels=LABELS % 2, classes=np.array(["x", "y"]))
    assert open_source(url, CONFIG).classes is None
    assert read_all(url)["label"].to_pylist() == [*LABELS, *(LABELS % 2)]


def test_other_arrays_come_along(tmp_path):
    extras = {
        "coarse": LABELS.astype(">i2"),
        "weight": np.linspace(0, 1, 11),
        "who": np.array([f"é{n}" for n in range(11)]),
        "good": LABELS > 0,
        "id": np.array([f"k{n}" for n in range(11)]),
        "classes": np.array(["a", "b", "c"]),
    }
    url = put(tmp_path / "s", images=IMAGES, labels=LABELS.astype(np.uint8), **extras)
    table = read_all(url)
    assert open_source(url, CONFIG).classes == ["a", "b", "c"]
    assert table["id"].to_pylist() == extras["id"].tolist()
    for name in ("coarse", "weight", "who", "good"):
        assert table[name].to_pylist() == extras[name].tolist()


def test_splits_of_one_file_are_chosen_by_name(tmp_path):
    arrays = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:4], "y_test": LABELS[:4] + 5}
    url = put(tmp_path / "s", **arrays)
    refused(url, "data.image_column=x_train")
    test = read_all(url, image_column="x_test")
    assert test["label"].to_pylist() == [5, 6, 7, 5]
    train = read_all(url, image_column="x_train", label_column="y_train")
    assert train.num_rows == 11


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": IMAGES[..., :2].astype(np.float32)}, "float32 (11, 5, 4, 2)"),
        ({"images": IMAGES.transpose(0, 2, 3, 1)}, "(N, H, W, 3)"),
        ({"images": np.asfortranarray(IMAGES)}, "Fortran"),
        ({"pictures": IMAGES}, "data.image_column=pictures"),
        ({"labels": LABELS}, "data.image_column=NAME"),
        ({"images": IMAGES, "labels": LABELS[:-1]}, "expected 11 integer labels"),
        ({"images": IMAGES, "labels": LABELS + 0.5}, "labels of float64 are not whole numbers"),
        ({"images": IMAGES, "labels": np.full((11, 3), 1 / 3)}, "are not one-hot"),
        ({"images": IMAGES, "labels": LABELS[:, None, None]}, "expected 11 integer labels"),
        ({"images": IMAGES / 255 - 0.5}, "eclipse-ray apply"),
        ({"images": IMAGES / 64}, "neither images in [0, 1] nor in 0 to 255"),
        ({"images": IMAGES, "mean": np.zeros(3)}, "data.extra_columns=drop"),
        ({"images": IMAGES, "depth": np.zeros(11, np.longdouble)}, "data.extra_columns=drop"),
        ({"images": np.zeros((1, 7000, 7000), np.uint8)}, "data.max_pixels"),
    ],
)
def test_other_arrays_are_refused_before_a_run(tmp_path, arrays, words):
    refused(put(tmp_path / "s", compress=True, **arrays), words, "set.npz")


def test_labels_are_named_or_refused(tmp_path):
    url = put(tmp_path / "s", images=IMAGES, fine=LABELS)
    refused(url, "no array 'fin' among images, fine", label_column="fin")
    wide = put(tmp_path / "w", images=IMAGES, labels=np.full(11, 2**63, np.uint64))
    refused(wide, "out of range", reading=True)


def test_labels_that_are_not_read_may_be_left_out(tmp_path):
    url = put(tmp_path / "s", images=IMAGES, labels=np.array(["cat"] * 11), fine=LABELS)
    refused(url, "array 'labels' is <U3 (11,), expected 11 integer labels")
    assert read_all(url, labels="none").column_names == ["id", "image", "fine"]
    np.save(tmp_path / "own.npy", LABELS)
    # The column is that of the file of labels, if there is one.
    own = read_all(url, labels=str(tmp_path / "own.npy"), label_column="mine", extra_columns="drop")
    assert own["label"].to_pylist() == LABELS.tolist()


@pytest.mark.parametrize("labels", [["cat", "dog", "cat"], [b"cat", b"dog", b"cat"], [["cat"], ["dog"], ["cat"]]])
@pytest.mark.parametrize("file", ["set.npz", "images.npy"])
def test_names_of_classes_are_read_from_the_file_that_the_refusal_says_how_to_write(tmp_path, labels, file):
    labels = np.array(labels)
    (tmp_path / "set").mkdir()
    if file == "set.npz":
        np.savez(tmp_path / "set/set.npz", images=IMAGES[:3], labels=labels)
    else:
        np.save(tmp_path / "set/images.npy", IMAGES[:3])
        np.save(tmp_path / "set/labels.npy", labels)
    refused(tmp_path / "set", "numpy.save('names.npy', labels.astype(str).ravel())", "data.labels=names.npy")
    np.save(tmp_path / "names.npy", labels.astype(str).ravel())
    table = read_all(tmp_path / "set", labels=str(tmp_path / "names.npy"))
    assert table["label"].to_pylist() == [0, 1, 0]


@pytest.mark.parametrize("labels", [np.array([0.0, 2, 1]), np.eye(3), np.array([[0], [2], [1]])])
def test_labels_that_are_not_asked_for_are_not_compared_with_the_classes(tmp_path, labels):
    np.savez(tmp_path / "set.npz", images=IMAGES[:3], labels=labels, classes=np.array(["a", "b"]))
    refused(tmp_path, "label 2 is out of range, there are 2 classes")
    assert read_all(tmp_path, labels="none").column_names == ["id", "image"]
    np.save(tmp_path / "own.npy", [1, 0, 1])
    assert read_all(tmp_path / "set.npz", labels=str(tmp_path / "own.npy"))["label"].to_pylist() == [1, 0, 1]


def test_damaged_archives_are_refused(tmp_path):
    url = put(tmp_path / "s", images=IMAGES)
    np.save(tmp_path / "whole.npy", IMAGES)
    file = tmp_path / "s" / "set.npz"
    whole = file.read_bytes()
    for content in (b"", b"PK", whole[:-30], b"x" * 100):
        file.write_bytes(content)
        refused(url, "not a readable NumPy file")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    refused(url, "'notes.txt' is no array")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(".npy", (tmp_path / "whole.npy").read_bytes())
    refused(url, "'.npy' is no array")
    np.save(tmp_path / "s" / "short.npy", IMAGES)
    file.unlink()
    short = tmp_path / "s" / "short.npy"
    short.write_bytes(short.read_bytes()[:-10])
    refused(url, "ends too soon", reading=True)


def test_a_label_file_is_named_by_the_label_column_or_asked_for(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 3), np.uint8))
    np.save(tmp_path / "ids.npy", np.array([4, 5]))
    assert read_all(str(tmp_path), label_column="ids")["label"].to_pylist() == [4, 5]
    refused(str(tmp_path), "give data.labels=FILE")
    refused(str(tmp_path), "no file other.npy lies beside it", label_column="other")
    np.save(tmp_path / "ids.npy", np.array([4, 5, 6]))
    refused(str(tmp_path), "labels of 2 images are expected", label_column="ids")
    assert read_all(str(tmp_path), label_column="ids", labels="none").column_names == ["id", "image"]
