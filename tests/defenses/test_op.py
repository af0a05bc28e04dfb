"""Orthogonal projection: nothing is left along the learned rows, and a planted linear pattern goes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.op import Op, fit_linear, project, remove
from eclipse_ray.errors import InputError
from tests.defenses.support import generator, images, labels, material

CONFIG = DefenseConfig(op_batch_size=64)
SETTINGS = Op.of(CONFIG)


def planted(count=1024, classes=4):
    """Return (material, patterns (classes, 768)): mid-gray texture plus one faint pattern a class."""
    patterns = torch.randn(classes, 16 * 16 * 3, generator=generator(4)).sign()
    texture = 128 + 20 * torch.randn(count, 16 * 16 * 3, generator=generator(5))
    poisoned = (texture + 4 * patterns[labels(count, classes)]).round().clamp(0, 255)
    pixels = poisoned.to(torch.uint8).view(count, 16, 16, 3)
    ids = [f"image-{index}" for index in range(count)]
    return material(images=pixels, labels=labels(count, classes), ids=ids), patterns


def separation(pixels, patterns):
    """Return the mean projection of images on their own class's pattern, less that of others, in grey levels."""
    flat = pixels.flatten(1).double()
    scores = (flat - flat.mean(dim=0)) @ (patterns / patterns.shape[1]).double().T
    own = F.one_hot(labels(len(flat), len(patterns))).bool()
    return float(scores[own].mean() - scores[~own].mean())


def test_nothing_is_left_along_the_learned_rows():
    source, _ = planted()
    rows = fit_linear(source, SETTINGS)
    basis = torch.linalg.qr(rows.double().T).Q
    left = remove(source.images, basis)
    assert float((left.flatten(1) @ rows.double().T).abs().max()) < 1e-10
    stored = project(source, CONFIG)
    assert stored.dtype == torch.uint8
    inside = (left >= 0) & (left <= 1)
    assert torch.equal(stored[inside], (left * 255).round().to(torch.uint8)[inside])
    # Rounding moves a value by 1/2 at most, its projection on a unit vector by sqrt(d) / 2.
    unit = F.normalize(rows.double(), dim=1)
    kept = inside.flatten(1).all(dim=1)
    assert kept.any()
    assert float((stored[kept].flatten(1).double() @ unit.T).abs().max()) < math.sqrt(768) / 2


def test_a_planted_linear_pattern_is_removed():
    source, patterns = planted()
    before, after = separation(source.images, patterns), separation(project(source, CONFIG), patterns)
    assert before > 3
    assert abs(after) < before / 4
    change = (project(source, CONFIG).double() - source.images.double()).abs().mean()
    assert change < 30, "the rest of the image is kept"


def test_the_linear_model_follows_plain_sgd_with_two_falls():
    source, _ = planted(128)
    config = Op(op_batch_size=128, op_epochs=4)
    rows = [fit_linear(source, config.model_copy(update={"op_epochs": epochs})).double() for epochs in (1, 4)]
    flat, target = source.images.flatten(1).double() / 255, source.labels
    weights = rows[0]
    for rate in (0.1, 0.01, 0.001):
        # The whole set is one batch, so that the order cannot matter.
        probabilities = (flat @ weights.T).softmax(dim=1)
        gradient = (probabilities - F.one_hot(target, 4)).T @ flat / len(flat)
        weights = weights - rate * gradient
    assert torch.allclose(weights, rows[1], atol=1e-5)


def test_the_result_does_not_depend_on_the_order_of_the_images():
    source, _ = planted(200)
    order = torch.randperm(200, generator=generator(1))
    shuffled = replace(
        source,
        images=source.images[order],
        labels=source.labels[order],
        ids=[source.ids[index] for index in order],
    )
    first, second = project(source, CONFIG), project(shuffled, CONFIG)
    assert int((first[order].int() - second.int()).abs().max()) <= 1
    other = project(replace(source, seed=8), CONFIG)
    assert not torch.equal(first, other)


def test_more_classes_than_values_are_refused():
    small = material(8, images=images(8, 16)[:, :1, :1], num_classes=4)
    with pytest.raises(InputError, match="leave nothing"):
        project(small, CONFIG)
