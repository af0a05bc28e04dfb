"""Victims on Ray: seeds, compensation read from the source, and honest splits."""

import pytest

from eclipse_ray import verbs
from eclipse_ray.config import load_config
from eclipse_ray.errors import InputError
from eclipse_ray.experiments.evaluate import source_compensation
from tests.support import DEBUG

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


def test_compensation_is_what_the_purification_recorded(world, tmp_path):
    settings = {**DEBUG, "compensation.p": 0.25}
    verbs.purify(world.poisoned, str(tmp_path / "out"), denoiser=world.denoiser, settings=settings)
    found = source_compensation(load_config(), str(tmp_path / "out"))
    assert (found.mode, found.p) == ("augment", 0.25)
    overridden = load_config(None, {"compensation.mode": "none"})
    assert source_compensation(overridden, str(tmp_path / "out")).mode == "none"
    assert source_compensation(load_config(), world.poisoned).mode == "none"


def test_a_setting_without_effect_is_not_passed_over_in_silence(world, capsys):
    assert source_compensation(load_config(None, {"compensation.p": 0.3}), world.poisoned).mode == "none"
    assert "compensation.p has no effect" in capsys.readouterr().err
    both = load_config(None, {"compensation.p": 0.3, "compensation.mode": "augment"})
    assert source_compensation(both, world.poisoned).p == 0.3
    assert capsys.readouterr().err == ""


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
