import pytest
import torch
from torch import nn

from eclipse_ray.poisons.efp import pull_loss, push_loss
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.poisons.features import class_means, features, last_linear
from eclipse_ray.victims import VICTIMS

CENTROIDS = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 10.0]])


def test_push_is_the_distance_to_the_own_centroid_and_pull_to_the_nearest_other():
    points, labels = torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])
    assert push_loss(points, labels, CENTROIDS).tolist() == [-0.5, -40.5]
    assert pull_loss(points, labels, CENTROIDS).tolist() == [4.5, 0.5]
    # The nearest of all centroids is never chosen when it is the image's own.
    assert pull_loss(torch.zeros(1, 2), torch.tensor([0]), CENTROIDS).tolist() == [8.0]


@pytest.mark.parametrize("arch", sorted(VICTIMS))
def test_features_are_what_the_head_of_a_victim_turns_into_logits(arch, one_thread):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VICTIMS[arch](5).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = features(model, x)
    head = last_linear(model)
    assert values.shape == (2, head.in_features)
    assert head.out_features == 5
    assert torch.autograd.grad(values.sum(), x)[0].abs().max() > 0
    assert not head._forward_pre_hooks


def test_class_means_average_over_the_images_of_a_class():
    model = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(48, 2))
    images = torch.randint(0, 256, (6, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    means = class_means(model, images, labels, 2)
    each = features(model, images.permute(0, 3, 1, 2).float() / 255)
    assert torch.allclose(means[0], each[labels == 0].mean(0), atol=1e-6)
    assert torch.allclose(means[1], each[labels == 1].mean(0), atol=1e-6)
    with pytest.raises(InputError, match="class 2 of 3"):
        class_means(model, images, labels, 3)


def test_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(ConfigError, match="linear layer"):
        last_linear(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()))
