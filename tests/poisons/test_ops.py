"""OPS: one pixel per class, chosen by an exhaustive search that an independent loop repeats."""

import itertools

import pytest
import torch

from eclipse_ray.config import PoisonConfig
from eclipse_ray.poisons import ConfigError, fit_poison, perturb, poison_fitted
from eclipse_ray.poisons.interface import quiet_session
from tests.poisons.helpers import CLASSES, part, tiny_images

CONFIG = PoisonConfig(name="ops")


def fitted(data):
    return fit_poison(data, CONFIG, 0, quiet_session())


def best_by_hand(images, taken):
    scores = {}
    for row, column in itertools.product(range(images.shape[1]), range(images.shape[2])):
        for colour in itertools.product((0.0, 1.0), repeat=3):
            distance = (torch.tensor(colour, dtype=torch.float64) - images[:, row, column] / 255).abs()
            spread = max(float(distance.std(correction=0)), 0.5 / 255)
            scores[row, column, colour] = float(distance.mean()) / spread
    return max((key for key in scores if key not in taken), key=lambda key: scores[key])


def test_the_search_finds_what_a_loop_over_every_pixel_and_colour_finds():
    data = tiny_images(24, size=4)
    state = fitted(data)
    taken = []
    for label in range(CLASSES):
        row, column, colour = best_by_hand(data.images[data.labels == label].double(), taken)
        taken.append((row, column, colour))
        assert int(state["place"][label]) == row * 4 + column
        assert state["colour"][label].tolist() == [int(255 * value) for value in colour]


def test_one_pixel_of_each_image_gets_the_colour_of_its_class_exactly():
    data = tiny_images(16)
    state = fitted(data)
    poisoned = poison_fitted(data, state, CONFIG, 0)
    changed = (poisoned != data.images).any(dim=3).flatten(1)
    assert (changed.sum(dim=1) == 1).all()
    places = state["place"][data.labels]
    found = poisoned.flatten(1, 2)[torch.arange(16), places]
    assert torch.equal(found, state["colour"][data.labels])


def test_no_two_classes_share_pixel_and_colour_even_if_their_images_are_equal():
    data = tiny_images(8)
    data.images[:] = data.images[0]
    state = fitted(data)
    pairs = {(int(place), *colour.tolist()) for place, colour in zip(state["place"], state["colour"], strict=True)}
    assert len(pairs) == CLASSES


def test_order_and_part_do_not_matter_and_a_closed_form_it_is_not():
    data = tiny_images(12)
    state = fitted(data)
    backwards = part(data, list(range(11, -1, -1)))
    again = fitted(backwards)
    assert all(torch.equal(state[name], again[name]) for name in state)
    whole = poison_fitted(data, state, CONFIG, 0)
    assert torch.equal(poison_fitted(part(data, [3, 7]), state, CONFIG, 0), whole[[3, 7]])
    with pytest.raises(ConfigError, match="depends on all images at once"):
        perturb(data.images, data.labels, data.ids, CONFIG, 0, CLASSES)
