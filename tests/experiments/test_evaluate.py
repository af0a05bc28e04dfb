"""Victims on Ray: seeds, compensation read from the source, and honest splits."""

import numpy as np
import pytest

from eclipse_ray import ledger, verbs
from eclipse_ray.config import CompensationConfig, Config, load_config
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.errors import InputError
from eclipse_ray.experiments import run
from eclipse_ray.experiments.experiment import evaluated_compensation, open_evaluation, open_matrix
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import fill, noise
from tests.support import DEBUG, board_of, dotted

QUICK = {**DEBUG, "victim.epochs": 2, "evaluate.seeds": 2, "victim.batch_size": 32}


def test_mean_and_deviation_over_seeds(world):
    result = verbs.evaluate(world.rest, test=world.test, clean=world.clean, settings=QUICK)
    assert (result.seeds, result.epochs, result.victim) == (2, 2, "small")
    assert len(result.accuracies) == 2
    assert result.test_accuracy == pytest.approx(sum(result.accuracies) / 2, abs=0.02)
    assert 0 <= result.test_accuracy <= result.best_epoch_accuracy <= 100
    assert result.compensation == "none"
    again = verbs.evaluate(world.rest, test=world.test, settings=QUICK)
    assert again.accuracies == result.accuracies


def compensation_of(source: str, **changes: object) -> CompensationConfig:
    """What a victim of `source` trains with, whether the settings are given or written out in full."""
    short = load_config(None, dotted(changes))
    full = Config.model_validate(short.model_dump(mode="json"))
    recorded = ledger.recorded_settings(Store(source))
    found = evaluated_compensation(short, recorded, source)
    assert evaluated_compensation(full, recorded, source) == found
    return found


def test_compensation_is_what_the_purification_recorded(world, tmp_path):
    settings = {**DEBUG, "compensation.p": 0.25}
    output = str(tmp_path / "out")
    verbs.purify(world.poisoned, output, denoiser=world.denoiser, settings=settings)
    found = compensation_of(output)
    assert (found.mode, found.p) == ("augment", 0.25)
    assert compensation_of(output, evaluate__compensation="none").mode == "none"
    assert compensation_of(output, evaluate__compensation="augment").p == load_config().compensation.p
    assert compensation_of(world.poisoned).mode == "none"


def test_a_setting_without_effect_is_not_passed_over_in_silence(world, capsys):
    assert compensation_of(world.poisoned, compensation__p=0.3).mode == "none"
    assert "compensation.p has no effect" in capsys.readouterr().err
    both = compensation_of(world.poisoned, compensation__p=0.3, evaluate__compensation="augment")
    assert (both.mode, both.p) == ("augment", 0.3)
    assert capsys.readouterr().err == ""


def test_a_victim_of_a_baked_set_sees_its_images_as_they_are_stored(world, tmp_path, monkeypatch):
    seen = []

    def train(images, labels, test_images, test_labels, victim, compensation, *rest, **others):
        seen.append((images, compensation.mode))
        rest[-1](1, 50.0, 0.0)

    monkeypatch.setattr(run, "train_victim", train)
    output = str(tmp_path / "out")
    baked = {**DEBUG, "compensation.mode": "baked"}
    verbs.purify(world.poisoned, output, denoiser=world.denoiser, settings=baked)
    opened = open_evaluation(load_config(None, {"data.source": output, "data.test": world.test}))
    bench, board = run.Bench(opened.sets, opened.cache, 1, 0.1), board_of(lambda entry: None)
    run.measure(opened.grid.recipes[0], bench, None, board)
    ((images, mode),) = seen
    assert mode == "baked"
    assert np.array_equal(images, load_images(output, load_config().data).images)


def test_a_purified_set_whose_denoiser_saw_its_images_is_refused_whatever_their_size_in_memory(world, tmp_path):
    """The denoiser's card names the images as they are stored, and data.resize changes them afterwards."""
    output = tmp_path / "out"
    verbs.purify(world.rest, str(output), denoiser=world.denoiser, settings=DEBUG)
    settings = {**QUICK, "data.resize": 24}
    with pytest.raises(InputError, match="sparse clean set and test set share 20"):
        verbs.evaluate(str(output), test=world.clean, settings=settings)
    with pytest.raises(InputError, match="training and test set share 240"):
        verbs.evaluate(world.rest, test=world.rest, settings=settings)


@pytest.mark.parametrize(
    ("train", "test", "clean", "words"),
    [
        ("rest", "rest", None, "training and test set share 240 images"),
        ("rest", "test", "test", "sparse clean set and test set share 60"),
        ("clean", "test", "clean", "sparse clean set and training set share 20"),
    ],
)
def test_sets_that_share_images_are_refused(world, train, test, clean, words):
    folders = {name: getattr(world, name) for name in (train, test, clean) if name}
    with pytest.raises(InputError, match=words):
        verbs.evaluate(folders[train], test=folders[test], clean=folders[clean] if clean else None, settings=QUICK)


def test_a_test_set_that_lacks_a_class_is_refused(tmp_path):
    for seed, (split, classes) in enumerate((("train", "abc"), ("test", "bc"))):
        fill(tmp_path / split, *(f"{name}/0.png" for name in classes), images=noise(3, 16, seed=seed))
    with pytest.raises(InputError, match=r"train has the classes a, b, c and .*test has b, c"):
        verbs.evaluate(str(tmp_path / "train"), test=str(tmp_path / "test"), settings=QUICK)
    places = {f"data.{key}": str(tmp_path / key) for key in ("test", "output")}
    config = load_config(None, {**places, "data.source": str(tmp_path / "train"), "matrix.defenses": ["none"]})
    with pytest.raises(InputError, match=r"train has the classes a, b, c and .*test has b, c"):
        open_matrix(config)
