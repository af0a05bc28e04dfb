from dataclasses import replace

import pytest
import torch

from eclipse_ray.compensation import bake, compensate
from eclipse_ray.config import CompensationConfig
from eclipse_ray.diffusion.network import build_unet
from eclipse_ray.diffusion.sampling import purify
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons import fit_poison
from eclipse_ray.poisons.adp import UNetClassifier, defender, new_unet, purified
from eclipse_ray.poisons.interface import quiet_session
from eclipse_ray.poisons.surrogate import keyed_generator, load_surrogate, under
from tests.poisons.helpers import (
    CLASSES,
    CPU,
    Memory,
    as_floats,
    check_resume,
    check_storage,
    losses,
    tiny_config,
    tiny_images,
)
from tests.support import UNET as UNET2D
from tests.support import debug_config, untrained_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = ["a", "b"]
SETTINGS = {
    "surrogate_batch_size": 8,
    "rounds": 3,
    "round_batches": 12,
    "steps": 3,
    "step_size_255": 2.5,
    "stop_error": 0.0,
}
UNET = SETTINGS | {"unet_channels": (8, 8)}


def picture(size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_classifier_is_a_denoisers_network_with_another_end():
    model = UNetClassifier((8, 8), 7)
    assert model(picture()).shape == (2, 7)
    other = {name for name, _ in build_unet(debug_config(**UNET2D)).named_parameters()}
    assert {name.removeprefix("unet.") for name, _ in model.named_parameters()} == other


def test_what_gradients_go_through_is_what_the_defender_does():
    x, model = picture(), untrained_denoiser()
    for t_star in (model.t_star, 2):
        with torch.no_grad():
            through = purified(x, model, t_star, 3, IDS)
        assert torch.allclose(2 * through - 1, purify(2 * x - 1, model, t_star, 1, 3, IDS), atol=1e-6)
    # Sides that the network cannot halve are padded, as the defender does.
    assert purified(picture(17), model, 2, 3, IDS).shape == (2, 3, 17, 17)


def test_compensation_for_attacks_is_that_of_the_baked_dataset():
    config = CompensationConfig()
    stored = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = compensate(as_floats(stored), IDS, config, 5)
    assert torch.equal((seen * 255).round().to(torch.uint8).permute(0, 2, 3, 1), bake(stored, IDS, config, 5))


def test_gradients_through_noise_denoiser_and_compensation_equal_finite_differences():
    # In the middle of the range, so that no clamp cuts a difference in two.
    x = (0.5 + 0.1 * (picture() - 0.5)).double()
    settings = {"compensation_sigma": 0.02, "compensation_coarse_sigma": 0.02}
    config = tiny_config("adp", variant="strong", **SETTINGS, **settings)
    model, generator = untrained_denoiser().double().requires_grad_(False), torch.Generator().manual_seed(1)
    weights = torch.rand(x.shape, generator=generator, dtype=torch.float64)

    def value(at, through=model):
        return (weights * defender(config, through)(at, keyed_generator("draw")).square()).sum()

    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(at), at)
    for _ in range(4):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        measured = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
        assert torch.allclose(measured, (gradient * direction).sum(), rtol=1e-4)
    # The denoiser matters: without it the gradient is another.
    (without,) = torch.autograd.grad(value(at, None), at)
    assert not torch.allclose(gradient, without, rtol=1e-2)


def test_every_draw_of_the_defender_is_another():
    config, generator = tiny_config("adp", variant="strong", **SETTINGS), keyed_generator("draws")
    see, x = defender(config, untrained_denoiser().requires_grad_(False)), picture()
    assert not torch.equal(see(x, generator), see(x, generator))
    assert torch.equal(see(x, keyed_generator(1)), see(x, keyed_generator(1)))


def test_noise_lowers_the_loss_of_the_unet_under_compensation():
    data, config = tiny_images(48), tiny_config("adp", **UNET)
    state = check_resume(data, config)
    poisoned = check_storage(data, state, config)
    model = new_unet(config, CLASSES, 0, CPU)
    model.load_state_dict(under(state, "surrogate.0."))
    check_lower(model.eval(), data, poisoned, defender(config, None))


def test_noise_lowers_the_loss_of_a_victim_behind_the_denoiser():
    data, config, model = tiny_images(48), tiny_config("adp", variant="strong", **SETTINGS), untrained_denoiser()
    state = check_resume(data, config, denoiser=model)
    poisoned = check_storage(data, state, config)
    victim = load_surrogate(state, 0, config, CLASSES, CPU)
    check_lower(victim, data, poisoned, defender(config, model))
    # The attack borrows the denoiser and gives it back as it was.
    assert all(parameter.requires_grad for parameter in model.parameters())


def check_lower(model, data, poisoned, see):
    def seen_loss(images):
        shown = [see(as_floats(images), keyed_generator("check", index)) for index in range(8)]
        return torch.stack([losses(model, x, data.labels) for x in shown]).mean(0)

    fallen = seen_loss(poisoned) < seen_loss(data.images)
    assert float(fallen.float().mean()) > 0.9


def test_settings_that_cannot_work_are_named():
    data, strong = tiny_images(48), {"variant": "strong", **SETTINGS}
    with pytest.raises(ConfigError, match="name its folder"):
        fit_poison(data, tiny_config("adp", **strong), 0, quiet_session())
    session = replace(Memory().session(), denoiser=untrained_denoiser())
    with pytest.raises(ConfigError, match="trained up to"):
        fit_poison(data, tiny_config("adp", **strong, t_star=9), 0, session)
