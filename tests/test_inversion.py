"""Inverted poison: within the bound, towards the class asked for, and what the denoiser learns to remove."""

import pytest
import torch

from eclipse_ray.diffusion.process import add_noise, cosine_alphas_cumprod, predict_x0
from eclipse_ray.diffusion.training import TYPICAL_INVERSION, loss_perturbed, run_fit, start_fit
from eclipse_ray.inversion import (
    HIGHEST_255,
    LOWEST_255,
    Inversion,
    fit_surrogate,
    invert,
    open_surrogate,
    surrogate_settings,
)
from eclipse_ray.poisons.interface import LabelledImages, quiet_session, to_float
from eclipse_ray.victims.training import classify
from tests.diffusion.test_training import CPU, smooth_images
from tests.support import UNET
from tests.support import debug_config as debug

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = cosine_alphas_cumprod(4000)
LEVELS = 12


def patterns() -> torch.Tensor:
    """Lines of +-1 for each of two classes, across and down, (2, 16, 16, 3), which no flip or crop hides."""
    across = (torch.arange(16) % 2 * 2 - 1).view(16, 1, 1).expand(16, 16, 3)
    return torch.stack([across, across.transpose(0, 1)])


@pytest.fixture(scope="module")
def poisoned() -> LabelledImages:
    """Images whose class is told by nothing but a pattern of a few levels."""
    labels = torch.arange(64) % 2
    clean = smooth_images(64).clamp(LEVELS, 255 - LEVELS).short()
    images = (clean + LEVELS * patterns()[labels]).to(torch.uint8)
    return LabelledImages(images, labels, [f"{index}" for index in range(64)], 2)


@pytest.fixture(scope="module")
def surrogate(poisoned):
    state = fit_surrogate(poisoned, 40, 0, quiet_session())
    return open_surrogate(state, 2, CPU)


def probability(model, images, classes) -> torch.Tensor:
    with torch.no_grad():
        return classify(model, images).softmax(1).gather(1, classes[:, None])[:, 0]


def test_an_inversion_makes_the_surrogate_see_the_class_within_the_bound(surrogate):
    images = to_float(smooth_images(24), CPU)
    classes = torch.arange(24) % 2
    before = probability(surrogate, images, classes)
    delta = invert(surrogate, images, classes, 6 / 255)
    after = probability(surrogate, images + delta, classes)
    assert (after > before).all()
    assert float(after.median()) > 0.7
    assert float(delta.abs().max()) <= 6 / 255 + 1e-6
    assert 0 <= float((images + delta).min()) <= float((images + delta).max()) <= 1


def test_it_finds_the_pattern_that_the_poison_adds(surrogate):
    images = to_float(smooth_images(24), CPU)
    wanted = patterns().permute(0, 3, 1, 2).float()
    for label in (0, 1):
        delta = invert(surrogate, images, torch.full((24,), label), 6 / 255)
        found = [float((delta * one).mean(dim=(1, 2, 3)).abs().mean()) for one in wanted]
        assert found[label] > 1.2 * found[1 - label]


def test_a_quarter_of_a_batch_stays_clean_and_the_rest_moves_by_8_to_20_levels(surrogate):
    inversion = Inversion([surrogate], 2, 16, 0)
    x0 = to_float(smooth_images(16), CPU) * 2 - 1
    largest = []
    for iteration in range(12):
        sizes = 127.5 * inversion([x0], iteration)[0].abs().amax(dim=(1, 2, 3))
        assert (sizes == 0).tolist() == [index % 4 == 0 for index in range(16)]
        largest.append(float(sizes.max()))
    assert min(largest) >= LOWEST_255 - 1e-3
    assert max(largest) <= HIGHEST_255 + 1e-3
    assert max(largest) - min(largest) > 2


def test_the_loss_knows_the_middle_of_the_bounds():
    assert pytest.approx((LOWEST_255 + HIGHEST_255) / 255) == TYPICAL_INVERSION


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_perturb_the_batch_of_one(surrogate, workers):
    x0 = to_float(smooth_images(16), CPU) * 2 - 1
    (whole,) = Inversion([surrogate], 2, 16, 0)([x0], 3)
    parts, first = [], 0
    for rank in range(workers):
        count = (rank + 1) * 16 // workers - first
        parts += Inversion([surrogate], 2, 16, 0, rank, workers)([x0[first : first + count]], 3)
        first += count
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


def test_surrogates_take_turns(surrogate):
    x0 = torch.zeros(4, 3, 16, 16)
    inversion = Inversion([surrogate, torch.nn.Module()], 2, 4, 0)
    assert float(inversion([x0], 0)[0].abs().max()) > 0
    with pytest.raises(NotImplementedError):
        inversion([x0], 1)


@pytest.mark.parametrize("first", [0, 3])
def test_several_batches_at_once_are_perturbed_as_one_at_a_time(surrogate, poisoned, first):
    other = open_surrogate(fit_surrogate(poisoned, 10, 1, quiet_session()), 2, CPU)
    inversion = Inversion([surrogate, other], 2, 8, 0)
    batches = list((to_float(smooth_images(40), CPU) * 2 - 1).split(8))
    together = inversion(batches, first)
    for number, (x0, delta) in enumerate(zip(batches, together, strict=True)):
        (alone,) = inversion([x0], first + number)
        assert torch.allclose(delta, alone, atol=1e-6)
        assert float(delta.abs().max()) > 0


@pytest.mark.parametrize(("images", "iterations", "epochs"), [(10_000, 3000, 12), (10, 3000, 1000), (256, 20, 10)])
def test_the_cost_of_a_surrogate_does_not_grow_with_the_set(images, iterations, epochs):
    assert surrogate_settings(images, iterations).surrogate_epochs == epochs


@pytest.mark.parametrize("t", [5, 100, 399])
def test_the_loss_is_least_where_x0_pred_is_the_clean_image(t):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(2, 3, 8, 8, generator=generator) - 0.5
    epsilon = torch.randn(2, 3, 8, 8, generator=generator)
    delta = 0.05 * torch.randn(2, 3, 8, 8, generator=generator)
    steps = torch.tensor([t, t])
    abar = float(SCHEDULE[t])
    x_t = add_noise(x0 + delta, epsilon, steps, SCHEDULE)
    eps_pred = (x_t - abar**0.5 * x0) / (1 - abar) ** 0.5
    assert torch.allclose(predict_x0(x_t, eps_pred, abar), x0, atol=1e-5)
    assert loss_perturbed(eps_pred, epsilon, delta, steps, SCHEDULE, 7 / 127.5).tolist() == pytest.approx(
        [0, 0], abs=1e-6
    )
    # A network that removes the noise alone pays for the perturbation, and at no timestep much more than 1.
    noise_alone = loss_perturbed(epsilon, epsilon, delta, steps, SCHEDULE, 7 / 127.5)
    ratio = abar / (1 - abar)
    expected = ratio * 0.05**2 / (1 + ratio * (7 / 127.5) ** 2)
    assert noise_alone.tolist() == pytest.approx([expected] * 2, rel=0.2)
    assert float(noise_alone.max()) < 1


def test_a_denoiser_trained_against_a_surrogate_removes_more_of_the_poison(surrogate):
    config = debug(iterations=80, learning_rate=3e-3, **UNET)
    clean, rho = smooth_images(64).clamp(LEVELS, 255 - LEVELS), {}
    x0 = to_float(clean[:8], CPU) * 2 - 1
    delta = (8 / 127.5) * patterns()[torch.arange(8) % 2].permute(0, 3, 1, 2).float()
    epsilon = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    for name, perturb in (("plain", None), ("against", Inversion([surrogate], 2, config.batch_size, 0))):
        fit = start_fit(config, 0, CPU)
        run_fit(fit, clean[8:], clean[:8], 0, lambda _: None, lambda _: None, perturb=perturb)
        denoiser, t = fit.averaged(), torch.full((8,), 4)
        purified = []
        for images in (x0 + delta, x0):
            x_t = add_noise(images, epsilon, t, denoiser.alphas_cumprod)
            with torch.no_grad():
                purified.append(predict_x0(x_t, denoiser(x_t, t)[:, :3], float(denoiser.alphas_cumprod[4])))
        rho[name] = float(((purified[0] - purified[1]) * delta).sum() / delta.square().sum())
    assert rho["against"] < rho["plain"] - 0.03
