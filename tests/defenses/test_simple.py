"""Cutout, MixUp and CutMix recomputed from the pixels; gray and JPEG images against Pillow itself."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from eclipse_ray.config import DefenseConfig
from eclipse_ray.datasets.images import jpeg_roundtrip
from eclipse_ray.defenses import DEFENSES
from eclipse_ray.defenses.adversarial import ueraser_max
from eclipse_ray.defenses.op import strong_augmentation
from eclipse_ray.defenses.simple import cutmix, cutout, mixup
from tests.defenses.support import batch, generator, images, linear_victim, material

MODEL = linear_victim()


def apply(augmentation, images, targets, seed=0):
    return augmentation(images, targets, MODEL, generator(seed), 0.0)


@pytest.mark.parametrize(("shape", "size"), [((32, 32), 16), ((24, 40), 7)])
def test_cutout_blackens_one_square_of_each_image(shape, size):
    images = torch.rand(200, 3, *shape, generator=generator(1)) * 0.9 + 0.05
    targets = torch.eye(200)
    cut, same = apply(cutout(DefenseConfig(cutout_size=size)), images, targets)
    assert torch.equal(same, targets)
    black = (cut == 0).all(dim=1)
    assert torch.equal(black, (cut == 0).any(dim=1)), "all three channels, or none"
    assert torch.equal(torch.where(black[:, None], images, cut), images), "the rest is left alone"
    corners = set()
    for hole in black:
        rows, columns = hole.any(dim=1).nonzero().flatten(), hole.any(dim=0).nonzero().flatten()
        assert len(rows) == len(columns) == size
        assert int(hole.sum()) == size**2, "one square in one piece"
        corners.add((int(rows[0]), int(columns[0])))
    assert len(corners) > 80, "it lies anywhere"


def test_mixup_targets_are_the_mixing_of_the_images():
    # Each image is its own one-hot target laid out as pixels, so mixing can be read off the pixels.
    targets = torch.eye(12)
    images = targets.view(12, 1, 3, 4).repeat(1, 3, 1, 1)
    weights = []
    for seed in range(200):
        mixed, soft = apply(mixup(DefenseConfig()), images, targets, seed)
        assert torch.allclose(mixed[:, 0].flatten(1), soft, atol=1e-6)
        assert torch.allclose(soft.sum(dim=1), torch.ones(12))
        moved = soft[(soft.diagonal() < 1)]
        if len(moved):
            weights.append(float(1 - soft.diagonal().min()))
            assert torch.allclose(soft.diagonal()[soft.diagonal() < 1], torch.tensor(1 - weights[-1]), atol=1e-6)
    assert float(torch.tensor(weights).mean()) == pytest.approx(0.5, abs=0.06), "one uniform weight for a batch"


def test_cutmix_weight_is_the_pasted_area():
    values = torch.arange(1, 41).float() / 40
    targets = torch.eye(40)
    images = values[:, None, None, None].expand(40, 3, 16, 16).clone()
    shares = set()
    for seed in range(40):
        mixed, soft = apply(cutmix(DefenseConfig()), images, targets, seed)
        for index in range(40):
            colours, counts = mixed[index, 0].unique(return_counts=True)
            expected = torch.zeros(40)
            for colour, count in zip(colours, counts, strict=True):
                expected[int((values - colour).abs().argmin())] += float(count) / 256
            assert torch.allclose(soft[index], expected, atol=1e-6)
        pasted = (mixed != images).any(dim=1)
        hole = pasted[pasted.flatten(1).any(dim=1)]
        if len(hole):
            assert torch.equal(hole, hole[:1].expand_as(hole)), "one rectangle for the batch"
            shares.add(round(float(hole[0].float().mean()), 3))
    assert len(shares) > 10


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("defense", [cutout, mixup, cutmix, ueraser_max, strong_augmentation])
def test_draws_come_from_the_generator_alone(defense):
    images, targets = batch()
    augmentation = defense(DefenseConfig(cutout_size=6))
    before = torch.get_rng_state()
    first = apply(augmentation, images, targets, 4)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers move"
    torch.manual_seed(99)
    second, other = (apply(augmentation, images, targets, seed) for seed in (4, 5))
    torch.set_rng_state(before)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == images.shape
    assert 0 <= float(first[0].min()) <= float(first[0].max()) <= 1


def test_gray_is_pillows_luma_on_three_channels():
    colours = torch.randint(0, 256, (24, 32, 32, 3), generator=generator(2), dtype=torch.uint8)
    found = DEFENSES["iss-g"].transform(material(images=colours), DefenseConfig())
    expected = np.stack([np.asarray(Image.fromarray(image.numpy()).convert("L")) for image in colours])
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.from_numpy(expected)[..., None].expand_as(found))


def test_jpeg_is_stored_by_pillow_with_coarse_chroma():
    smooth = images(3, 32)
    found = jpeg_roundtrip(smooth.numpy(), 10)
    assert found.dtype == np.uint8
    assert found.shape == smooth.shape
    for before, after in zip(smooth.numpy(), found, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(before).save(buffer, "JPEG", quality=10, subsampling="4:2:0")
        assert np.array_equal(np.asarray(Image.open(buffer)), after)
        fine = io.BytesIO()
        Image.fromarray(before).save(fine, "JPEG", quality=10, subsampling="4:4:4")
        assert not np.array_equal(np.asarray(Image.open(fine)), after)


def test_iss_jpeg_uses_the_quality_that_is_set():
    source = material()
    rough = DEFENSES["iss-j"].transform(source, DefenseConfig())
    fine = DEFENSES["iss-j"].transform(source, DefenseConfig(iss_jpeg_quality=90))
    error = [(found.double() - source.images).abs().mean() for found in (rough, fine)]
    assert error[0] > 2 * error[1] > 0
    assert np.array_equal(rough.numpy(), jpeg_roundtrip(source.images.numpy(), 10))
