"""The cosine schedule against its closed form and diffusers; respacing."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from eclipse_ray.diffusion.process import cosine_alphas_cumprod, noise_std, respaced_timesteps


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
