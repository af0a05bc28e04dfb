"""Training of victims: recipes, the loop, and what it offers to defenses."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from eclipse_ray.compensation import augment
from eclipse_ray.config import CompensationConfig, PoisonConfig, VictimConfig, load_config, with_overrides
from eclipse_ray.errors import InputError
from eclipse_ray.poisons import poison_images
from eclipse_ray.victims import VICTIMS, training
from eclipse_ray.victims.training import Bfloat16, classify, draw_batch, learning_rate_at, train_victim
from tests.victims.images import coloured, numbered, striped

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = VictimConfig(epochs=4, batch_size=32, learning_rate=0.05, crop_padding=2)
STILL = VictimConfig(epochs=6, batch_size=8, learning_rate=0.01, crop_padding=0, flip=False)


def run(train, test, config=QUICK, compensation=None, seed=0, **more):
    return train_victim(*train, *test, config, compensation, seed, "cpu", **more)


def test_paper_is_the_published_training():
    victim = load_config(None, {"victim.recipe": "paper"}).victim
    assert (victim.epochs, victim.batch_size) == (80, 128)
    assert (victim.learning_rate, victim.lr_schedule, victim.weight_decay) == (0.1, "constant", 0.0)
    assert (victim.momentum, victim.nesterov, victim.label_smoothing) == (0.9, False, 0.0)
    assert (victim.crop_padding, victim.flip, victim.precision) == (4, True, "float32")


def test_a_key_that_is_set_wins_over_the_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"victim": {"recipe": "paper", "epochs": 3}}))
    victim = load_config(str(file), {"victim.arch": "vgg16"}).victim
    assert (victim.epochs, victim.arch, victim.batch_size) == (3, "vgg16", 128)
    # Even where it is set to the default of another recipe.
    assert VictimConfig(recipe="modern", epochs=12).epochs == 12


def test_another_recipe_takes_the_values_of_the_first_along():
    paper = load_config(None, {"victim.recipe": "paper", "victim.flip": False})
    modern = with_overrides(paper, {"victim.recipe": "modern"}).victim
    assert modern == VictimConfig(recipe="modern", flip=False)
    assert with_overrides(paper, {"victim.recipe": "quick"}).victim == VictimConfig(flip=False)


def test_learns_a_separable_set_and_reports_every_epoch():
    seen = []
    result = run(coloured(300, 0), coloured(90, 1), on_epoch=lambda *row: seen.append(row))
    assert result.test_accuracy[-1] > 95
    assert [epoch for epoch, _, _ in seen] == [1, 2, 3, 4]
    assert [accuracy for _, accuracy, _ in seen] == result.test_accuracy
    assert [loss for _, _, loss in seen] == result.train_loss
    assert result.train_loss[-1] < result.train_loss[0]


def test_the_same_seed_gives_the_same_result():
    train, test = coloured(128, 0), coloured(60, 1)
    compensation = CompensationConfig()
    torch.manual_seed(1)
    first = run(train, test, compensation=compensation)
    state = torch.get_rng_state()
    assert run(train, test, compensation=compensation) == first
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    assert run(train, test, compensation=compensation, seed=1).train_loss != first.train_loss


def test_arrays_tensors_and_one_version_of_each_image_are_the_same_data():
    (images, labels), test = coloured(64, 0), coloured(30, 1)
    plain = run((images, labels), test)
    assert run((torch.from_numpy(images), torch.from_numpy(labels)), test) == plain
    assert run((images[None], labels), test) == plain


def test_only_training_images_are_compensated(monkeypatch):
    train, test = coloured(64, 0), coloured(30, 1)
    seen, evaluated = [], []
    augment, evaluate = training.augment, training.evaluate

    def spy(images, config, generator):
        seen.append(augment(images, config, generator))
        return seen[-1]

    def watch(model, images, labels):
        evaluated.append(images.clone())
        return evaluate(model, images, labels)

    monkeypatch.setattr(training, "augment", spy)
    monkeypatch.setattr(training, "evaluate", watch)
    run(train, test, compensation=CompensationConfig())
    assert sum(len(batch) for batch in seen) == 64 * QUICK.epochs
    assert not torch.equal(seen[0], seen[2])
    assert all(torch.equal(images, torch.from_numpy(test[0])) for images in evaluated)
    seen.clear()
    for mode in ("baked", "none"):
        run(train, test, compensation=CompensationConfig(mode=mode))
    assert not seen


def test_crops_and_flips_are_those_of_the_padded_image():
    image = torch.arange(4 * 4 * 3, dtype=torch.uint8).reshape(1, 4, 4, 3) + 1
    padded = torch.nn.functional.pad(image, (0, 0, 1, 1, 1, 1))
    views = {
        tuple(view.flatten().tolist())
        for dy in range(3)
        for dx in range(3)
        for crop in [padded[0, dy : dy + 4, dx : dx + 4]]
        for view in (crop, crop.flip(1))
    }
    rows = torch.zeros(400, dtype=torch.long)
    config = VictimConfig(crop_padding=1)
    drawn = draw_batch(padded, rows, config, torch.Generator().manual_seed(0))
    pixels = (drawn * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert {tuple(view.flatten().tolist()) for view in pixels} == views
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    plain = VictimConfig(crop_padding=0, flip=False)
    still = draw_batch(image, rows[:1], plain, torch.Generator().manual_seed(0))
    assert torch.equal((still * 255).round().permute(0, 2, 3, 1).to(torch.uint8), image)


def test_learning_rates():
    constant = VictimConfig(lr_schedule="constant", learning_rate=0.1)
    assert {learning_rate_at(step, 50, constant) for step in range(50)} == {0.1}
    cycle = VictimConfig(lr_schedule="one_cycle", learning_rate=0.1)
    rates = [learning_rate_at(step, 100, cycle) for step in range(100)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.001


def test_a_last_batch_of_one_does_not_break_normalisation():
    assert len(run(coloured(33, 0), coloured(9, 1)).test_accuracy) == QUICK.epochs
    assert len(run(coloured(2, 0), coloured(9, 1)).test_accuracy) == QUICK.epochs


def test_bad_data_is_refused():
    good = images, labels = coloured(12, 0)
    for train, extra, message in (
        ((images, labels - 1), None, "from 0"),
        ((images, labels.astype(float)), None, "integers"),
        ((images.astype(float), labels), None, "uint8"),
        ((images, labels[:-1]), None, "12 images"),
        ((images[:0], labels[:0]), None, "0 images"),
        ((np.stack([images, images]), labels[:3]), None, "train"),
        ((images[None][:0], labels), None, "train"),
        (good, coloured(3, 0, size=8), "like the training images"),
        (good, (images, labels[:3]), "extra"),
    ):
        with pytest.raises(InputError, match=message):
            run(train, good, extra=extra)


def test_a_poison_is_learned_instead_of_the_images():
    images, labels = striped(320, 0)
    test = striped(120, 1)
    # One start a class and no crops: the shortcut is then learned within the seconds a test may take.
    poisoned = poison_images(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        [str(index) for index in range(320)],
        PoisonConfig(name="ar", eps_255=510, scope="class"),
        0,
        4,
    )
    config = VictimConfig(
        label_smoothing=0, epochs=4, batch_size=16, learning_rate=0.03, crop_padding=0, flip=False
    )
    clean = run((images, labels), test, config)
    fooled = run((poisoned, torch.from_numpy(labels)), test, config)
    assert clean.test_accuracy[-1] > 90
    assert fooled.train_loss[-1] < 0.1
    assert fooled.test_accuracy[-1] < 45


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
    assert calls == [(name, step / 8) for step in range(8) for name in ("first", "second")]


def test_the_victim_learns_the_targets_of_an_augmentation():
    def shifted(images, targets, model, generator, progress):
        return images, targets.roll(1, dims=1)

    shown = run(coloured(300, 0), coloured(90, 1), augmentations=[shifted])
    assert shown.test_accuracy[-1] < 5, "without it, the same run is right for 95 % of them"


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
    assert modes == [True] * 8


def test_every_epoch_draws_one_version_of_each_image():
    images = numbered(np.arange(20) * 2 + np.array([[0], [1]]))
    assert images.shape == (2, 20, 8, 8, 3)
    seen = epochs_seen((images, np.arange(20) % 2), 6)
    assert all(sorted(epoch // 2) == list(range(20)) for epoch in seen)
    drawn = np.array([epoch[np.argsort(epoch)] % 2 for epoch in seen])
    assert len({tuple(epoch) for epoch in drawn}) > 4
    assert 0.3 < drawn.mean() < 0.7


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
