import pytest
import torch
from torch import nn

from eclipse_ray.poisons.efp import class_means, pull_loss, push_loss
from eclipse_ray.poisons.interface import quiet_session
from eclipse_ray.poisons.surrogate import attack, features, keyed_generator, load_surrogate, train_surrogate
from tests.poisons.helpers import (
    CLASSES,
    CPU,
    as_floats,
    check_resume,
    check_storage,
    losses,
    part,
    tiny_config,
    tiny_images,
    tiny_settings,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CENTROIDS = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 10.0]])
SETTINGS = {"surrogate_batch_size": 8, "surrogate_epochs": 9, "steps": 24, "step_size_255": 1.5}
SETTINGS |= {"adversary_eps_255": 2.0, "adversary_step_size_255": 1.0}


@pytest.fixture(scope="module")
def fitted():
    data = tiny_images(48)
    return data, check_resume(data, tiny_config("efp", **SETTINGS), kill_at=6)


def test_push_is_the_distance_to_the_own_centroid_and_pull_to_the_nearest_other():
    points, labels = torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])
    assert push_loss(points, labels, CENTROIDS).tolist() == [-0.5, -40.5]
    assert pull_loss(points, labels, CENTROIDS).tolist() == [4.5, 0.5]
    # The image's own centroid is never chosen, however far the others are.
    assert pull_loss(torch.zeros(1, 2), torch.tensor([0]), CENTROIDS).tolist() == [8.0]


def test_class_means_average_over_the_images_of_a_class():
    data, model = tiny_images(12, 4), nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    means = class_means(model, data, CPU)
    each = features(model, as_floats(data.images))
    for label in range(CLASSES):
        assert torch.allclose(means[label], each[data.labels == label].mean(0), atol=1e-6)
    assert torch.equal(class_means(model, part(data, list(range(11, -1, -1))), CPU), means)


def test_the_surrogate_withstands_its_adversary_better_than_one_trained_without():
    data = tiny_images(48)
    adversary = {"surrogate_batch_size": 24, "surrogate_epochs": 20, "adversary_eps_255": 8.0}
    config = tiny_settings("efp", **SETTINGS | adversary | {"adversary_step_size_255": 2.0})
    images = as_floats(data.images)

    def attacked_loss(seed, adversarial):
        state = train_surrogate(data, config, seed, quiet_session(), adversary=config if adversarial else None)
        model = load_surrogate(state, 0, config, CLASSES, CPU)
        noise = attack(model, images, data.labels, config, keyed_generator(0))
        assert float(noise.abs().max()) <= 8 / 255 + 1e-6
        return float(losses(model, images + noise, data.labels).mean())

    for seed in range(2):
        assert attacked_loss(seed, adversarial=True) < attacked_loss(seed, adversarial=False)


@pytest.mark.parametrize("variant", ["push", "pull"])
def test_features_are_pushed_from_their_own_centroid_or_pulled_to_another(fitted, variant):
    data, state = fitted
    config = tiny_config("efp", variant=variant, **SETTINGS)
    poisoned = check_storage(data, state, config)
    model = load_surrogate(state, 0, config, CLASSES, CPU)
    with torch.no_grad():
        before, after = (features(model, as_floats(images)) for images in (data.images, poisoned))
    loss = push_loss if variant == "push" else pull_loss
    change = loss(after, data.labels, state["centroids"]) - loss(before, data.labels, state["centroids"])
    assert float((change < 0).float().mean()) > 0.85
    assert float(change.mean()) < 0
