"""Filters of classes: found on real photographs, undone, and left alone where there is none."""

from collections import Counter

import numpy as np
import pytest
import torch

from eclipse_ray.config import content_hash, load_config
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.diffusion.filters import (
    FOUND,
    SIDE,
    find_filters,
    identity,
    random_filter,
    recentred,
    undo_filters,
    undo_known,
)
from eclipse_ray.poisons.cuda import Cuda, class_filters, cuda_perturbation
from eclipse_ray.poisons.interface import LabelledImages
from eclipse_ray.quality import psnr


@pytest.fixture(scope="module")
def photographs(shared_data) -> torch.Tensor:
    """Return 1,300 test images of CIFAR-10."""
    folder = str(shared_data / "cifar10" / "test-*.parquet")
    found = load_images(folder, load_config(None, {"data.source": folder}).data, limit=1300)
    return torch.from_numpy(found.images)


def blurred(images: torch.Tensor, label: int) -> torch.Tensor:
    """Return the images as CUDA stores those of class `label`."""
    ids = [str(i) for i in range(len(images))]
    delta = cuda_perturbation(LabelledImages(images, torch.full((len(images),), label), ids, 10), Cuda(), 0)
    return ((images / 255 + delta) * 255).round().to(torch.uint8)


# A minute of one core.
@pytest.mark.chaos
def test_the_filter_of_each_blurred_class_is_found_and_a_clean_class_has_none(photographs):
    trusted, suspicious = photographs[:300], photographs[300:].clone()
    labels = torch.arange(1000) % 3
    for label in (1, 2):
        suspicious[labels == label] = blurred(suspicious[labels == label], label)
    heard: Counter[int] = Counter()
    found = find_filters(trusted, suspicious, labels, 0, 500, lambda done: heard.update([done]))
    assert set(heard) == set(range(1, 501))
    assert found is not None
    assert set(found) == {1, 2}
    for label, taps in found.items():
        true = recentred(class_filters(0, [label])[0].float())
        # What is left of the filter is a small part of it, and a point reflection would leave far more.
        assert (taps - true).norm() < 0.4 * (identity() - true).norm()
        assert float(taps.sum()) == pytest.approx(1)


def test_with_too_few_or_too_small_images_or_sets_it_cannot_be_told(photographs):
    few, labels = photographs[:50], torch.zeros(300, dtype=torch.int64)
    many = blurred(photographs[300:600], 1)
    said: list[int] = []
    assert find_filters(few, many, labels, 0, 100, said.append) is None
    assert not said
    assert find_filters(photographs[:200], many[:, :20, :20], labels, 0, 100, said.append) is None
    assert not said
    # A network that has seen ten sets is not believed.
    assert find_filters(photographs[:200], many, labels, 0, 10, said.append) is None
    assert said


def test_an_undone_filter_leaves_the_image(photographs):
    images = photographs[:64]
    true = recentred(class_filters(0, [2])[0].float())
    stored = blurred(images, 2)
    # CUDA divides by the largest value of each image, which is not undone.
    sharp = undo_filters(stored, true.expand(64, SIDE, SIDE))
    assert sharp.shape == images.shape
    assert sharp.dtype == torch.uint8

    def likeness(found: torch.Tensor) -> float:
        inner = (slice(None), slice(4, -4), slice(4, -4))
        scale = images[inner].float().mean((1, 2, 3)) / found[inner].float().mean((1, 2, 3))
        level = (found[inner].float() * scale[:, None, None, None]).round().clamp(0, 255).to(torch.uint8)
        return psnr(level, images[inner])

    assert likeness(sharp) > likeness(stored) + 5
    same = undo_filters(images, identity().expand(64, SIDE, SIDE))
    assert torch.equal(same[:, 2:-2, 2:-2], images[:, 2:-2, 2:-2])


def test_a_filter_is_undone_for_the_images_that_are_named_and_for_no_other(photographs):
    images = photographs[:4]
    taps = recentred(class_filters(0, [2])[0].float())
    assert (taps - identity()).norm() > FOUND
    result = undo_known(images, {content_hash(np.asarray(images[2])): taps})
    assert torch.equal(result[[0, 1, 3]], images[[0, 1, 3]])
    assert torch.equal(result[2:3], undo_filters(images[2:3], taps[None]))
    assert torch.equal(undo_known(images, {}), images)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_filter_keeps_brightness_and_has_its_largest_tap_in_the_middle(seed):
    taps = random_filter(torch.Generator().manual_seed(seed))
    assert taps.shape == (SIDE, SIDE)
    assert float(taps.sum()) == pytest.approx(1, abs=1e-5)
    assert int(taps.argmax()) == SIDE * SIDE // 2
