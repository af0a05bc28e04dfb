import pytest
import torch

from eclipse_ray.compensation import augment, bake
from eclipse_ray.config import CompensationConfig
from eclipse_ray.errors import InputError


def setting(p, sigma, coarse_sigma=0.0):
    return CompensationConfig(p=p, sigma=sigma, coarse_sigma=coarse_sigma)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def is_gray(images):
    return (images == images[:, :1]).flatten(1).all(dim=1)


def test_augment_without_effect_changes_nothing():
    images = torch.rand(4, 3, 8, 8, generator=generator())
    assert torch.equal(augment(images, setting(0.0, 0.0), generator()), images)


def test_gray_is_itu_luma_on_three_channels():
    images = torch.rand(4, 3, 8, 8, generator=generator())
    luma = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    gray = augment(images, setting(1.0, 0.0), generator())
    assert torch.allclose(gray, luma[:, None].expand_as(images), atol=1e-6)


def test_gray_frequency_and_noise_follow_the_settings():
    images = torch.rand(4000, 3, 4, 4, generator=generator()) * 0.2 + 0.4
    assert is_gray(augment(images, setting(0.4, 0.0), generator(1))).float().mean() == pytest.approx(0.4, abs=0.03)
    drawn = augment(images, setting(0.0, 0.05), generator(2)) - images
    assert drawn.std() == pytest.approx(0.05, rel=0.02)
    assert drawn.mean() == pytest.approx(0, abs=0.001)


def test_augment_is_drawn_anew_and_stays_in_range():
    images = torch.rand(8, 3, 8, 8, generator=generator())
    draws = generator(3)
    first, second = augment(images, setting(0.4, 0.5), draws), augment(images, setting(0.4, 0.5), draws)
    assert not torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, augment(images, setting(0.4, 0.5), generator(3)))


def test_bake_depends_only_on_seed_and_id():
    images = torch.randint(0, 256, (12, 8, 8, 3), generator=generator(), dtype=torch.uint8)
    ids = [f"image-{index}" for index in range(12)]
    whole = bake(images, ids, setting(0.4, 0.05), 7)
    for part in torch.randperm(12, generator=generator(1)).split(5):
        assert torch.equal(bake(images[part], [ids[i] for i in part], setting(0.4, 0.05), 7), whole[part])
    assert not torch.equal(bake(images, ids, setting(0.4, 0.05), 8), whole)
    assert torch.equal(bake(images, ids, setting(0.0, 0.0), 7), images)


def test_bands_of_rows_bake_the_same_pixels(monkeypatch):
    images = torch.randint(0, 256, (3, 13, 9, 3), generator=generator(), dtype=torch.uint8)
    whole = bake(images, ["a", "b", "c"], setting(0.5, 0.05, 0.08), 0)
    monkeypatch.setattr("eclipse_ray.compensation.BAND_PIXELS", 4 * 3 * 9)
    assert torch.equal(bake(images, ["a", "b", "c"], setting(0.5, 0.05, 0.08), 0), whole)


def test_a_colour_shift_is_one_number_per_image_and_channel():
    config = CompensationConfig(p=0.0, sigma=0.0, coarse_sigma=0.0, colour_sigma=0.02)
    images = torch.rand(4000, 3, 4, 4, generator=generator()) * 0.2 + 0.4
    moved = augment(images, config, generator(1)) - images
    assert (moved - moved[:, :, :1, :1]).abs().max() < 1e-6
    shifts = moved[:, :, 0, 0]
    assert shifts.std() == pytest.approx(0.02, rel=0.02)
    assert torch.corrcoef(shifts.T).fill_diagonal_(0).abs().max() < 0.05
    # Baked, it depends on seed and id, and comes on top of the coarse noise.
    stored, ids = (images[:8] * 255).round().to(torch.uint8).permute(0, 2, 3, 1), [str(i) for i in range(8)]
    baked = bake(stored, ids, config, 0).int() - stored.int()
    assert (baked == baked[:, :1, :1]).all()
    assert torch.equal(bake(stored[3:], ids[3:], config, 0).int() - stored[3:].int(), baked[3:])
    coarse = bake(stored, ids, setting(0.0, 0.0, 0.02), 0).int() - stored.int()
    both = bake(stored, ids, config.model_copy(update={"coarse_sigma": 0.02}), 0).int() - stored.int()
    assert (both - coarse - baked).abs().max() <= 1


def test_settings_of_before_the_colour_shift_have_the_fingerprint_that_they_had():
    before = {"mode": "augment", "p": 0.4, "sigma": 0.05, "coarse_sigma": 0.08, "coarse_grid": 6}
    assert CompensationConfig().model_dump(mode="json") == before
    shifted = CompensationConfig(colour_sigma=0.08)
    assert CompensationConfig.model_validate(shifted.model_dump(mode="json")) == shifted


def test_bake_rounds_and_never_truncates():
    images = torch.full((64, 16, 16, 3), 128, dtype=torch.uint8)
    ids = [str(index) for index in range(64)]
    baked = bake(images, ids, setting(0.4, 0.05), 0)
    assert baked.dtype == torch.uint8
    assert float(baked.double().mean()) == pytest.approx(128, abs=0.25)
    colours = torch.randint(0, 256, (64, 8, 8, 3), generator=generator(), dtype=torch.uint8)
    exact = (colours.double() * torch.tensor([0.299, 0.587, 0.114]).double()).sum(-1, keepdim=True)
    difference = bake(colours, ids, setting(1.0, 0.0), 0).double() - exact
    assert difference.abs().max() <= 0.5 + 1e-3


def test_bake_grays_about_p_of_the_images():
    images = torch.randint(0, 256, (500, 4, 4, 3), generator=generator(), dtype=torch.uint8)
    baked = bake(images, [str(index) for index in range(500)], setting(0.4, 0.0), 0)
    assert is_gray(baked.permute(0, 3, 1, 2)).float().mean() == pytest.approx(0.4, abs=0.07)


def test_bake_refuses_mismatched_ids():
    with pytest.raises(InputError, match="ids"):
        bake(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), ["a"], setting(0.4, 0.05), 0)
    with pytest.raises(InputError, match="uint8"):
        bake(torch.zeros(1, 4, 4, 3), ["a"], setting(0.4, 0.05), 0)


def test_coarse_noise_is_smooth_and_as_strong_as_set():
    images = torch.full((400, 3, 32, 32), 0.5)
    field = augment(images, setting(0.0, 0.0, 0.08), generator(4)) - 0.5
    # Exactly at the points of the grid it is as strong as set; bilinear between them, where it is weaker.
    assert 0.6 * 0.08 < float(field.std()) < 0.08
    steps = (field[..., 1:] - field[..., :-1]).abs().mean()
    assert steps < 0.3 * field.abs().mean(), "neighbouring pixels must move together"
    between = torch.corrcoef(field.permute(1, 0, 2, 3).flatten(1))
    assert (between - torch.eye(3)).abs().max() < 0.1, "the colours are drawn independently"


def test_baked_coarse_noise_belongs_to_the_image_and_no_key_is_used_twice():
    images = torch.full((8, 32, 48, 3), 128, dtype=torch.uint8)
    ids = [f"image-{index}" for index in range(8)]
    whole = bake(images, ids, setting(0.0, 0.0, 0.08), 7)
    assert torch.equal(bake(images[2:5], ids[2:5], setting(0.0, 0.0, 0.08), 7), whole[2:5])
    fine = bake(images, ids, setting(0.0, 0.05), 7).double() - 128
    overlap = torch.corrcoef(torch.stack([fine.flatten(), whole.double().flatten() - 128]))[0, 1]
    assert abs(overlap) < 0.1
