import pytest
import torch

from eclipse_ray.attacks import crop_flip, keyed_crops
from eclipse_ray.poisons.rem import min_max_noise
from eclipse_ray.poisons.surrogate import attack_from, load_surrogate
from tests.poisons.helpers import (
    CLASSES,
    CPU,
    as_floats,
    check_resume,
    check_storage,
    losses,
    tiny_config,
    tiny_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "surrogate_batch_size": 8,
    "train_steps": 50,
    "surrogate_milestones": (40,),
    "eot_draws": 2,
    "steps": 4,
    "adversary_steps": 1,
}


@pytest.fixture(scope="module")
def fitted():
    data, config = tiny_images(48), tiny_config("rem", **SETTINGS)
    return data, config, check_resume(data, config, kill_at=1)


def test_a_fit_that_was_stopped_goes_on_as_if_it_never_was(fitted):
    _, config, state = fitted
    model = load_surrogate(state, 0, config, CLASSES, CPU)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_adversary_raises_the_loss_within_its_radius(fitted):
    data, config, state = fitted
    model, images = load_surrogate(state, 0, config, CLASSES, CPU), as_floats(data.images)
    moved = images + attack_from(model, images, data.labels, config, torch.full_like(images, 0.5))
    assert float((moved - images).abs().max()) <= 4 / 255 + 1e-6
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    raised = losses(model, moved, data.labels) - losses(model, images, data.labels)
    assert float((raised > 0).float().mean()) > 0.95


def test_noise_lowers_the_loss_that_an_adversary_leaves(fitted):
    data, config, state = fitted
    model = load_surrogate(state, 0, config, CLASSES, CPU)
    poisoned = check_storage(data, state, config)

    def worst(images):
        total = torch.zeros(len(images))
        for crops in keyed_crops(11, data.ids, 0, 4, 2):
            seen = crop_flip(as_floats(images), crops, 2)
            attacked = seen + attack_from(model, seen, data.labels, config, torch.full_like(seen, 0.5))
            total += losses(model, attacked, data.labels)
        return total / 4

    assert float((worst(poisoned) < worst(data.images)).float().mean()) > 0.9
    assert float(worst(poisoned).mean()) < 0.8 * float(worst(data.images).mean())


def test_every_step_follows_the_gradient_at_the_worst_point(fitted):
    data, config, state = fitted
    model = load_surrogate(state, 0, config, CLASSES, CPU)
    images, labels = as_floats(data.images)[:8], data.labels[:8]
    one = config.model_copy(update={"steps": 1, "eot_draws": 1, "step_size_255": 1.0})
    upright = (torch.full((2, 8), 2), torch.zeros(8, dtype=torch.bool))
    middle = torch.full_like(images, 0.5)
    noise = min_max_noise(model, images, labels, one, [upright], lambda _slot: middle)
    worst = (images + attack_from(model, images, labels, one, middle)).requires_grad_()
    with torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(model((worst - 0.5) / 0.25), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, worst)
    inside = (images > 0) & (images < 1)
    assert torch.allclose(noise[inside], -gradient.sign()[inside] / 255, atol=1e-7)
