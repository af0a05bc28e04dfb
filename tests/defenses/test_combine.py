"""Names and combinations: what composes, in which order, what is refused; each trains a victim."""

import pytest
import torch

from eclipse_ray.config import DefenseConfig, VictimConfig, load_config
from eclipse_ray.defenses import DEFENSES, combine, defense_settings, resolved_defense
from eclipse_ray.defenses.simple import privacy
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.victims.training import train_victim
from tests.defenses.support import batch, generator, images, labels, linear_victim, material
from tests.support import untrained_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = DefenseConfig(draws=2, cutout_size=6, avatar_steps=2, op_epochs=2, at_steps=2, aa_draws=2)
VICTIM = VictimConfig(epochs=1, batch_size=8, crop_padding=2)
SOURCE = material(8, denoiser=untrained_denoiser())


def test_one_name_is_the_defense_itself():
    assert all(combine(name) is defense for name, defense in DEFENSES.items())


def test_transforms_apply_from_left_to_right():
    purified = DEFENSES["eclipse"].transform(SOURCE, CONFIG)
    gray_last = combine("eclipse+iss-g").transform(SOURCE, CONFIG)
    assert torch.equal(gray_last[..., 0], gray_last[..., 1])
    again = material(8, images=purified)
    assert torch.equal(gray_last, DEFENSES["iss-g"].transform(again, CONFIG))
    jpeg_last, gray_then = combine("iss-g+iss-j").transform(SOURCE, CONFIG), combine("iss-j+iss-g")
    assert not torch.equal(jpeg_last, gray_then.transform(SOURCE, CONFIG))


def test_a_transform_after_several_draws_is_applied_to_each():
    found = combine("eclipse-draws+iss-j").transform(SOURCE, CONFIG)
    draws = DEFENSES["eclipse-draws"].transform(SOURCE, CONFIG)
    assert found.shape == draws.shape
    for one, draw in zip(found, draws, strict=True):
        assert torch.equal(one, SOURCE.jpeg(draw, 10))
    before = combine("iss-g+eclipse-draws").transform(SOURCE, CONFIG)
    assert before.shape == draws.shape


def test_augmentations_apply_from_left_to_right_from_one_generator():
    values, targets = batch()
    both = combine("mixup+cutout").augmentation(CONFIG)
    found = both(values, targets, linear_victim(), generator(3), 0.5)
    source = generator(3)
    expected = DEFENSES["mixup"].augmentation(CONFIG)(values, targets, linear_victim(), source, 0.5)
    expected = DEFENSES["cutout"].augmentation(CONFIG)(*expected, linear_victim(), source, 0.5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert (found[0] == 0).any()


def test_the_other_parts_add_up():
    found = combine("eclipse+dilution+dp-sgd+cutout")
    assert (found.privacy, found.dilution) == (True, True)
    assert found.compensation is DEFENSES["eclipse"].compensation
    assert found.transform(SOURCE, CONFIG).shape == SOURCE.images.shape
    assert combine("none+dilution").transform is None
    assert combine("none+dilution").augmentation is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eclipsee", "did you mean eclipse?"),
        ("eclipse+cutmixx", "did you mean cutmix?"),
        ("jpeg", "the defense 'jpeg' is unknown; there are: none, eclipse,"),
        ("", "unknown"),
        ("eclipse+", "unknown"),
        ("aa+aa", "names one twice"),
        ("dp-sgd+dp-sgd", "names one twice"),
        ("eclipse-a+avatar", "two of them purify"),
        ("eclipse-draws+eclipse-a", "two of them purify"),
        ("eclipse-b+eclipse-c", "two of them compensate"),
        ("eclipse-baked+eclipse-bc", "two of them compensate"),
        ("aa+aa-max", "the worst of several draws"),
        ("op+op-projection", "share a part"),
        ("op-augmentation+op", "share a part"),
    ],
)
def test_what_cannot_be_combined_is_refused(name, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        combine(name)


def test_two_defenses_with_privacy_are_refused(monkeypatch):
    monkeypatch.setitem(DEFENSES, "another", DEFENSES["dp-sgd"])
    with pytest.raises(ConfigError, match="two of them train with privacy"):
        combine("dp-sgd+another")


def test_published_numbers_are_the_defaults():
    found = resolved_defense(load_config().defense)
    assert (found.cutout_size, found.iss_jpeg_quality) == (16, 10)
    assert (found.aa_draws, found.aa_p, found.aa_until) == (5, 0.5, 60 / 200)
    assert (found.op_epochs, found.op_learning_rate, found.op_batch_size) == (20, 0.1, 1024)
    assert (found.at_eps_255, found.at_steps, found.avatar_noise_255) == (8, 10, 43)
    assert (privacy(found).max_grad_norm, privacy(found).noise_multiplier) == (1.0, 0.01)


def test_material_that_is_no_labelled_set_is_refused():
    with pytest.raises(InputError, match="uint8"):
        material(images=images(24).float())
    with pytest.raises(InputError, match="24 images"):
        material(labels=labels(23))


def test_every_setting_of_a_defense_is_written_out_and_survives():
    names = dict.fromkeys(key for model in defense_settings().values() for key in model.model_fields)
    config = load_config(None, {"defense.aa_draws": 3, "defense.aa_roughness": [0.1, 0.7]}).defense
    resolved = resolved_defense(config)
    assert list(resolved.model_extra) == list(names)
    assert (resolved.aa_draws, resolved.aa_roughness, resolved.op_epochs) == (3, [0.1, 0.7], 20)
    assert resolved_defense(resolved) == resolved


def test_each_setting_belongs_to_one_class():
    models = set(defense_settings().values())
    keys = [key for model in models for key in model.model_fields]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aa_drawz": 3}, r"defense\.aa_drawz: unknown setting; did you mean defense\.aa_draws\?"),
        ({"op_epochs": 0}, r"defense\.op_epochs: .*greater than or equal to 1"),
    ],
)
def test_settings_that_no_defense_has_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolved_defense(DefenseConfig(**settings))


def trained(name, seed=0):
    defense = combine(name)
    source = material(24, denoiser=untrained_denoiser(t_max=20))
    stored = defense.transform(source, CONFIG) if defense.transform else source.images
    return train_victim(
        stored,
        source.labels,
        images(8, seed=5),
        labels(8),
        VICTIM,
        defense.compensation(load_config()) if defense.compensation else None,
        seed,
        "cpu",
        augmentations=[defense.augmentation(CONFIG)] if defense.augmentation else [],
        privacy=privacy(CONFIG) if defense.privacy else None,
        extra=(images(4, 16, seed=9), labels(4)) if defense.dilution else None,
    )


@pytest.mark.parametrize("name", [*DEFENSES, "eclipse+aa", "eclipse-draws+cutmix+dilution", "at+dp-sgd"])
def test_every_defense_trains_a_victim(name):
    result = trained(name)
    assert len(result.test_accuracy) == 1
    assert torch.isfinite(torch.tensor(result.train_loss)).all()
    if name in ("aa", "at", "eclipse-draws", "op"):
        assert trained(name) == result, "the same seed gives the same result"
    if name not in ("none", "avatar-sparse", "eclipse-a"):
        assert result != trained("none"), "it does something"
