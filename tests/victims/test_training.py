import pytest
import torch

from eclipse_ray.config import CompensationConfig, PoisonConfig, VictimConfig
from eclipse_ray.errors import InputError
from eclipse_ray.poisons import poison_images
from eclipse_ray.victims import training
from eclipse_ray.victims.training import draw_batch, learning_rate_at, train_victim
from tests.victims.images import coloured, striped

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = VictimConfig(epochs=4, batch_size=32, learning_rate=0.05, crop_padding=2)


def run(train, test, config=QUICK, compensation=None, seed=0, on_epoch=None):
    return train_victim(*train, *test, config, compensation, seed, "cpu", on_epoch)


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


def test_tensors_and_arrays_are_the_same_data():
    (images, labels), test = coloured(64, 0), coloured(30, 1)
    assert run((torch.from_numpy(images), torch.from_numpy(labels)), test) == run((images, labels), test)


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
    images, labels = coloured(12, 0)
    for train, message in (
        ((images, labels - 1), "from 0"),
        ((images, labels.astype(float)), "integers"),
        ((images.astype(float), labels), "uint8"),
        ((images, labels[:-1]), "12 images"),
        ((images[:0], labels[:0]), "0 images"),
    ):
        with pytest.raises(InputError, match=message):
            run(train, (images, labels))


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
