"""The class-wise colour shift, and a mixture in which each image has a poison of its own."""

import pytest
import torch

from eclipse_ray.config import PoisonConfig
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons import perturb, poison_images
from tests.poisons.helpers import CLASSES, part, tiny_images


def poisoned(data, seed=0, **settings):
    config = PoisonConfig.model_validate(settings)
    return poison_images(data.images, data.labels, data.ids, config, seed, data.num_classes)


def test_a_shift_moves_each_channel_of_a_class_by_the_bound_and_no_two_of_eight_classes_alike():
    images = torch.full((8, 5, 5, 3), 100, dtype=torch.uint8)
    config = PoisonConfig(name="shift")
    change = perturb(images, torch.arange(8), [f"{index}" for index in range(8)], config, 0, 8) * 255
    assert torch.equal(change, change[:, :1, :1].expand_as(change))
    torch.testing.assert_close(change.abs(), torch.full_like(change, 8.0))
    assert len({tuple(one.sign().tolist()) for one in change[:, 0, 0]}) == 8


def test_the_seed_deals_the_shifts_and_the_ids_do_not():
    data = tiny_images(CLASSES * 2)
    first = poisoned(data, name="shift").int() - data.images.int()
    assert torch.equal(first[:CLASSES], first[CLASSES:])
    others = [poisoned(data, seed, name="shift") for seed in range(1, 5)]
    assert any(not torch.equal(one, poisoned(data, name="shift")) for one in others)


def test_each_image_of_a_mixture_is_what_one_of_its_parts_alone_stores():
    data = tiny_images(64)
    parts = ("ar", "lsp", "urp", "shift", "cuda")
    mixed = poisoned(data, name="mixture", parts=parts)
    alone = torch.stack([poisoned(data, name=name) for name in parts])
    same = (alone == mixed).flatten(2).all(dim=2)
    assert (same.sum(dim=0) == 1).all()
    assert (same.sum(dim=1) >= 4).all(), "each part of five is drawn for some of 64 images"


def test_the_part_of_an_image_depends_on_its_id_alone():
    data = tiny_images(20)
    whole = poisoned(data, name="mixture")
    assert torch.equal(poisoned(part(data, [17, 2, 9]), name="mixture"), whole[[17, 2, 9]])
    assert not torch.equal(poisoned(data, 1, name="mixture"), whole)


@pytest.mark.parametrize("name", ["em", "mixture", "ops", "nothing"])
def test_a_part_that_is_no_closed_form_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"poison.parts: {name} is no closed-form poison; choose from urp"):
        poisoned(tiny_images(4), name="mixture", parts=("ar", name))
