"""Recipes: named defaults of a victim's training, which explicit keys override."""

import yaml

from eclipse_ray.config import VictimConfig, load_config, with_overrides


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
