"""PSNR and SSIM against closed forms and scikit-image."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from eclipse_ray.errors import InputError
from eclipse_ray.quality import EQUAL_PSNR, STRIP, changes, psnr, ssim, survival


def images(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 20, 17, 3), np.uint8))


def test_psnr_is_that_of_the_mean_squared_error_over_all_images():
    clean = torch.full((300, 4, 4, 3), 100, dtype=torch.uint8)
    changed = clean.clone()
    changed[:150] += 8
    assert psnr(changed, clean) == pytest.approx(10 * math.log10(255**2 / 32))
    assert psnr(clean, clean) == math.inf
    x = torch.zeros(1, 3, 4, 4)
    assert psnr(x, x + 0.2, peak=2) == pytest.approx(20)
    first, second = images(3, 0), images(3, 1)
    assert psnr(first, second) == pytest.approx(peak_signal_noise_ratio(second.numpy(), first.numpy()))


def test_ssim_agrees_with_scikit_image():
    clean = images(3, 0)
    noise = torch.randint(-30, 31, clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = (clean.int() + noise).clamp(0, 255).to(torch.uint8)
    settings = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(one.numpy(), other.numpy(), **settings)
        for one, other in zip(noisy, clean, strict=True)
    ]
    assert ssim(noisy, clean) == pytest.approx(np.mean(expected), abs=1e-4)
    assert ssim(clean, clean) == pytest.approx(1)


def test_the_change_of_each_image_is_its_psnr_and_the_ssim_of_every_fourth_window_of_its_brightness():
    # Higher than a strip, so that windows reach from one strip into the next.
    rng = np.random.default_rng(0)
    clean = torch.from_numpy(rng.integers(0, 256, (2, STRIP + 25, 19, 3), np.uint8))
    noisy = (clean.int() + torch.from_numpy(rng.integers(-30, 31, clean.shape))).clamp(0, 255).to(torch.uint8)
    noisy[1] = clean[1]
    decibels, likeness = changes(noisy, clean)
    assert decibels.tolist() == pytest.approx([psnr(noisy[:1], clean[:1]), EQUAL_PSNR], abs=1e-4)
    luma = np.array([0.299, 0.587, 0.114])
    settings = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, full = structural_similarity(noisy[0].numpy() @ luma, clean[0].numpy() @ luma, full=True, **settings)
    windows = full[5:-5:4, 5:-5:4]
    assert likeness.tolist() == pytest.approx([windows.mean(), 1], abs=1e-4)
    assert changes(noisy[:, :10], clean[:, :10])[1].isnan().all()


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="must be"):
        psnr(images(2, 0), images(3, 0))
    with pytest.raises(InputError, match="at least 11 pixels"):
        ssim(images(2, 0)[:, :8], images(2, 0)[:, :8])


def test_survival_is_the_part_of_the_perturbation_that_is_left():
    clean = images(3, 0) // 2 + 32
    delta = torch.randint(0, 2, clean.shape, generator=torch.Generator().manual_seed(0)) * 16 - 8
    poisoned = (clean.int() + delta).to(torch.uint8)
    assert survival(poisoned, clean, poisoned, clean) == 1
    assert survival(clean, clean, poisoned, clean) == 0
    # What a defense does to all images alike is no survival, and half of the perturbation is half.
    half = (clean.int() + delta // 2 + 5).to(torch.uint8)
    assert survival(half, (clean.int() + 5).to(torch.uint8), poisoned, clean) == pytest.approx(0.5)
    draws = torch.stack([poisoned, clean, half])
    same = torch.stack([clean, clean, (clean.int() + 5).to(torch.uint8)])
    assert survival(draws, same, poisoned, clean) == pytest.approx(0.5)
    assert survival(clean, clean, clean, clean) is None
