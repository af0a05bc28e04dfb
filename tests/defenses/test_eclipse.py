"""ECLIPSE and its ablations: which parts change the pixels, which the loader, and how draws are keyed."""

from dataclasses import replace

import pytest
import torch

from eclipse_ray.compensation import bake
from eclipse_ray.config import CompensationConfig, DefenseConfig, PurifyConfig, load_config
from eclipse_ray.defenses import DEFENSES
from eclipse_ray.defenses.eclipse import depth_of, draw_seed
from eclipse_ray.diffusion.process import cosine_alphas_cumprod, linear_alphas_cumprod
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.errors import ConfigError, InputError
from tests.defenses.support import material
from tests.support import untrained_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = DefenseConfig()
DENOISER = untrained_denoiser()
SOURCE = material(12, denoiser=DENOISER, purify=PurifyConfig(batch_size=5))
# Noise, and what of it is set: grayscale p, fine sigma, coarse sigma; and whether pixels are purified.
PARTS = {
    "none": (False, None),
    "eclipse": (True, (0.4, 0.05, 0.08)),
    "eclipse-published": (True, (0.4, 0.05, 0.0)),
    "eclipse-draws": (True, (0.4, 0.05, 0.08)),
    "eclipse-baked": (True, None),
    "eclipse-a": (True, None),
    "eclipse-b": (False, (0.4, 0.0, 0.0)),
    "eclipse-c": (False, (0.0, 0.05, 0.0)),
    "eclipse-ab": (True, (0.4, 0.0, 0.0)),
    "eclipse-ac": (True, (0.0, 0.05, 0.0)),
    "eclipse-bc": (False, (0.4, 0.05, 0.0)),
    "avatar-sparse": (True, None),
}


def purified(seed=SOURCE.seed, **settings):
    return purify_images(SOURCE.images, DENOISER, seed=seed, ids=SOURCE.ids, **settings)


@pytest.mark.parametrize("name", PARTS)
def test_ablations_have_the_parts_that_their_names_say(name):
    defense, (changes, loader) = DEFENSES[name], PARTS[name]
    assert (defense.transform is not None) == changes
    assert (defense.compensation is not None) == (loader is not None)
    if loader:
        found = defense.compensation(load_config(None, {"compensation.mode": "none"}))
        assert (found.p, found.sigma, found.coarse_sigma, found.mode) == (*loader, "augment")
        follows = defense.compensation(load_config(None, {"compensation.p": 0.7})).p
        assert follows == (0.7 if loader[0] else 0.0), "the section's own settings are followed"
    assert (defense.augmentation, defense.privacy, defense.dilution) == (None, False, False)


@pytest.mark.parametrize("name", ["eclipse", "eclipse-a", "eclipse-ab", "avatar-sparse", "eclipse-published"])
def test_diffusion_alone_changes_the_stored_pixels(name):
    found = DEFENSES[name].transform(SOURCE, CONFIG)
    # Another batch size, so that one rounding may differ.
    assert int((found.int() - purified().int()).abs().max()) <= 1
    assert (found != SOURCE.images).float().mean() > 0.5


def test_purification_follows_its_section():
    settings = PurifyConfig(t_star=2, num_inference_steps=2, sampler="ddim")
    found = DEFENSES["eclipse"].transform(replace(SOURCE, purify=settings), CONFIG)
    assert torch.equal(found, purified(t_star=2, num_inference_steps=2, sampler="ddim"))
    assert not torch.equal(found, DEFENSES["eclipse"].transform(SOURCE, CONFIG))


def test_baked_is_purification_and_then_compensation():
    chosen = CompensationConfig(p=0.5, sigma=0.02, coarse_sigma=0.0)
    found = DEFENSES["eclipse-baked"].transform(replace(SOURCE, compensation=chosen), CONFIG)
    rough = DEFENSES["eclipse-a"].transform(SOURCE, CONFIG)
    assert torch.equal(found, bake(rough, SOURCE.ids, chosen, SOURCE.seed))
    assert not torch.equal(found, rough)


def test_draws_differ_and_are_keyed_by_their_number():
    found = DEFENSES["eclipse-draws"].transform(SOURCE, DefenseConfig(draws=3))
    assert found.shape == (3, *SOURCE.images.shape)
    assert torch.equal(found[0], DEFENSES["eclipse"].transform(SOURCE, CONFIG))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (found[first] != found[second]).float().mean() > 0.3
    fewer = DEFENSES["eclipse-draws"].transform(SOURCE, DefenseConfig(draws=2))
    assert torch.equal(fewer, found[:2]), "a draw depends on its number, not on how many there are"
    part = replace(SOURCE, images=SOURCE.images[3:8], labels=SOURCE.labels[3:8], ids=SOURCE.ids[3:8])
    alone = DEFENSES["eclipse-draws"].transform(part, DefenseConfig(draws=3))
    assert int((alone.int() - found[:, 3:8].int()).abs().max()) <= 1, "nor on the other images"
    seeds = {draw_seed(seed, draw) for seed in (0, 1, 2**63 - 1) for draw in range(50)}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_avatars_depth_is_found_in_the_schedule():
    # Variance-preserving SDE, beta 0.1 to 20, at time 0.1: noise 43.4 grey levels of a full-strength image.
    cosine = cosine_alphas_cumprod(4000)
    t_star = depth_of(43.0, cosine)
    levels = 127.5 * ((1 - cosine) / cosine).sqrt()
    assert abs(float(levels[t_star - 1]) - 43) < 0.1
    assert 750 < t_star < 850
    assert depth_of(6.4, cosine) == pytest.approx(100, abs=2), "ECLIPSE's own depth"
    linear = linear_alphas_cumprod(1000, 1e-4, 0.02)
    assert depth_of(43.4, linear) == pytest.approx(100, abs=2), "time 0.1 of the schedule its authors use"


def test_avatar_noises_deeply_and_refuses_a_shallow_denoiser():
    with pytest.raises(ConfigError, match=r"t_star \d+.*below 5"):
        DEFENSES["avatar"].transform(SOURCE, DefenseConfig(avatar_noise_255=100))
    deep = untrained_denoiser(t_max=20)
    source = replace(SOURCE, denoiser=deep)
    found = DEFENSES["avatar"].transform(source, DefenseConfig(avatar_steps=2))
    t_star = depth_of(43.0, deep.alphas_cumprod)
    expected = purify_images(
        SOURCE.images, deep, t_star=t_star, num_inference_steps=2, sampler="ddpm", seed=7, ids=SOURCE.ids
    )
    assert int((found.int() - expected.int()).abs().max()) <= 1
    assert DEFENSES["avatar"].compensation is None


@pytest.mark.parametrize("name", ["eclipse", "eclipse-baked", "eclipse-draws", "avatar"])
def test_a_missing_denoiser_is_named(name):
    with pytest.raises(InputError, match=r"purify\.denoiser"):
        DEFENSES[name].transform(material(4), CONFIG)
