"""Every defense trains a victim for one epoch, and what it is meant for happens to the images."""

import pytest
import torch

from eclipse_ray.config import DefenseConfig, VictimConfig, load_config
from eclipse_ray.defenses import DEFENSES, combine
from eclipse_ray.defenses.simple import privacy
from eclipse_ray.victims.training import train_victim
from tests.defenses.support import images, labels, material
from tests.support import untrained_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")
VICTIM = VictimConfig(epochs=1, batch_size=8, crop_padding=2)
CONFIG = DefenseConfig(draws=2, avatar_steps=2, op_epochs=2, at_steps=2, aa_draws=2)


def trained(name, seed=0):
    defense = combine(name)
    source = material(24, denoiser=untrained_denoiser(**{"denoiser.t_max": 20}))
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
