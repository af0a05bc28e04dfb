import pytest
import torch

from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.poisons import fit_poison, poison_fitted
from eclipse_ray.poisons.interface import quiet_session
from eclipse_ray.poisons.sep import ensemble_noise, mean_gradient, targets, variance_reduced_noise, visits
from eclipse_ray.poisons.surrogate import features, load_surrogate
from eclipse_ray.victims.training import classify
from tests.poisons.helpers import (
    CLASSES,
    CPU,
    as_floats,
    check_resume,
    check_storage,
    part,
    tiny_config,
    tiny_images,
    tiny_settings,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"surrogate_batch_size": 8, "surrogate_epochs": 9, "checkpoints": 3, "steps": 10}
STEPS = tiny_settings("sep", steps=8, step_size_255=1.0)


@pytest.fixture(scope="module", params=["plain", "fa_vr"])
def fitted(request):
    data, config = tiny_images(48), tiny_config("sep", variant=request.param, **SETTINGS)
    state = check_resume(data, config, kill_at=4)
    return data, config, state, check_storage(data, state, config)


def quadratics(count=3):
    generator = torch.Generator().manual_seed(0)
    curves = [torch.rand(1, 3, 4, 4, generator=generator) + 0.1 for _ in range(count)]
    goals = [torch.rand(2, 3, 4, 4, generator=generator) for _ in range(count)]
    return [
        (lambda x, curve=curve, goal=goal: (curve * (x - goal).square()).sum())
        for curve, goal in zip(curves, goals, strict=True)
    ]


def picture():
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def test_the_gradient_of_the_ensemble_is_the_mean_over_checkpoints():
    objectives, x = quadratics(), picture().requires_grad_()
    (summed,) = torch.autograd.grad(sum(objective(x) for objective in objectives), x)
    assert torch.allclose(mean_gradient(objectives, x), summed / 3, atol=1e-6)


def test_every_checkpoint_is_asked_at_every_step():
    asked = [0, 0, 0]

    def counting(index, objective):
        def ask(x):
            asked[index] += 1
            return objective(x)

        return ask

    ensemble_noise(picture(), [counting(index, loss) for index, loss in enumerate(quadratics())], STEPS)
    assert asked == [8, 8, 8]


def test_noise_lowers_the_mean_loss_within_its_bound():
    objectives, x = quadratics(), picture()

    def mean_loss(noise):
        return float(sum(objective(x + noise) for objective in objectives)) / 3

    visited = torch.randint(3, (8, 4), generator=torch.Generator().manual_seed(3)).tolist()
    for noise in (ensemble_noise(x, objectives, STEPS), variance_reduced_noise(x, objectives, STEPS, visited)):
        assert float(noise.abs().max()) <= 8 / 255 + 1e-6
        assert mean_loss(noise) < mean_loss(torch.zeros_like(x)) - 0.1


def test_with_one_checkpoint_and_one_inner_step_variance_reduction_changes_nothing():
    objectives, x = quadratics(1), picture()
    plain = ensemble_noise(x, objectives, STEPS)
    assert torch.equal(variance_reduced_noise(x, objectives, STEPS, [[0]] * 8), plain)


def test_variance_reduction_follows_the_mean_when_all_checkpoints_are_visited_from_the_outer_point():
    # At the outer point the first correction takes a checkpoint's own gradient back to the mean.
    objectives, x = quadratics(), picture()
    one = STEPS.model_copy(update={"steps": 1})
    for index in range(3):
        assert torch.equal(
            variance_reduced_noise(x, objectives, one, [[index]]), ensemble_noise(x, objectives, one)
        )


def test_targets_are_half_the_classes_further_on_unless_set():
    labels = torch.tensor([0, 4, 5, 9])
    assert targets(labels, tiny_settings("sep"), 10).tolist() == [5, 9, 0, 4]
    assert targets(torch.tensor([0, 1, 2]), tiny_settings("sep"), 3).tolist() == [1, 2, 0]
    assert targets(labels, tiny_settings("sep", target_shift=3), 10).tolist() == [3, 7, 8, 2]
    with pytest.raises(ConfigError, match="own class"):
        targets(labels, tiny_settings("sep", target_shift=10), 10)


def test_inner_draws_visit_all_checkpoints_in_an_order_of_the_seed():
    config = tiny_settings("sep", variant="fa_vr", steps=10, inner_draws=5, checkpoints=3)
    rows = visits(config, 0)
    assert [len(row) for row in rows] == [5] * 10
    assert {index for row in rows for index in row} == {0, 1, 2}
    assert rows == visits(config, 0) != visits(config, 1)


def test_checkpoints_differ_and_all_of_them_are_moved_to_the_target(fitted):
    data, config, state, poisoned = fitted
    models = [load_surrogate(state, index, config, CLASSES, CPU) for index in range(3)]
    aim = (data.labels + 2) % CLASSES
    with torch.no_grad():
        clean = [classify(model, as_floats(data.images)).log_softmax(1) for model in models]
        moved = [classify(model, as_floats(poisoned)).log_softmax(1) for model in models]
    assert not torch.allclose(clean[0], clean[2], atol=1e-2)
    rows = torch.arange(len(aim))
    for before, after in zip(clean, moved, strict=True):
        assert float((after - before)[rows, aim].mean()) > 0.1


def test_features_come_closer_to_the_mean_of_the_target_class():
    data, config = tiny_images(48), tiny_config("sep", variant="fa_vr", **SETTINGS)
    state = fit_poison(data, config, 3, quiet_session())
    poisoned = poison_fitted(data, state, config, 3)
    assert state["means"].shape[:2] == (3, CLASSES)
    aim = (data.labels + 2) % CLASSES
    for index in range(3):
        model = load_surrogate(state, index, config, CLASSES, CPU)

        def distance(images, model=model, index=index):
            with torch.no_grad():
                return (features(model, as_floats(images)) - state["means"][index][aim]).square().mean()

        assert float(distance(poisoned)) < 0.9 * float(distance(data.images))


def test_alignment_needs_images_of_every_class():
    data = part(tiny_images(48), [row for row in range(48) if row % 4 != 1])
    config = tiny_config("sep", variant="fa_vr", **(SETTINGS | {"checkpoints": 1, "surrogate_epochs": 1}))
    with pytest.raises(InputError, match="class 1 of 4"):
        fit_poison(data, config, 0, quiet_session())
