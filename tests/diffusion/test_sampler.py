"""The sampler against diffusers, a closed form on Gaussians and its own promises about keys and rounding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eclipse_ray.diffusion import sampling as room
from eclipse_ray.diffusion.network import fast_precision
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.process import ancestral_step, cosine_alphas_cumprod, predict_x0
from eclipse_ray.diffusion.sampling import (
    absorb,
    eliminate,
    purify_images,
    to_model_range,
    to_uint8,
)
from eclipse_ray.errors import ConfigError, InputError
from tests.support import untrained_denoiser

T = 4000
SCHEDULE = cosine_alphas_cumprod(T)


@pytest.fixture(scope="module")
def denoiser():
    return untrained_denoiser()


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_gaussian_data_keep_their_law(steps):
    """With the exact eps of data N(0, s^2), the variance after many steps is s^2, after one that of the MMSE."""
    s2, t_star = 0.04, 100

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = float(SCHEDULE[int(t[0])])
        return (1 - abar) ** 0.5 * x_t / (abar * s2 + 1 - abar)

    ids = [f"i{index}" for index in range(64)]
    x = 0.2 * noise(1, ids, 0, (3, 32, 32))
    x_t = absorb(x, SCHEDULE, t_star, 2, ids)
    result = eliminate(x_t, network, SCHEDULE, t_star, steps, 2, ids)
    abar = float(SCHEDULE[t_star - 1])
    one_step = abar * s2**2 / (abar * s2 + 1 - abar)
    expected = one_step if steps == 1 else s2
    # Few steps lie between the two; the standard error of the variance is s2 sqrt(2 / n).
    tolerance = 5 * s2 * (2 / x.numel()) ** 0.5 + (0 if steps in (1, 100) else 0.15 * (s2 - one_step))
    assert float(result.var()) == pytest.approx(expected, abs=tolerance + (2e-4 if steps == 100 else 0))


def test_one_step_is_x0_pred(denoiser):
    ids = ["a", "b"]
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    x_t = absorb(x, denoiser.alphas_cumprod, 4, 0, ids)
    with torch.inference_mode():
        direct = predict_x0(x_t, denoiser(x_t, torch.full((2,), 3)), float(denoiser.alphas_cumprod[3]))
        sampled = eliminate(x_t, denoiser, denoiser.alphas_cumprod, 4, 1, 0, ids)
    assert torch.allclose(direct, sampled, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_image_does_not_depend_on_its_batch(denoiser, steps):
    images = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8)
    ids = [f"image-{index}" for index in range(64)]

    def in_batches(size: int) -> torch.Tensor:
        parts = [
            purify_images(images[i : i + size], denoiser, num_inference_steps=steps, ids=ids[i : i + size])
            for i in range(0, 64, size)
        ]
        return torch.cat(parts)

    whole, sevens = in_batches(64), in_batches(7)
    differing = (whole.int() - sevens.int()).abs()
    assert differing.max() <= 1
    assert (differing > 0).float().mean() <= 0.001
    order = torch.randperm(64)
    shuffled = purify_images(images[order], denoiser, num_inference_steps=steps, ids=[ids[i] for i in order])
    assert (shuffled.int() - whole[order].int()).abs().max() <= 1


def test_bands_of_rows_give_the_same_step(monkeypatch):
    x_t, x0_pred, drawn = (torch.rand(2, 3, 13, 7) for _ in range(3))
    mix = torch.rand(2, 3, 13, 7) * 2 - 1
    for learned in (None, mix):
        whole = ancestral_step(x_t, x0_pred, learned, drawn, 0.9, 0.95)
        monkeypatch.setattr(room, "BAND_PIXELS", 2 * 7 * 4)
        assert torch.equal(room._in_bands(x_t, x0_pred, learned, drawn, 0.9, 0.95), whole)


def test_seed_and_id_change_the_result(denoiser):
    images = torch.full((1, 16, 16, 3), 128, dtype=torch.uint8)
    base = purify_images(images, denoiser, ids=["a"])
    assert torch.equal(base, purify_images(images, denoiser, ids=["a"]))
    assert not torch.equal(base, purify_images(images, denoiser, ids=["b"]))
    assert not torch.equal(base, purify_images(images, denoiser, ids=["a"], seed=1))


def test_bfloat16_stays_near_float32(denoiser):
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    ids = ["a", "b", "c", "d"]
    exact = purify_images(images, denoiser, ids=ids).int()
    try:
        denoiser.precision = "bfloat16"
        half = purify_images(images, denoiser, ids=ids).int()
    finally:
        denoiser.precision = "float32"
    assert not torch.equal(half, exact), "bfloat16 was not used"
    # The network's eight bits are of the noise, whose deviation at this depth is a part of the image's range.
    assert (half - exact).abs().double().mean() < 2


def test_rounding_never_truncates():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    x = to_model_range(levels)
    assert torch.equal(to_uint8(x), levels)
    almost_half = 0.49 / 127.5
    assert torch.equal(to_uint8(x + almost_half), levels)
    assert torch.equal(to_uint8(x - almost_half), levels)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"t_star": 6}, ConfigError, "trained on"),
        ({"num_inference_steps": 5}, ConfigError, "num_inference_steps"),
        ({"ids": ["only one"]}, InputError, "one id"),
    ],
)
def test_misuse_is_explained(denoiser, options, error, words):
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(error, match=words):
        purify_images(images, denoiser, **{"ids": ["a", "b"], **options})


def test_an_image_too_small_to_purify_is_refused(denoiser):
    with pytest.raises(InputError, match="40x15 pixels; purification needs at least 16"):
        purify_images(torch.zeros(1, 15, 40, 3, dtype=torch.uint8), denoiser, ids=["a"])


# Reads its own high-water mark: ru_maxrss would begin with that of the process it was forked from.
MEMORY = """
import sys, torch
from eclipse_ray.compensation import bake
from eclipse_ray.config import load_config
from eclipse_ray.diffusion.network import build_denoiser, build_unet
from eclipse_ray.diffusion.sampling import purify_images
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
config = load_config(None, {"denoiser.preset": "debug", "denoiser.variance_type": sys.argv[4]}).denoiser
denoiser = build_denoiser(build_unet(config), config).eval()
image = torch.zeros(1, int(sys.argv[1]), int(sys.argv[2]), 3, dtype=torch.uint8)
before = peak()
result = purify_images(image, denoiser, ids=["a"], num_inference_steps=int(sys.argv[3]))
bake(result, ["a"], load_config().compensation, 0)
print(peak() - before)
"""


@pytest.mark.chaos
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_a_photograph_is_bounded():
    """In proportion, a 4000 x 3000 photograph then stays within 2 GiB; benchmarks/large_image.py runs that one."""
    height, width = 750, 1000
    # More than one step with a learned variance is what needs most.
    arguments = [str(height), str(width), "2", "learned_range"]
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    # Besides what grows with the image there are the activations of one pass, 2**18 pixels whatever the image.
    fixed = 150 * 2**20
    photograph = int(done.stdout) - fixed
    base = 400 * 2**20
    assert photograph * (4000 * 3000) / (height * width) + fixed + base < 2 * 2**30


@pytest.mark.parametrize(("found", "precision"), [({"avx512_bf16": True}, "bfloat16"), ({}, "float32")])
def test_the_precision_of_a_cpu_follows_from_its_instructions(monkeypatch, found, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert fast_precision(torch.device("cpu")) == precision
