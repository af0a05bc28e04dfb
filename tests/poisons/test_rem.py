import torch
import torch.nn.functional as F
from torch import nn

from eclipse_ray.poisons.rem import MinMax, adversary, min_max_noise
from eclipse_ray.poisons.views import keyed_draws, random_view

CPU = torch.device("cpu")
IDS = [f"image-{index}" for index in range(12)]
SETTING = MinMax(
    eps=8 / 255,
    step_size=1.6 / 255,
    steps=6,
    eot_draws=2,
    adversary_eps=4 / 255,
    adversary_step_size=1.6 / 255,
    adversary_steps=3,
)


def world():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 3, 12, 12, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    return x, torch.arange(12) % 4, model.requires_grad_(False)


def losses(model, x, labels):
    return F.cross_entropy(model(x), labels, reduction="none")


def test_the_adversary_raises_the_loss_within_its_radius():
    x, labels, model = world()
    start = torch.full_like(x, 0.5)
    moved = adversary(model, x, labels, SETTING, start)
    assert float((moved - x).abs().max()) <= SETTING.adversary_eps + 1e-6
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert bool((losses(model, moved, labels) > losses(model, x, labels)).all())


def test_noise_lowers_the_loss_that_an_adversary_leaves():
    x, labels, model = world()
    noise = min_max_noise(model, x, labels, SETTING, keyed_draws(0, IDS, 100, CPU))
    assert float(noise.abs().max()) <= SETTING.eps + 1e-6

    def worst(images):
        total = torch.zeros(len(x))
        for index in range(4):
            draw = keyed_draws(1, IDS, 1000 * index, CPU)
            view = random_view(images.clamp(0, 1), draw(0, (3,)))
            total += losses(model, adversary(model, view, labels, SETTING, draw(1, (3, 12, 12))), labels)
        return total / 4

    assert bool((worst(x + noise) < worst(x)).all())


def test_the_noise_of_an_image_does_not_depend_on_its_batch():
    x, labels, model = world()
    whole = min_max_noise(model, x, labels, SETTING, keyed_draws(0, IDS, 100, CPU))
    rows = [7, 2, 9]
    part = min_max_noise(model, x[rows], labels[rows], SETTING, keyed_draws(0, [IDS[i] for i in rows], 100, CPU))
    assert float(((part - whole[rows]).abs() > 1e-6).float().mean()) < 0.01
