"""What a training loop offers to defenses: augmentations, several versions of an image, more images."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eclipse_ray.compensation import augment
from eclipse_ray.config import CompensationConfig, VictimConfig
from eclipse_ray.errors import InputError
from eclipse_ray.victims import VICTIMS, training
from eclipse_ray.victims.training import Bfloat16, classify, draw_batch, learning_rate_at, train_victim
from tests.victims.images import coloured, numbered

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = VictimConfig(epochs=3, batch_size=32, learning_rate=0.05, crop_padding=2)
STILL = VictimConfig(epochs=6, batch_size=8, learning_rate=0.01, crop_padding=0, flip=False)


def run(train, test, config=QUICK, compensation=None, seed=0, **more):
    return train_victim(*train, *test, config, compensation, seed, "cpu", **more)


def untouched(images, targets, model, generator, progress):
    return images, targets


def epochs_seen(train, epochs, **more):
    """Return the gray levels that pass in each epoch."""
    levels = []

    def watch(images, targets, model, generator, progress):
        levels.extend((images[:, 0, 0, 0] * 255).round().int().tolist())
        return images, targets

    config = STILL.model_copy(update={"epochs": epochs})
    run(train, (numbered([0, 1]), np.arange(2)), config, augmentations=[watch], **more)
    return np.array(levels).reshape(epochs, -1)


def reference_loop(train, seed, compensation):
    """The plain loop, every draw in its order, without anything a defense may ask for."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = VICTIMS["small"](3).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-3, nesterov=True)
    padded, labels = F.pad(torch.from_numpy(train[0]), (0, 0, 2, 2, 2, 2)), torch.from_numpy(train[1])
    losses = []
    for epoch in range(QUICK.epochs):
        batches = torch.randperm(len(labels), generator=generator).split(QUICK.batch_size)
        total = torch.zeros(())
        for index, rows in enumerate(batches):
            step = epoch * len(batches) + index
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, QUICK.epochs * len(batches), QUICK)
            batch = augment(draw_batch(padded, rows, QUICK, generator), compensation, generator)
            loss = F.cross_entropy(model((batch - 0.5) / 0.25), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        losses.append(total.item() / len(batches))
    return losses


def test_without_a_defense_nothing_changes():
    train, compensation = coloured(80, 0), CompensationConfig()
    expected = reference_loop(train, 5, compensation)
    assert run(train, coloured(9, 1), compensation=compensation, seed=5).train_loss == expected


def test_soft_labels_of_one_class_are_the_class():
    train, test = coloured(96, 0), coloured(60, 1)
    plain, soft = run(train, test), run(train, test, augmentations=[untouched])
    assert soft.train_loss == pytest.approx(plain.train_loss, rel=1e-3)


def test_augmentations_get_what_they_are_promised_and_run_in_turn():
    calls = []

    def first(images, targets, model, generator, progress):
        assert images.shape[1:] == (3, 16, 16)
        assert images.dtype == targets.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        assert torch.equal(targets.sum(1), torch.ones(len(images)))
        assert classify(model, images).shape == targets.shape == (len(images), 3)
        assert torch.rand(1, generator=generator).device == images.device
        calls.append(("first", progress))
        return images * 0, targets

    def second(images, targets, model, generator, progress):
        assert images.max() == 0
        calls.append(("second", progress))
        return images, targets

    run(coloured(64, 0), coloured(9, 1), compensation=CompensationConfig(), augmentations=[first, second])
    assert calls == [(name, step / 6) for step in range(6) for name in ("first", "second")]


def test_the_victim_learns_the_targets_of_an_augmentation():
    def shifted(images, targets, model, generator, progress):
        return images, targets.roll(1, dims=1)

    train, test = coloured(300, 0), coloured(90, 1)
    config = QUICK.model_copy(update={"epochs": 4})
    assert run(train, test, config).test_accuracy[-1] > 95
    assert run(train, test, config, augmentations=[shifted]).test_accuracy[-1] < 5


def test_an_augmentation_may_ask_the_victim_in_any_mode():
    modes = []

    def curious(images, targets, model, generator, progress):
        modes.append(model.training)
        model.eval()
        asked = images.clone().requires_grad_()
        loss = F.cross_entropy(classify(model, asked), targets)
        (slope,) = torch.autograd.grad(loss, asked)
        return (images + 0 * slope).requires_grad_(), targets

    train, test = coloured(64, 0), coloured(9, 1)
    assert run(train, test, augmentations=[curious]) == run(train, test, augmentations=[untouched])
    assert modes == [True] * 6


def test_every_epoch_draws_one_version_of_each_image():
    images = numbered(np.arange(20) * 2 + np.array([[0], [1]]))
    assert images.shape == (2, 20, 8, 8, 3)
    seen = epochs_seen((images, np.arange(20) % 2), 6)
    assert all(sorted(epoch // 2) == list(range(20)) for epoch in seen)
    drawn = np.array([epoch[np.argsort(epoch)] % 2 for epoch in seen])
    assert len({tuple(epoch) for epoch in drawn}) > 4
    assert 0.3 < drawn.mean() < 0.7


def test_one_version_is_the_image_itself():
    (images, labels), test = coloured(64, 0), coloured(30, 1)
    assert run((images[None], labels), test) == run((images, labels), test)


def test_more_images_are_simply_appended():
    images = numbered(np.arange(10) * 2 + np.array([[0], [1]]))
    more = numbered([100, 101, 102]), np.array([0, 1, 1])
    seen = epochs_seen((images, np.arange(10) % 2), 3, extra=more)
    for epoch in seen:
        assert sorted(epoch[epoch >= 100]) == [100, 101, 102]
        assert sorted(epoch[epoch < 100] // 2) == list(range(10))
    half, rest, test = coloured(64, 0), coloured(32, 2), coloured(9, 1)
    both = tuple(np.concatenate(pair) for pair in zip(half, rest, strict=True))
    assert run(half, test, extra=rest) == run(both, test)


def test_bad_versions_and_extra_images_are_refused():
    (images, labels), test = coloured(12, 0), coloured(9, 1)
    with pytest.raises(InputError, match="like the training images"):
        run((images, labels), test, extra=coloured(3, 0, size=8))
    with pytest.raises(InputError, match="extra"):
        run((images, labels), test, extra=(images, labels[:3]))
    with pytest.raises(InputError, match="train"):
        run((np.stack([images, images]), labels[:3]), test)
    with pytest.raises(InputError, match="train"):
        run((images[None][:0], labels), test)


def test_the_victim_sees_normalised_images():
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    assert classify(nn.Identity(), images).flatten().tolist() == [-2, 0, 2]


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    torch.manual_seed(0)
    network = VICTIMS["small"](3).eval()
    images = torch.rand(8, 3, 16, 16)
    logits, exact = Bfloat16(network)(images), network(images)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact)
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()
    logits.sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_used_only_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(training, "fast_precision", lambda _device: "bfloat16" if fast else "float32")
    train, test = coloured(64, 0), coloured(9, 1)
    half = run(train, test, QUICK.model_copy(update={"precision": "bfloat16"}))
    assert (half != run(train, test)) == fast
