"""CUDA: one linear filter a class, images scaled by their largest value, exact storage."""

import pytest
import torch

from eclipse_ray.config import PoisonConfig
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons import budget, perturb, poison_images
from eclipse_ray.poisons.cuda import class_filters, convolve
from tests.poisons.helpers import CLASSES, part, tiny_images

CONFIG = PoisonConfig(name="cuda")


def stored(data, seed=0):
    return poison_images(data.images, data.labels, data.ids, CONFIG, seed, CLASSES)


def test_each_class_has_one_filter_with_one_whole_tap():
    filters = class_filters(0, list(range(50)))
    assert ((filters == 1).flatten(1).sum(1) == 1).all()
    rest = filters[filters != 1]
    assert rest.min() > 0
    assert rest.max() < 0.3
    assert torch.equal(class_filters(0, [7, 7])[0], filters[7])
    assert len({int(one.flatten().argmax()) for one in filters}) == 9


def test_the_filter_is_linear():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    filters = class_filters(0, [0, 1, 2, 3])
    together = convolve(2 * first + second, filters)
    torch.testing.assert_close(together, 2 * convolve(first, filters) + convolve(second, filters))
    grouped = torch.nn.functional.conv2d(first[:1], filters[:1, None].expand(3, 1, 3, 3), padding=1, groups=3)
    torch.testing.assert_close(convolve(first[:1], filters[:1]), grouped)


def test_a_stored_image_is_its_convolution_divided_by_its_maximum():
    data = tiny_images(8)
    blurred = convolve(data.images.permute(0, 3, 1, 2).double() / 255, class_filters(0, data.labels.tolist()))
    expected = blurred / blurred.amax(dim=(1, 2, 3), keepdim=True)
    found = stored(data).permute(0, 3, 1, 2).double() / 255
    assert (found - expected).abs().max() <= 0.5 / 255 + 1e-9
    assert (found.amax(dim=(1, 2, 3)) == 1).all()
    assert (stored(data).int() - data.images.int()).abs().max() > 30, "no norm bounds it"


def test_black_stays_black_and_extreme_images_are_exact():
    data = tiny_images(3)
    data.images[0] = 0
    data.images[1] = 255
    assert int(stored(data)[0].max()) == 0
    change = perturb(data.images, data.labels, data.ids, CONFIG, 0, CLASSES) * 255
    assert torch.equal((data.images + change.double()).round().to(torch.uint8), stored(data))


def test_order_and_batch_do_not_matter_and_the_seed_does():
    data = tiny_images(11)
    whole = stored(data)
    assert torch.equal(stored(part(data, [7, 2, 5])), whole[[7, 2, 5]])
    assert not torch.equal(stored(data, seed=1), whole)


def test_it_has_no_budget_and_takes_none():
    assert budget(CONFIG, (16, 16, 3)) == ("none", float("inf"))
    data = tiny_images(2)
    with pytest.raises(ConfigError, match="eps_255: cuda has no such setting"):
        perturb(data.images, data.labels, data.ids, PoisonConfig(name="cuda", eps_255=8), 0, CLASSES)
