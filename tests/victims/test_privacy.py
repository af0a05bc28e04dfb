"""DP-SGD: each image's gradient is bounded, as if it had been computed alone."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from eclipse_ray.config import PrivacyConfig, VictimConfig
from eclipse_ray.errors import ConfigError
from eclipse_ray.victims import VICTIMS
from eclipse_ray.victims.training import classify, make_private, private_optimizer, train_victim
from tests.victims.images import coloured

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = VictimConfig(epochs=2, batch_size=16, learning_rate=0.05, crop_padding=2, lr_schedule="constant")


@pytest.fixture
def opacus():
    return pytest.importorskip("opacus")


def run(train, test, config=CONFIG, privacy=None, seed=0, augmentations=()):
    return train_victim(*train, *test, config, None, seed, "cpu", privacy=privacy, augmentations=augmentations)


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def private_gradient(model, images, labels, bound, noise=0.0, seed=0):
    """Return what one private step hands to SGD."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = private_optimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        PrivacyConfig(max_grad_norm=bound, noise_multiplier=noise),
        len(images),
        generator,
    )
    optimizer.zero_grad()
    cross_entropy(classify(model, images), labels).backward()
    optimizer.step()
    return gradient(model)


def alone(model, image, label):
    """Return the gradient of one image, without Opacus at work."""
    model.zero_grad()
    model.disable_hooks()
    cross_entropy(classify(model, image[None]), label[None]).backward()
    model.enable_hooks()
    return gradient(model)


@pytest.fixture
def batch():
    images, labels = coloured(6, 0)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)


@pytest.mark.parametrize("arch", ["small", "resnet18"])
def test_clipping_equals_a_loop_over_single_images(opacus, batch, arch):
    torch.manual_seed(0)
    # In double precision: an untrained deep network magnifies rounding a thousandfold.
    model = make_private(VICTIMS[arch](3).to(memory_format=torch.channels_last)).double()
    images, labels = batch[0][:4].double(), batch[1][:4]
    single = [alone(model, image, label) for image, label in zip(images, labels, strict=True)]
    # Some images are cut, others are not.
    bound = sum(sorted(one.norm().item() for one in single)[1:3]) / 2
    expected = sum(one * min(1.0, bound / one.norm().item()) for one in single) / len(single)
    # Opacus adds 1e-6 to each norm.
    torch.testing.assert_close(private_gradient(model, images, labels, bound), expected, rtol=1e-5, atol=1e-7)


def test_every_step_of_a_victim_is_bounded(opacus):
    places = []

    def watch(images, targets, model, generator, progress):
        places.append(torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()]))
        return images, targets

    config = CONFIG.model_copy(
        update={"epochs": 1, "batch_size": 1, "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 2.0}
    )
    bound = PrivacyConfig(max_grad_norm=0.01, noise_multiplier=0)
    run(coloured(5, 0), coloured(3, 1), config, bound, augmentations=[watch])
    steps = [(after - before).norm().item() for before, after in pairwise(places)]
    assert len(places) == 5
    assert all(0 < step <= 2.0 * 0.01 * 1.001 for step in steps)


def test_noise_has_its_standard_deviation_and_comes_from_the_generator(opacus, batch):
    torch.manual_seed(0)
    model = make_private(VICTIMS["small"](3))
    quiet = private_gradient(model, *batch, bound=0.1)
    noisy = private_gradient(model, *batch, bound=0.1, noise=3.0)
    assert (noisy - quiet).std().item() == pytest.approx(3.0 * 0.1 / len(batch[0]), rel=0.02)
    assert torch.equal(noisy, private_gradient(model, *batch, bound=0.1, noise=3.0))
    assert not torch.equal(noisy, private_gradient(model, *batch, bound=0.1, noise=3.0, seed=1))


def test_no_image_is_normalised_with_the_others(opacus):
    torch.manual_seed(0)
    network = VICTIMS["resnet18"](3)
    model = make_private(network)
    kinds = [type(module) for module in model.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.GroupNorm) == [type(module) for module in network.modules()].count(nn.BatchNorm2d)
    kept = {name: value for name, value in network.state_dict().items() if "running" not in name}
    for name, value in model._module.state_dict().items():
        assert torch.equal(value, kept[name])


def test_a_private_victim_learns_and_repeats(opacus):
    train, test, privacy = coloured(192, 0), coloured(60, 1), PrivacyConfig()
    config = CONFIG.model_copy(update={"epochs": 4})
    first = run(train, test, config, privacy)
    assert first.test_accuracy[-1] > 70  # by chance 33
    assert run(train, test, config, privacy) == first
    assert run(train, test, config, PrivacyConfig(noise_multiplier=0)).train_loss != first.train_loss


def test_questions_of_an_augmentation_leave_no_trace(opacus):
    def untouched(images, targets, model, generator, progress):
        return images, targets

    def curious(images, targets, model, generator, progress):
        asked = images.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(classify(model, asked), targets), asked)
        return images, targets

    train, test, privacy = coloured(48, 0), coloured(9, 1), PrivacyConfig()
    expected = run(train, test, CONFIG, privacy, augmentations=[untouched])
    assert run(train, test, CONFIG, privacy, augmentations=[curious]) == expected


def test_a_missing_opacus_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigError, match=r"pip install 'eclipse-ray\[defenses\]'"):
        run(coloured(16, 0), coloured(9, 1), CONFIG, PrivacyConfig())


def test_training_without_privacy_does_not_import_opacus():
    code = "import sys, eclipse_ray.victims.training; sys.exit('opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
