import numpy as np
import pytest

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.synthetic import CLASSES, draw_synthetic, write_synthetic


@pytest.fixture(scope="module")
def drawn():
    return draw_synthetic(1500, seed=3)


def linear_accuracy(features, labels):
    # Ridge regression onto one-hot labels, fitted on the first half and tested on the second.
    half = len(features) // 2
    x = (features - features[:half].mean(0)) / (features[:half].std(0) + 1e-6)
    x = np.c_[x, np.ones(len(x))]
    weights = np.linalg.solve(
        x[:half].T @ x[:half] + 1000 * np.eye(x.shape[1]), x[:half].T @ np.eye(10)[labels[:half]]
    )
    return float(((x[half:] @ weights).argmax(1) == labels[half:]).mean())


@pytest.mark.parametrize("size", [16, 32])
def test_an_image_depends_on_its_index_alone(size):
    images, labels = draw_synthetic(260, size, seed=5)
    fewer, fewer_labels = draw_synthetic(7, size, seed=5)
    assert images.shape == (260, size, size, 3)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert np.array_equal(images[:7], fewer)
    assert np.array_equal(labels[:7], fewer_labels)


def test_seeds_and_indices_differ(drawn):
    images, labels = drawn
    assert len({image.tobytes() for image in images}) == 1500
    assert not np.array_equal(images[:10], draw_synthetic(10, seed=4)[0])
    assert np.bincount(labels).tolist() == [150] * len(CLASSES)


def test_colour_does_not_tell_the_class(drawn):
    images, labels = drawn
    colours = images.reshape(len(images), -1, 3) / 255
    assert linear_accuracy(np.c_[colours.mean(1), colours.std(1)], labels) < 0.17
    corners = images[:, ::4, ::4].reshape(len(images), -1) / 255
    assert linear_accuracy(corners, labels) < 0.25


def test_images_are_not_washed_out(drawn):
    images, _ = drawn
    assert 0.3 < images.mean() / 255 < 0.7
    assert np.mean((images == 0) | (images == 255)) < 0.1
    assert images.std((1, 2)).mean() > 12


def test_written_sets_load_and_ranges_are_disjoint(tmp_path):
    config = DataConfig()
    write_synthetic(str(tmp_path / "train"), 300)
    write_synthetic(str(tmp_path / "test"), 20, first=300)
    train, test = (load_images(str(tmp_path / name), config) for name in ("train", "test"))
    assert train.classes == list(CLASSES)
    assert (train.ids[1], test.ids[0]) == ("synthetic-000001", "synthetic-000300")
    images, labels = draw_synthetic(320)
    assert np.array_equal(np.concatenate([train.images, test.images]), images)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), labels)
    assert not set(train.hashes()) & set(test.hashes())
