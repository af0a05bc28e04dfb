"""Adversarial training: the attack stays in its ball, raises the loss, and leaves the model as it was."""

import torch
import torch.nn.functional as F
from torch import nn

from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.adversarial import adversarial_training
from eclipse_ray.victims import VICTIMS
from eclipse_ray.victims.training import classify
from tests.defenses.support import batch, generator, linear_victim


def attacked(model, images, targets, **settings):
    augment = adversarial_training(DefenseConfig(**settings))
    return augment(images, targets, model, generator(), 0.0)


def test_attack_on_a_linear_model_reaches_the_corner_of_the_ball():
    # With two classes the gradient's sign is the same everywhere, so steps of eps / 4 end in the corner.
    model = linear_victim(classes=2)
    images, targets = batch(8, classes=2)
    images = images * 0.8 + 0.1
    found, same = attacked(model, images, targets)
    assert torch.equal(same, targets)
    weight = model[1].weight.view(2, 3, 16, 16)
    away = torch.where(targets[:, 0, None, None, None] == 1, weight[1] - weight[0], weight[0] - weight[1])
    assert torch.allclose(found, images + 8 / 255 * away.sign(), atol=1e-6)


def test_attack_stays_in_the_ball_and_raises_the_loss():
    torch.manual_seed(0)
    model = VICTIMS["small"](4).train()
    # Untrained logits hardly differ: any attack would do as little as chance.
    model[-1].weight.data *= 20
    images, targets = batch(16)
    for settings in ({}, {"at_eps_255": 4.0, "at_steps": 3, "at_step_size_255": 3.0}):
        found, _ = attacked(model, images, targets, **settings)
        radius = settings.get("at_eps_255", 8.0) / 255
        assert float((found - images).abs().max()) <= radius + 1e-6
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1
        model.eval()
        with torch.no_grad():
            start = images + radius * (2 * torch.rand(images.shape, generator=generator()) - 1)
            noisy = F.cross_entropy(classify(model, start.clamp(0, 1)), targets)
            worse = F.cross_entropy(classify(model, found), targets)
        model.train()
        assert float(worse) > float(noisy) + 0.05


def test_attack_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), *linear_victim()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = batch()
    found, _ = attacked(model, images, targets)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not found.requires_grad
