"""Adversarial augmentation keeps the worst of several draws; adversarial training attacks within its ball."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.adversarial import Aa, adversarial_training, policy, ueraser, ueraser_max
from eclipse_ray.defenses.op import strong_augmentation
from eclipse_ray.defenses.simple import seeded
from eclipse_ray.errors import ConfigError
from eclipse_ray.victims import VICTIMS
from eclipse_ray.victims.training import classify
from tests.defenses.support import batch, generator, linear_victim

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = linear_victim()


def losses(images, targets):
    with torch.no_grad():
        return F.cross_entropy(classify(MODEL, images), targets, reduction="none")


def draws(config, count, seed=0):
    """Return the first draws that a generator of `seed` gives."""
    source, one = generator(seed), policy(Aa.of(config))
    return [seeded(one, batch()[0], source).clamp(0, 1) for _ in range(count)]


def test_the_draw_of_highest_loss_is_kept_for_each_image():
    config = DefenseConfig()
    images, targets = batch()
    found, same = ueraser(config)(images, targets, MODEL, generator(), 0.1)
    assert torch.equal(same, targets)
    candidates = torch.stack(draws(config, Aa.of(config).aa_draws))
    scores = torch.stack([losses(candidate, targets) for candidate in candidates])
    best = scores.argmax(dim=0)
    assert len(best.unique()) > 1, "different images keep different draws"
    assert torch.equal(found, candidates[best, torch.arange(len(images))])
    assert (losses(found, targets) == scores.max(dim=0).values).all()


@pytest.mark.parametrize(
    ("build", "progress", "count"), [(ueraser, 0.29, 5), (ueraser, 0.3, 1), (ueraser_max, 0.99, 5)]
)
def test_several_draws_in_the_first_part_of_training_one_after_it(build, progress, count):
    images, targets = batch()
    calls = []

    class Counting(torch.nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return MODEL(x)

    found, _ = build(DefenseConfig())(images, targets, Counting(), generator(), progress)
    assert len(calls) == (count if count > 1 else 0), "one draw needs nobody's judgement"
    assert not torch.equal(found, images)
    if count == 1:
        assert torch.equal(found, draws(DefenseConfig(), 1)[0])


def test_without_its_probability_only_trivial_augment_is_left():
    # On a black image plasma brightness shows; TrivialAugment's geometry and contrast do not.
    black = torch.zeros(16, 3, 16, 16)
    with_plasma = seeded(policy(Aa(aa_p=1.0)), black, generator(1))
    assert float(with_plasma.flatten(1).std(dim=1).min()) >= 0
    assert float(with_plasma.max()) > 0.2
    bare = policy(Aa(aa_p=0.0))
    source = generator(1)
    constant = [seeded(bare, black, source).flatten(1).std(dim=1).max() for _ in range(12)]
    assert float(torch.stack(constant).max()) < 1e-6, "a constant image stays constant"


def test_strong_augmentation_mixes_as_often_as_set():
    images, targets = batch(16)
    for p, mixed in ((0.0, False), (1.0, True)):
        augment, source = strong_augmentation(DefenseConfig(op_cutmix_p=p)), generator(2)
        soft = [augment(images, targets, MODEL, source, 0.0)[1] for _ in range(6)]
        assert any(not torch.equal(found, targets) for found in soft) == mixed


def test_a_missing_kornia_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ConfigError, match=r"aa-max needs kornia.*eclipse-ray\[defenses\]"):
        ueraser_max(DefenseConfig())


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
