"""The fast network: its cost, its symmetries, and that it needs no diffusers."""

import subprocess
import sys

import torch
from diffusers.models.embeddings import get_timestep_embedding

from eclipse_ray.config import load_config
from eclipse_ray.diffusion.network import build_denoiser, build_unet
from eclipse_ray.diffusion.shuffled import WAVES, ShuffledNetwork, _waves

SHUFFLED = {"denoiser.network": "shuffled", "denoiser.block_out_channels": [32], "denoiser.layers_per_block": 3}


def trained_like(**settings):
    """The network with random numbers in place of the zeros with which its last layers start."""
    own = {f"denoiser.{key}": value for key, value in settings.items()}
    config = load_config(None, {**SHUFFLED, **own}).denoiser
    torch.manual_seed(0)
    network = build_unet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return build_denoiser(network, config).eval()


def test_it_costs_at_most_16_000_multiplications_per_pixel():
    network = build_unet(load_config(None, SHUFFLED).denoiser)
    assert isinstance(network, ShuffledNetwork)
    # Every weight of a convolution is used once per pixel of the network, which is 2 x 2 pixels of an image.
    weights = sum(module.weight.numel() for module in network.modules() if isinstance(module, torch.nn.Conv2d))
    assert 12_000 < weights / 4 < 16_000


def test_it_is_shown_the_timestep_as_networks_of_diffusers_are():
    timesteps = torch.tensor([0, 1, 399, 3999])
    assert torch.equal(_waves(timesteps), get_timestep_embedding(timesteps, WAVES))


def test_it_is_built_saved_and_opened_without_diffusers(tmp_path):
    """Its import takes longer than all else that a worker does before its first image."""
    card = {"t_max": 500, "t_star": 400, "num_inference_steps": 1, "iterations": 1, "sparse_images": 2}
    card |= {"sparse_hashes": [], "fingerprint": "f", "settings": {}}
    code = f"""
import sys, torch
from eclipse_ray import load_denoiser, purify_images
from eclipse_ray.config import load_config
from eclipse_ray.diffusion.checkpoint import Card, save_denoiser
from eclipse_ray.diffusion.network import build_denoiser, build_unet
config = load_config(None, {SHUFFLED}).denoiser
save_denoiser("{tmp_path}", build_denoiser(build_unet(config), config), Card(**{card}))
denoiser = load_denoiser("{tmp_path}")
purify_images(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), denoiser, ids=["a"])
assert "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.inference_mode()
def test_a_shift_by_a_block_of_pixels_shifts_the_output_and_nothing_else():
    denoiser, t = trained_like(), torch.tensor([300])
    x = torch.randn(1, 3, 96, 64)
    reach = 2 * (2 + 2 * 3)
    whole, part = denoiser(x, t), denoiser(x[:, :, 2:], t)
    inside = slice(reach, 96 - 2 - reach)
    assert torch.allclose(part[:, :, inside], whole[:, :, 2:][:, :, inside], atol=1e-5)
    assert not torch.allclose(part[:, :, :1], whole[:, :, 2:3], atol=1e-3)


@torch.inference_mode()
def test_each_image_of_a_batch_is_computed_with_its_own_timestep():
    denoiser, x = trained_like(), torch.randn(2, 3, 16, 16)
    both = denoiser(x, torch.tensor([3, 400]))
    for row, t in enumerate((3, 400)):
        assert torch.allclose(both[row], denoiser(x[row : row + 1], torch.tensor([t]))[0], atol=1e-3)
    assert not torch.allclose(both[0], denoiser(x[:1], torch.tensor([400]))[0], atol=1e-1)


@torch.inference_mode()
def test_a_learned_variance_mix_follows_eps_pred():
    denoiser = trained_like(variance_type="learned_range")
    assert denoiser.learned_range
    assert denoiser(torch.randn(2, 3, 16, 18), torch.tensor([1, 2])).shape == (2, 6, 16, 18)
