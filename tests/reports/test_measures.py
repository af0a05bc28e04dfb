"""Numbers of a report against closed forms."""

import numpy as np
import pytest

from eclipse_ray.diffusion.process import cosine_alphas_cumprod
from eclipse_ray.reports.charts import DARK, LIGHT, amplified, draw
from eclipse_ray.reports.purified import (
    PAPER_SQUARED_NORM,
    difference,
    kl_nats,
    part_left,
    power_spectrum,
    radial_mean,
)


def wave(side: int, cycles: int) -> np.ndarray:
    row = np.cos(2 * np.pi * cycles * np.arange(side) / side)
    return np.repeat(np.tile(row, (side, 1))[:, :, None], 3, axis=2)


def test_the_divergence_of_the_paper_s_setting_is_802_nats():
    alphas = cosine_alphas_cumprod(4000).numpy()
    assert round(float(kl_nats(PAPER_SQUARED_NORM, alphas)[99])) == 802


def test_the_divergence_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    delta, abar = rng.normal(size=(4, 4, 3)), 0.7
    variance = 1 - abar
    x = rng.normal(size=(200_000, delta.size)) * variance**0.5
    mean = (abar**0.5 * delta).ravel()
    # E_p[log p - log q] with p = N(mean, variance), q = N(0, variance).
    shifted = x + mean
    estimate = (((shifted**2).sum(1) - (x**2).sum(1)) / (2 * variance)).mean()
    exact = float(kl_nats(float((delta**2).sum()), np.array([abar]))[0])
    assert estimate == pytest.approx(exact, rel=0.01)


def test_a_wave_lies_at_its_frequency_and_power_is_the_mean_square():
    change = wave(32, 8)
    power = power_spectrum([change])
    assert power.mean() == pytest.approx((change**2).mean())
    frequencies, mean = radial_mean(power)
    assert frequencies[int(np.argmax(mean))] == pytest.approx(8 / 32)


def test_what_is_left_is_the_coefficient_of_the_perturbation():
    assert part_left([0.25 * wave(32, 1) + wave(32, 5)], [wave(32, 1)]) == pytest.approx(0.25)


def test_images_of_several_sizes_have_one_spectrum():
    assert power_spectrum([np.zeros((20, 32, 3)), np.ones((16, 16, 3))]).shape == (16, 16)


def test_differences_are_on_the_scale_of_the_denoiser_and_enlarged_around_gray():
    one, other = np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)
    assert difference(one, other).max() == pytest.approx(2)
    assert amplified(other + 3, other).tolist() == np.full((2, 2, 3), 158).tolist()
    assert amplified(one, other).max() == 255


def test_a_dark_drawing_is_the_light_one_in_other_colours():
    def paint(axes):
        axes.plot([0, 1], [0, 1], color=LIGHT.series[0])
        axes.set(xlabel="$not math$ <b>")

    chart = draw("line", "a line", "a line", paint)
    assert LIGHT.series[0].encode() in chart.light
    assert DARK.series[0].encode() in chart.dark
    assert LIGHT.series[0].encode() not in chart.dark
    assert b"$not math$ &lt;b&gt;" in chart.light
    assert chart.png.startswith(b"\x89PNG")
    assert draw("line", "a line", "a line", paint).light == chart.light
