"""Shared parts of optimised poisons: cropping as victims crop, sign-PGD, schedules, checkpoints, exact resume."""

import pytest
import torch
import torch.nn.functional as F

from eclipse_ray.attacks import crop_flip, draw_crops, keyed_crops, pgd
from eclipse_ray.config import VictimConfig
from eclipse_ray.poisons.interface import to_float
from eclipse_ray.poisons.surrogate import (
    attack,
    checkpoint_epochs,
    epoch_batches,
    keyed_generator,
    new_surrogate,
    rate_at,
)
from eclipse_ray.victims.training import draw_batch
from tests.poisons.helpers import CLASSES, CPU, tiny_images, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("padding", [0, 3])
def test_crops_are_those_of_the_victim(padding):
    images = tiny_images(12).images
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    config = VictimConfig(crop_padding=padding)
    victims = draw_batch(padded, torch.arange(12), config, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    shift = torch.randint(0, 2 * padding + 1, (2, 12, 1), generator=generator)[..., 0]
    flip = (torch.rand(12, 1, generator=generator) < 0.5)[:, 0]
    assert torch.equal(crop_flip(to_float(images, CPU), (shift, flip), padding), victims)


def test_gradients_come_back_to_the_pixels_a_crop_took():
    values = torch.rand(
        2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    crops = draw_crops(2, 2, keyed_generator("test"))
    assert torch.autograd.gradcheck(lambda x: crop_flip(x, crops, 2), (values,))


def test_keyed_crops_depend_on_the_id_alone_and_use_all_shifts():
    ids = [f"image-{index}" for index in range(40)]
    whole = keyed_crops(0, ids, 9, 6, 2)
    some = keyed_crops(0, ids[7:9], 9, 6, 2)
    for (shift, flip), (few_shift, few_flip) in zip(whole, some, strict=True):
        assert torch.equal(shift[:, 7:9], few_shift)
        assert torch.equal(flip[7:9], few_flip)
    assert set(torch.cat([shift.flatten() for shift, _ in whole]).tolist()) == {0, 1, 2, 3, 4}
    assert 0.3 < torch.cat([flip for _, flip in whole]).float().mean() < 0.7


@pytest.mark.parametrize("maximise", [False, True])
def test_pgd_walks_to_the_corner_of_its_bound(maximise):
    images = torch.full((2, 3, 4, 4), 0.5)
    images[:, :, 0] = 0.0
    images[:, :, 1] = 1.0
    delta = pgd(images, lambda x, _: x.sum(dim=(1, 2, 3)), 0.1, 0.03, 10, maximise=maximise)
    assert delta[:, :, 2:].abs().sub(0.1).abs().max() < 1e-6
    assert (delta[:, :, 2:] > 0).all() == maximise
    assert ((images + delta).clamp(0, 1) - images).sub(delta).abs().max() < 1e-6


def test_the_model_is_left_as_it_was_by_an_attack():
    data, config = tiny_images(8), tiny_settings("efp")
    model = new_surrogate(config, CLASSES, 0, CPU).train()
    attack(model, to_float(data.images, CPU), data.labels, config, keyed_generator("test"))
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_learning_rates():
    linear = tiny_settings("tap", surrogate_learning_rate=0.1)
    assert [rate_at(linear, done, 40) for done in (0, 20, 39)] == pytest.approx([0.1, 0.05, 0.0025])
    steps = tiny_settings("sep", surrogate_learning_rate=0.1, surrogate_milestones=(75, 90))
    assert [rate_at(steps, done, 120) for done in (74.9, 75, 90)] == pytest.approx([0.1, 0.01, 0.001])
    assert rate_at(tiny_settings("em", surrogate_learning_rate=0.1), 3, 4) == 0.1


def test_an_epoch_visits_every_image_once_in_its_own_order():
    first, second = (epoch_batches(0, epoch, 65, 32) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [32, 32], "one image alone cannot be normalised"
    assert sorted(torch.cat(epoch_batches(0, 0, 70, 32)).tolist()) == list(range(70))
    assert not torch.equal(first[0], second[0])


def test_checkpoints_are_spread_and_end_with_the_last_epoch():
    assert checkpoint_epochs(120, 30) == list(range(4, 121, 4))
    assert checkpoint_epochs(7, 1) == [7]
    assert checkpoint_epochs(7, 3) == [3, 5, 7]
