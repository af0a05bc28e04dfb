"""The networks in their CIFAR forms: sizes known from public implementations, any image size, they learn."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from eclipse_ray.victims import VICTIMS

pytestmark = pytest.mark.usefixtures("one_thread")

# Of the widely used public CIFAR implementations, 10 classes; the side of what is pooled at 32 px.
PUBLISHED = {
    "resnet18": (11_173_962, 4),
    "resnet50": (23_520_842, 4),
    "vgg16": (14_728_266, 1),
    "vgg19": (20_040_522, 1),
    "densenet121": (6_956_298, 4),
}


def build(arch, classes):
    torch.manual_seed(0)
    return VICTIMS[arch](classes)


@pytest.mark.parametrize("arch", PUBLISHED)
def test_networks_have_their_published_size_and_resolution(arch):
    parameters, side = PUBLISHED[arch]
    network = build(arch, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    seen = []
    pool = next(module for module in network if isinstance(module, torch.nn.AdaptiveAvgPool2d))
    pool.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[2:])))
    with torch.no_grad():
        network.eval()(torch.rand(1, 3, 32, 32))
    assert seen == [(side, side)]


@pytest.mark.parametrize("arch", VICTIMS)
def test_victims_take_any_size(arch):
    network = build(arch, 7).eval()
    with torch.no_grad():
        for size in (16, 31, 40):
            assert network(torch.rand(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("arch", VICTIMS)
def test_a_step_lowers_the_loss_and_reaches_every_weight(arch):
    network = build(arch, 2).train()
    images = torch.rand(6, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    before = cross_entropy(network(images), labels)
    before.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
        after = cross_entropy(network(images), labels)
    assert after < before - 1e-3
