"""The schedule, single steps and whole chains against closed forms and diffusers; promises about keys."""

import copy
import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from eclipse_ray.diffusion import sampling as room
from eclipse_ray.diffusion.network import build_denoiser, build_unet, fast_precision
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.process import (
    ancestral_step,
    cosine_alphas_cumprod,
    ddim_step,
    learned_variance,
    noise_std,
    posterior,
    predict_x0,
    respaced_timesteps,
)
from eclipse_ray.diffusion.sampling import absorb, eliminate, purify_images, to_model_range, to_uint8
from eclipse_ray.errors import ConfigError, InputError
from tests.support import debug_config, untrained_denoiser

T, T_STAR = 4000, 100
SCHEDULE = cosine_alphas_cumprod(T)
DEVIATION = 0.2
IDS = ["a", "b"]


@pytest.mark.parametrize("timesteps", [20, 1000, 4000])
def test_schedule_is_the_closed_form_until_betas_are_capped(timesteps):
    def signal(level: float) -> float:
        return math.cos((level + 0.008) / 1.008 * math.pi / 2) ** 2

    ours = cosine_alphas_cumprod(timesteps)
    # Betas pass 0.999 only at the very end, where the signal is all but gone.
    for t in range(0, timesteps - 2, max(1, timesteps // 50)):
        assert float(ours[t]) == pytest.approx(signal((t + 1) / timesteps) / signal(0), abs=1e-12)


@pytest.mark.parametrize("timesteps", [20, 4000])
def test_schedule_equals_diffusers(timesteps):
    theirs = DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.allclose(cosine_alphas_cumprod(timesteps).float(), theirs, atol=2e-6)


def test_noise_at_the_published_depth_is_small():
    # t_star = 100 of 4000 is index 99: standard deviation 0.0499 on [-1, 1], 6.4 of 255 levels.
    std = noise_std(cosine_alphas_cumprod(4000), 99)
    assert std == pytest.approx(0.0499, abs=5e-5)
    assert std * 127.5 == pytest.approx(6.4, abs=0.05)


@pytest.mark.parametrize(("t_star", "steps"), [(1, 1), (100, 1), (100, 2), (100, 10), (100, 100), (7, 5)])
def test_respacing_starts_at_the_depth_with_even_strides(t_star, steps):
    visited = respaced_timesteps(t_star, steps)
    assert len(visited) == len(set(visited)) == steps
    assert visited[0] == t_star - 1
    assert visited == sorted(visited, reverse=True)
    strides = [high - low for high, low in zip(visited, [*visited[1:], -1], strict=True)]
    assert max(strides) - min(strides) <= 1


@pytest.mark.parametrize(("t_star", "steps"), [(10, 0), (10, 11)])
def test_impossible_respacing_is_refused(t_star, steps):
    with pytest.raises(ValueError, match="num_inference_steps"):
        respaced_timesteps(t_star, steps)


def random_denoiser():
    """An untrained network of the debug size with 6 channels, otherwise as in preset `paper`."""
    settings = {"variance_type": "learned_range", "rescale_timesteps": True, "num_train_timesteps": T}
    config = debug_config(**settings, t_star=T_STAR, t_max=T, num_inference_steps=T_STAR)
    torch.manual_seed(4)
    unet = build_unet(config)
    with torch.no_grad():
        # As large as a trained output: eps_pred about 1, mixes over all of -1..1.
        unet.conv_out.weight.mul_(4)
    return build_denoiser(unet, config).eval()


def published_chain(x, unet, seed):
    """Absorb and eliminate in float64, written from the papers; timesteps run from 1 to T as they do there."""

    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    beta = {t: min(1 - f(t) / f(t - 1), 0.999) for t in range(1, T_STAR + 1)}
    abar = {0: 1.0}
    for t in range(1, T_STAR + 1):
        abar[t] = abar[t - 1] * (1 - beta[t])
    shape = tuple(x.shape[1:])
    # Ho et al. 2020, eq. 4.
    eps = noise(seed, IDS, T_STAR, shape).double()
    x_t = math.sqrt(abar[T_STAR]) * x + math.sqrt(1 - abar[T_STAR]) * eps
    for t in range(T_STAR, 0, -1):
        # The network counts from 0 and is shown a thousandth part of T.
        shown = torch.full((len(x),), (t - 1) * 1000 / T)
        eps_pred, v = unet(x_t, shown).sample.chunk(2, dim=1)
        # Ho et al. 2020, eq. 15, clipped.
        x0 = torch.clip((x_t - math.sqrt(1 - abar[t]) * eps_pred) / math.sqrt(abar[t]), -1, 1)
        # Ho et al. 2020, eq. 7.
        mean = math.sqrt(abar[t - 1]) * beta[t] / (1 - abar[t]) * x0
        mean = mean + math.sqrt(1 - beta[t]) * (1 - abar[t - 1]) / (1 - abar[t]) * x_t
        if t == 1:
            return mean
        # Nichol & Dhariwal 2021, eq. 15, with v in -1..1 as their code has it.
        beta_tilde = (1 - abar[t - 1]) / (1 - abar[t]) * beta[t]
        weight = (v + 1) / 2
        variance = torch.exp(weight * math.log(beta[t]) + (1 - weight) * math.log(beta_tilde))
        x_t = mean + torch.sqrt(variance) * noise(seed, IDS, t - 1, shape).double()
    raise AssertionError("the chain ends at t = 1")


@pytest.mark.usefixtures("one_thread")
@torch.inference_mode()
def test_a_hundred_steps_are_the_published_formulas():
    denoiser = random_denoiser()
    exact = copy.deepcopy(denoiser).double()
    # Dark and bright parts, so that clipping happens.
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    expected = published_chain(x.double(), exact.unet, 5)
    # In float64 what is left is the rounding of 1 - abar / abar_previous, about 1e-5 at these depths.
    for network, image, tolerance in ((exact, x.double(), 1e-7), (denoiser, x, 1e-5)):
        x_t = absorb(image, network.alphas_cumprod, T_STAR, 5, IDS)
        ours = eliminate(x_t, network, network.alphas_cumprod, T_STAR, T_STAR, 5, IDS)
        assert ours.dtype == image.dtype
        assert float((ours - expected).abs().max()) < tolerance
    # The network mattered, and so did its variances.
    assert float((expected - x).abs().max()) > 0.01
    fixed = eliminate(
        absorb(x, SCHEDULE, T_STAR, 5, IDS), lambda x, t: denoiser(x, t)[:, :3], SCHEDULE, T_STAR, T_STAR, 5, IDS
    )
    assert float((fixed - expected).abs().max()) > 1e-4


# Of 20 timesteps beta and beta_tilde are far apart, so that the mix shows; of 4000 they are close.
@pytest.mark.parametrize("kind", ["learned_range", "fixed_small"])
@pytest.mark.parametrize(("timesteps", "t"), [(20, 1), (20, 2), (20, 10), (T, 20), (T, 50), (T, 99), (T, 2000)])
def test_an_ancestral_step_equals_diffusers(kind, timesteps, t):
    schedule = cosine_alphas_cumprod(timesteps)
    scheduler = DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2", variance_type=kind, clip_sample=True)
    generator = torch.Generator().manual_seed(t)
    x_t, eps_pred = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
    mix = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    output = torch.cat([eps_pred, mix], dim=1) if kind == "learned_range" else eps_pred
    theirs = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(7)).prev_sample
    z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(7))
    abar, before = float(schedule[t]), float(schedule[t - 1])
    mean, fixed = posterior(x_t, predict_x0(x_t, eps_pred, abar), abar, before)
    variance = learned_variance(mix, abar, before) if kind == "learned_range" else torch.tensor(fixed)
    # diffusers keeps its schedule in float32, whose rounding is largest where abar is near 1.
    assert torch.allclose(mean + variance.sqrt() * z, theirs, atol=2e-5 if timesteps == 20 else 3e-4)


@pytest.mark.parametrize("t", [80, 99, 1000, 3000])
def test_a_ddim_step_equals_diffusers(t):
    stride = 40
    scheduler = DDIMScheduler(T, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    scheduler.set_timesteps(T // stride)
    x_t, eps_pred = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(t)).unbind()
    # Without this option diffusers moves along the unclipped eps_pred from a clipped x0_pred.
    theirs = scheduler.step(eps_pred, t, x_t, eta=0.0, use_clipped_model_output=True).prev_sample
    abar, before = float(SCHEDULE[t]), float(SCHEDULE[t - stride])
    ours = ddim_step(x_t, predict_x0(x_t, eps_pred, abar), abar, before)
    # Again the float32 schedule of diffusers.
    assert torch.allclose(ours, theirs, atol=3e-4)


def gaussian_network(schedule):
    """The exact eps_pred of data N(0, s^2)."""

    def network(x_t, t):
        abar = float(schedule[int(t[0])])
        return (1 - abar) ** 0.5 * x_t / (abar * DEVIATION**2 + 1 - abar)

    return network


def marginal(abar: float) -> float:
    """Standard deviation of x_t; the probability-flow solution keeps x_t divided by it."""
    return (abar * DEVIATION**2 + 1 - abar) ** 0.5


def global_error(sampler, steps):
    """Error at the last timestep of a chain whose steps are all alike in log-SNR."""
    levels = 256
    # Half log-SNR from 2.5 down to 1 at t = 255, so that halving a stride halves every step.
    half_log_snr = 2.5 - 1.5 * torch.arange(1, levels + 1, dtype=torch.float64) / levels
    schedule = torch.sigmoid(2 * half_log_snr)
    x_t = torch.full((1, 3, 2, 2), 0.7, dtype=torch.float64) * marginal(float(schedule[-1]))
    network = gaussian_network(schedule)
    result = eliminate(x_t, network, schedule, levels, steps, 0, ["a"], sampler)
    # The chain ends with x0_pred, whose factor on Gaussian data is known: divided out.
    abar = float(schedule[levels // steps - 1])
    x_last = result * marginal(abar) ** 2 / (abar**0.5 * DEVIATION**2)
    return float((x_last / marginal(abar) - 0.7).abs().max())


def test_halved_steps_halve_the_error_of_the_deterministic_sampler():
    errors = [global_error("ddim", steps) for steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.9 < coarse / fine < 2.1
    assert errors[-1] < 1e-3


def test_the_deterministic_sampler_reaches_the_flow_on_the_cosine_schedule():
    x_t = torch.linspace(-0.2, 0.2, 12, dtype=torch.float64).view(1, 3, 2, 2)
    network = gaussian_network(SCHEDULE)
    exact = x_t * DEVIATION / marginal(float(SCHEDULE[T_STAR - 1]))
    few, all_steps = (
        float((eliminate(x_t, network, SCHEDULE, T_STAR, steps, 0, ["a"], "ddim") - exact).abs().max())
        for steps in (5, 100)
    )
    assert all_steps < few / 5
    # A thousandth of the largest pixel; first-order steps near the clean end leave that much.
    assert all_steps < 2e-4


@pytest.fixture(scope="module")
def denoiser():
    return untrained_denoiser()


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_gaussian_data_keep_their_law(steps):
    """With the exact eps of data N(0, s^2), the variance after many steps is s^2, after one that of the MMSE."""
    s2, ids = DEVIATION**2, [f"i{index}" for index in range(64)]
    x = DEVIATION * noise(1, ids, 0, (3, 32, 32))
    x_t = absorb(x, SCHEDULE, T_STAR, 2, ids)
    result = eliminate(x_t, gaussian_network(SCHEDULE), SCHEDULE, T_STAR, steps, 2, ids)
    abar = float(SCHEDULE[T_STAR - 1])
    one_step = abar * s2**2 / (abar * s2 + 1 - abar)
    expected = one_step if steps == 1 else s2
    # Few steps lie between the two; the standard error of the variance is s2 sqrt(2 / n).
    tolerance = 5 * s2 * (2 / x.numel()) ** 0.5 + (0 if steps in (1, 100) else 0.15 * (s2 - one_step))
    assert float(result.var()) == pytest.approx(expected, abs=tolerance + (2e-4 if steps == 100 else 0))


def test_one_step_is_x0_pred(denoiser):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    x_t = absorb(x, denoiser.alphas_cumprod, 4, 0, IDS)
    with torch.inference_mode():
        direct = predict_x0(x_t, denoiser(x_t, torch.full((2,), 3)), float(denoiser.alphas_cumprod[3]))
        sampled = eliminate(x_t, denoiser, denoiser.alphas_cumprod, 4, 1, 0, IDS)
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
    ("height", "options", "error", "words"),
    [
        (16, {"t_star": 6}, ConfigError, "trained on"),
        (16, {"num_inference_steps": 5}, ConfigError, "num_inference_steps"),
        (16, {"sampler": "euler"}, ConfigError, "purify.sampler euler: expected one of ddpm, ddim"),
        (16, {"ids": ["only one"]}, InputError, "one id"),
        (16, {"ids": [1, 2]}, InputError, "ids that are texts"),
        (16, {"denoiser": "my/den"}, InputError, "'my/den' is no denoiser in memory; load it with load_denoiser"),
        (16, {"seed": -1}, InputError, "expected a seed from 0"),
        (15, {}, InputError, "40x15 pixels; purification needs at least 16"),
    ],
)
def test_misuse_is_explained(denoiser, height, options, error, words):
    images = torch.zeros(2, height, 40, 3, dtype=torch.uint8)
    with pytest.raises(error, match=words):
        purify_images(images, **{"denoiser": denoiser, "ids": IDS, **options})


def test_no_images_and_views_that_torch_does_not_take_are_purified(denoiser):
    none = np.zeros((0, 16, 16, 3), np.uint8)
    assert purify_images(none, denoiser, ids=[]).shape == none.shape
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images.flags.writeable = False
    expected = purify_images(torch.tensor(images), denoiser, ids=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(purify_images(images, denoiser, ids=IDS), expected)
        assert torch.equal(purify_images(images[:, ::-1][:, ::-1], denoiser, ids=IDS), expected)
        flipped = purify_images(images[:, ::-1], denoiser, ids=IDS)
    assert torch.equal(flipped, purify_images(images[:, ::-1].copy(), denoiser, ids=IDS))


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
