import torch

from eclipse_ray.compensation import bake
from eclipse_ray.config import CompensationConfig, DenoiserConfig, load_config
from eclipse_ray.diffusion.model import build_denoiser, build_unet
from eclipse_ray.diffusion.sampler import purify
from eclipse_ray.poisons.adp import UNetClassifier, defended, purified

NETWORK: DenoiserConfig = load_config(None, {"denoiser.preset": "debug"}).denoiser
IDS = ["a", "b"]


def denoiser():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_denoiser(build_unet(NETWORK), NETWORK).eval().requires_grad_(False)


def picture(size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_classifier_is_the_denoisers_network_with_another_end():
    model = UNetClassifier(NETWORK, 7)
    assert model(picture()).shape == (2, 7)
    names = dict(build_unet(NETWORK).named_parameters())
    shared = {name.removeprefix("unet.") for name, _ in model.named_parameters()}
    assert shared == set(names)


def test_what_gradients_go_through_is_what_the_defender_does(one_thread):
    x, model = picture(), denoiser()
    through = purified(x, model, 3, IDS)
    real = purify(2 * x - 1, model, model.t_star, 1, 3, IDS)
    assert torch.allclose(2 * through - 1, real, atol=1e-6)
    # Sides that the network cannot halve are padded, as the defender does.
    assert purified(picture(17), model, 3, IDS).shape == (2, 3, 17, 17)


def test_compensation_for_attacks_is_that_of_the_baked_dataset():
    config = CompensationConfig()
    stored = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = stored.permute(0, 3, 1, 2).float() / 255
    seen = defended(x, None, config, 5, IDS)
    assert torch.equal((seen * 255).round().to(torch.uint8).permute(0, 2, 3, 1), bake(stored, IDS, config, 5))


def test_gradients_through_noise_denoiser_and_compensation_equal_finite_differences(one_thread):
    # In the middle of the range, so that no clamp cuts a difference in two.
    x = (0.5 + 0.1 * (picture() - 0.5)).double()
    model, config = denoiser().double(), CompensationConfig(p=0.4, sigma=0.02, coarse_sigma=0.02)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(x.shape, generator=generator, dtype=torch.float64)

    def value(at):
        return (weights * defended(at, model, config, 2, IDS).square()).sum()

    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(at), at)
    for _ in range(4):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        measured = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
        assert torch.allclose(measured, (gradient * direction).sum(), rtol=1e-4)
    # The denoiser matters: without it the gradient is another.
    (without,) = torch.autograd.grad((weights * defended(at, None, config, 2, IDS).square()).sum(), at)
    assert not torch.allclose(gradient, without, rtol=1e-2)
