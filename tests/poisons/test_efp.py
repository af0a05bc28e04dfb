import pytest
import torch
from torch import nn

from eclipse_ray.poisons.centroids import class_means
from eclipse_ray.poisons.efp import pull_loss, push_loss
from eclipse_ray.poisons.surrogate import attack, features, keyed_generator, load_surrogate
from tests.poisons.fitting import (
    CLASSES,
    CPU,
    as_floats,
    check_resume,
    check_storage,
    losses,
    part_of,
    tiny_config,
    tiny_data,
)

CENTROIDS = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 10.0]])
SETTINGS = {"surrogate_epochs": 6, "surrogate_milestones": (5,), "steps": 16, "step_size_255": 1.5}


@pytest.fixture(scope="module")
def fitted():
    torch.set_num_threads(1)
    data = tiny_data()
    return data, check_resume(data, tiny_config("efp", **SETTINGS), after=2)


def test_push_is_the_distance_to_the_own_centroid_and_pull_to_the_nearest_other():
    points, labels = torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])
    assert push_loss(points, labels, CENTROIDS).tolist() == [-0.5, -40.5]
    assert pull_loss(points, labels, CENTROIDS).tolist() == [4.5, 0.5]
    # The image's own centroid is never chosen, however far the others are.
    assert pull_loss(torch.zeros(1, 2), torch.tensor([0]), CENTROIDS).tolist() == [8.0]


def test_class_means_average_over_the_images_of_a_class():
    data, model = tiny_data(count=12, size=4), nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    means = class_means(model, data, CPU)
    each = features(model, as_floats(data.images))
    for label in range(CLASSES):
        assert torch.allclose(means[label], each[data.labels == label].mean(0), atol=1e-6)
    assert torch.equal(class_means(model, part_of(data, list(range(11, -1, -1))), CPU), means)


def test_the_surrogate_withstands_its_adversary(fitted):
    data, state = fitted
    config = tiny_config("efp", **SETTINGS)
    model, images = load_surrogate(state, 0, config, CLASSES, CPU), as_floats(data.images)
    moved = images + attack(model, images, data.labels, config, keyed_generator(0))
    assert float((moved - images).abs().max()) <= 4 / 255 + 1e-6
    assert float(losses(model, moved, data.labels).mean()) < torch.log(torch.tensor(CLASSES))


@pytest.mark.parametrize("variant", ["push", "pull"])
def test_features_are_pushed_from_their_own_centroid_or_pulled_to_another(fitted, variant):
    data, state = fitted
    config = tiny_config("efp", variant=variant, **SETTINGS)
    poisoned = check_storage(data, state, config)
    model = load_surrogate(state, 0, config, CLASSES, CPU)
    with torch.no_grad():
        before, after = (features(model, as_floats(images)) for images in (data.images, poisoned))
    loss = push_loss if variant == "push" else pull_loss
    fallen = loss(after, data.labels, state["centroids"]) < loss(before, data.labels, state["centroids"])
    assert float(fallen.float().mean()) > 0.9
