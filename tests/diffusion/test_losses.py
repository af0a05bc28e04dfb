"""Each term of the hybrid loss against closed forms on Gaussians."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from eclipse_ray.diffusion.process import cosine_alphas_cumprod, learned_variance
from eclipse_ray.diffusion.training import add_noise, decoder_nll, gaussian_kl, loss_hybrid, loss_simple, loss_vlb

SCHEDULE = cosine_alphas_cumprod(20)
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def batch(t, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(t), 3, 8, 8)
    x0 = torch.randint(0, 256, shape, generator=generator) / 127.5 - 1
    epsilon = torch.randn(shape, generator=generator)
    output = torch.randn(len(t), 6, 8, 8, generator=generator)
    return x0, epsilon, add_noise(x0, epsilon, torch.tensor(t), SCHEDULE), output


def unit_orthogonal(count):
    """Two vectors with mean square exactly 1 and product exactly 0: every second moment is the population's."""
    first, second = torch.randn(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    second = second - first * (first @ second) / (first @ first)
    return first / first.square().mean().sqrt(), second / second.square().mean().sqrt()


def test_kl_equals_torch_distributions():
    mean, log_variance, other_mean, other_log_variance = torch.randn(4, 100, dtype=torch.float64)
    ours = gaussian_kl(mean, log_variance, other_mean, other_log_variance)
    theirs = kl_divergence(
        Normal(mean, (0.5 * log_variance).exp()), Normal(other_mean, (0.5 * other_log_variance).exp())
    )
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.003), (0.3, 0.1), (-0.99, 0.02), (1.2, 0.5)])
def test_the_decoder_is_a_distribution_over_levels(mean, deviation):
    log_variance = torch.full_like(LEVELS, 2 * math.log(deviation))
    probabilities = torch.exp(-decoder_nll(LEVELS, torch.full_like(LEVELS, mean), log_variance))
    # 256 levels at the floor of 1e-12 add at most 2.6e-10.
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
def test_the_decoder_equals_the_integral_of_the_density(level):
    half, deviation = 1 / 255, torch.tensor(0.05, dtype=torch.float64)
    mean = LEVELS[level] + 0.11
    low = -3.0 if level == 0 else float(LEVELS[level]) - half
    high = 3.0 if level == 255 else float(LEVELS[level]) + half
    grid = torch.linspace(low, high, 200_001, dtype=torch.float64)
    integral = torch.trapezoid(Normal(mean, deviation).log_prob(grid).exp(), grid)
    ours = decoder_nll(LEVELS[level], mean, 2 * deviation.log())
    assert float(ours) == pytest.approx(-math.log(float(integral)), abs=1e-6)


def test_the_decoder_keeps_its_digits_in_the_tails_of_float32():
    x0, log_variance = LEVELS.float()[[60, 195]], torch.tensor([math.log(0.02)] * 2)
    mean = torch.tensor([float(LEVELS[60]) - 0.8, float(LEVELS[195]) + 0.8])
    exact = decoder_nll(x0.double(), mean.double(), log_variance.double())
    assert torch.allclose(decoder_nll(x0, mean, log_variance).double(), exact, rtol=1e-4)


def test_terms_are_bits_per_dimension_of_the_kl_and_of_the_decoder():
    t = [0, 1, 7, 19]
    x0, _, x_t, output = batch(t)
    ours = loss_vlb(output, x0, x_t, torch.tensor(t), SCHEDULE)
    for row, step in enumerate(t):
        abar, before = float(SCHEDULE[step]), float(SCHEDULE[step - 1]) if step else 1.0
        beta = 1 - abar / before
        pull, keep = before**0.5 * beta / (1 - abar), (1 - beta) ** 0.5 * (1 - before) / (1 - abar)
        image, noised, eps_pred, mix = (part.double() for part in (x0[row], x_t[row], *output[row].split(3)))
        x0_pred = (noised - (1 - abar) ** 0.5 * eps_pred) / abar**0.5
        mean = pull * x0_pred + keep * noised
        if step:
            truth = Normal(pull * image + keep * noised, (beta * (1 - before) / (1 - abar)) ** 0.5)
            nats = kl_divergence(truth, Normal(mean, learned_variance(mix, abar, before).sqrt()))
        else:
            # The variance lies between beta_tilde of t = 1 and beta of t = 0.
            low = (1 - float(SCHEDULE[1] / SCHEDULE[0])) * (1 - abar) / (1 - float(SCHEDULE[1]))
            weight = (mix + 1) / 2
            nats = decoder_nll(image, mean, weight * math.log(beta) + (1 - weight) * math.log(low))
        # x_t of the batch is float32.
        assert float(ours[row]) == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-5)


def test_the_bound_teaches_the_variance_alone():
    t = torch.tensor([0, 1, 10])
    x0, _, x_t, output = batch(t.tolist())
    output.requires_grad_()
    loss_vlb(output, x0, x_t, t, SCHEDULE).sum().backward()
    assert torch.equal(output.grad[:, :3], torch.zeros_like(output.grad[:, :3]))
    assert (output.grad[:, 3:].abs().amax(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("deviation", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("t", [1, 2, 6])
def test_the_bound_is_least_at_the_true_reverse_variance(deviation, t):
    """Of data N(0, s^2) it is known: beta_tilde for s = 0, beta for s = 1, and in between their mix."""
    abar, before = float(SCHEDULE[t]), float(SCHEDULE[t - 1])
    beta = 1 - abar / before
    beta_tilde = beta * (1 - before) / (1 - abar)
    marginal = abar * deviation**2 + 1 - abar
    given_x_t = deviation**2 * (1 - abar) / marginal
    truth = beta_tilde + before * (beta / (1 - abar)) ** 2 * given_x_t
    best = 2 * math.log(truth / beta_tilde) / math.log(beta / beta_tilde) - 1
    assert {0.0: -1.0, 1.0: 1.0}.get(deviation, best) == pytest.approx(best)
    x0, epsilon = (part.view(1, 3, 32, 32) for part in unit_orthogonal(3 * 32 * 32))
    x0 = deviation * x0
    x_t = abar**0.5 * x0 + (1 - abar) ** 0.5 * epsilon
    eps_pred = (1 - abar) ** 0.5 * x_t / marginal

    def slope(mix: float) -> float:
        point = torch.full_like(x0, mix, requires_grad=True)
        loss_vlb(torch.cat([eps_pred, point], dim=1), x0, x_t, torch.tensor([t]), SCHEDULE).sum().backward()
        return float(point.grad.sum())

    assert slope(best) == pytest.approx(0, abs=1e-9)
    assert slope(best - 0.01) < -1e-6
    assert slope(best + 0.01) > 1e-6


def test_the_hybrid_weighs_a_term_as_one_of_t_many():
    t = torch.tensor([0, 5, 12])
    x0, epsilon, x_t, output = batch(t.tolist())
    hybrid = loss_hybrid(lambda _x, _t: output, x0, epsilon, t, SCHEDULE, 1e-3)
    simple, bound = loss_simple(output[:, :3], epsilon), loss_vlb(output, x0, x_t, t, SCHEDULE)
    assert hybrid.shape == (3,)
    assert torch.allclose(hybrid, simple + 20 / 1000 * bound.float())
    assert torch.equal(loss_hybrid(lambda _x, _t: output[:, :3], x0, epsilon, t, SCHEDULE, 1e-3), simple)


def test_a_perfect_prediction_has_no_simple_loss():
    x0, epsilon = torch.rand(2, 4, 3, 8, 8).unbind()
    t = torch.tensor([0, 1, 2, 3])
    assert loss_hybrid(lambda _x, _t: epsilon, x0, epsilon, t, SCHEDULE, 0.0).tolist() == [0] * 4
    off = loss_hybrid(lambda _x, _t: epsilon + 0.5, x0, epsilon, t, SCHEDULE, 0.0)
    assert torch.allclose(off, torch.full((4,), 0.25))
