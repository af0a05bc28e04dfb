"""Drawing t: the published probabilities, unbiased weights, and what is remembered."""

import pytest
import torch

from eclipse_ray.diffusion.training import draw_timesteps, record_losses, start_losses, timestep_probabilities


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(t_max=6, seed=0):
    history = start_losses(t_max)
    t = torch.arange(t_max).repeat(10)
    losses = torch.rand(10 * t_max, generator=generator(seed)) * (1 + t)
    record_losses(history, t, losses)
    return history, losses.view(10, t_max)


def test_probabilities_are_the_closed_form():
    history, losses = filled()
    root = losses.double().square().mean(dim=0).sqrt()
    expected = 0.999 * root / root.sum() + 0.001 / 6
    assert torch.allclose(timestep_probabilities(history), expected, atol=1e-12)


def test_uniform_until_every_timestep_has_ten_losses():
    history = start_losses(3)
    record_losses(history, torch.tensor([0, 1, 2] * 9 + [0, 1]), torch.arange(29.0))
    assert torch.equal(timestep_probabilities(history), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.equal(draw_timesteps(3, 50, generator(), history)[1], torch.ones(50))
    record_losses(history, torch.tensor([2]), torch.tensor([100.0]))
    assert timestep_probabilities(history)[2] > 0.4


def test_only_the_last_ten_losses_count():
    history = start_losses(2)
    record_losses(history, torch.tensor([0, 1] * 10), torch.full((20,), 1e6))
    record_losses(history, torch.tensor([1] * 3 + [0] * 10 + [1] * 7), torch.full((20,), 3.0))
    assert torch.equal(history["losses"], torch.full((2, 10), 3.0))


def test_the_weighted_loss_is_unbiased():
    history, _ = filled()
    loss_of = torch.tensor([5.0, 1.0, 0.0, 2.0, 9.0, 4.0])
    t, weights = draw_timesteps(6, 200_000, generator(1), history)
    weighted = weights * loss_of[t]
    error = float(weighted.std()) / 200_000**0.5
    assert float(weighted.mean()) == pytest.approx(float(loss_of.mean()), abs=5 * error)
    # Drawn as often as they should be, or the average above would hide two mistakes.
    share, expected = torch.bincount(t, minlength=6) / 200_000, timestep_probabilities(history)
    assert torch.allclose(share.double(), expected, atol=0.006)
    assert (expected - 1 / 6).abs().max() > 0.1


def test_a_history_as_long_as_the_published_schedule_is_small():
    history = start_losses(4000)
    assert history["losses"].shape == (4000, 10)
    assert sum(value.nbytes for value in history.values()) < 200_000


@pytest.mark.parametrize("history", [None, filled(5)[0]])
def test_a_draw_depends_on_generator_and_history_alone(history):
    first, again = (draw_timesteps(5, 64, generator(2), history) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].min() >= 0
    assert first[0].max() <= 4
    assert not torch.equal(first[0], draw_timesteps(5, 64, generator(3), history)[0])
