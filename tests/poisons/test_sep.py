import torch

from eclipse_ray.poisons.sep import ensemble_noise, mean_gradient, target_labels, variance_reduced_noise


def quadratics(count=3, size=4):
    generator = torch.Generator().manual_seed(0)
    curves = [torch.rand(1, 3, size, size, generator=generator) + 0.1 for _ in range(count)]
    goals = [torch.rand(2, 3, size, size, generator=generator) for _ in range(count)]
    return [
        (lambda x, curve=curve, goal=goal: (curve * (x - goal).square()).sum())
        for curve, goal in zip(curves, goals, strict=True)
    ]


def test_the_gradient_of_the_ensemble_is_the_mean_over_checkpoints():
    objectives = quadratics()
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (summed,) = torch.autograd.grad(sum(objective(x) for objective in objectives), x)
    assert torch.allclose(mean_gradient(objectives, x), summed / 3, atol=1e-6)


def test_every_checkpoint_is_asked_at_every_step():
    asked = [0, 0, 0]

    def counting(index, objective):
        def ask(x):
            asked[index] += 1
            return objective(x)

        return ask

    objectives = [counting(index, objective) for index, objective in enumerate(quadratics())]
    ensemble_noise(objectives, torch.full((2, 3, 4, 4), 0.5), 0.03, 0.004, steps=5)
    assert asked == [5, 5, 5]


def test_noise_lowers_the_mean_loss_within_its_bound():
    objectives = quadratics()
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))

    def mean_loss(noise):
        return float(sum(objective(x + noise) for objective in objectives)) / 3

    choices = torch.randint(3, (12, 4), generator=torch.Generator().manual_seed(3)).tolist()
    for noise in (
        ensemble_noise(objectives, x, 0.03, 0.004, steps=12),
        variance_reduced_noise(objectives, x, 0.03, 0.004, choices),
    ):
        assert float(noise.abs().max()) <= 0.03 + 1e-6
        assert mean_loss(noise) < mean_loss(torch.zeros_like(x)) - 0.1


def test_with_one_checkpoint_and_one_inner_step_variance_reduction_changes_nothing():
    (objective,) = quadratics(1)
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    plain = ensemble_noise([objective], x, 0.03, 0.004, steps=6)
    assert torch.equal(variance_reduced_noise([objective], x, 0.03, 0.004, [[0]] * 6), plain)


def test_targets_are_half_the_classes_further_on():
    assert target_labels(torch.tensor([0, 4, 5, 9]), 10).tolist() == [5, 9, 0, 4]
    assert target_labels(torch.tensor([0, 1, 2]), 3).tolist() == [1, 2, 0]
