"""The reverse process: learned variances and the published chain step by step; the deterministic samplers."""

import copy
import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from eclipse_ray.config import load_config
from eclipse_ray.diffusion.network import build_denoiser, build_unet
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.process import cosine_alphas_cumprod, ddim_step, learned_variance, posterior, predict_x0
from eclipse_ray.diffusion.sampling import absorb, eliminate

T, T_STAR = 4000, 100
SCHEDULE = cosine_alphas_cumprod(T)
IDS = ["a", "b"]


def random_denoiser():
    """An untrained network of the debug size with 6 channels, otherwise as in preset `paper`."""
    settings = {"variance_type": "learned_range", "rescale_timesteps": True, "num_train_timesteps": T}
    settings |= {"preset": "debug", "t_star": T_STAR, "t_max": T, "num_inference_steps": T_STAR}
    config = load_config(None, {f"denoiser.{key}": value for key, value in settings.items()}).denoiser
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


DEVIATION = 0.2


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
