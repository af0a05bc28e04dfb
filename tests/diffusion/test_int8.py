"""The default network in integers of 8 bits: near the floats, the same for each image in any batch, or refused."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from eclipse_ray.diffusion import network
from eclipse_ray.diffusion.network import build_denoiser, build_unet, has_int8, set_precision
from eclipse_ray.diffusion.process import predict_x0, split_output
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.diffusion.shuffled import BLOCK, assembled
from eclipse_ray.errors import ConfigError
from tests.diffusion.test_shuffled import trained_like
from tests.support import debug_config

T = 399
needs_vnni = pytest.mark.skipif(not has_int8(torch.device("cpu")), reason="this CPU has no AVX512-VNNI")


@pytest.fixture(params=["fixed_small", "learned_range"])
def denoiser(request):
    return trained_like(variance_type=request.param, block_out_channels=[16], num_train_timesteps=1000, t_max=500)


def noised(denoiser, images, seed=0):
    abar = float(denoiser.alphas_cumprod[T])
    generator = torch.Generator().manual_seed(seed)
    return abar**0.5 * images + (1 - abar) ** 0.5 * torch.randn(images.shape, generator=generator)


def smooth(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    return functional.interpolate(corners, size=(height, width), mode="bilinear")


def output(denoiser, x_t, precision):
    denoiser.precision = precision
    with torch.inference_mode():
        return denoiser(x_t, torch.full((len(x_t),), T))


def test_scales_and_shifts_in_the_convolutions_change_nothing(denoiser):
    at = denoiser.unet.at(T * denoiser.timestep_scale)
    x_t = noised(denoiser, smooth(2, 32, 48))
    pixels = functional.pixel_unshuffle(x_t, BLOCK)
    hidden = functional.conv2d(pixels, *at.convolutions[0], padding=1)
    for first, second in zip(at.convolutions[1::2], at.convolutions[2::2], strict=True):
        inside = functional.conv2d(hidden, *first, padding=1).relu()
        hidden = hidden + functional.conv2d(inside, *second, padding=1)
    last = functional.conv2d((hidden * at.gain + at.shift).relu(), *at.last, padding=1)
    expected = output(denoiser, x_t, "float32")
    assert torch.allclose(
        assembled(pixels, last, at.skip), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@needs_vnni
@pytest.mark.parametrize("size", [(32, 32), (16, 50), (128, 96)])
def test_it_is_near_the_floats_everywhere_and_at_the_border(denoiser, size):
    x_t = noised(denoiser, smooth(4, *size))
    exact, rounded = (output(denoiser, x_t, one) for one in ("float32", "int8"))
    assert rounded.shape == exact.shape
    assert rounded.dtype == torch.float32
    error, scale = rounded - exact, float(exact.square().mean().sqrt())
    assert 0 < float(error.square().mean().sqrt()) < 0.06 * scale
    border = torch.cat([error[..., :2, :].flatten(), error[..., -2:, :].flatten(), error[..., :2].flatten()])
    assert float(border.square().mean().sqrt()) < 0.1 * scale


@needs_vnni
def test_an_image_is_the_same_alone_in_another_batch_and_a_second_time(denoiser):
    images = ((smooth(5, 40, 30) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    ids = [f"image-{index}" for index in range(5)]
    set_precision(denoiser, "int8")
    together = purify_images(images, denoiser, t_star=T + 1, num_inference_steps=1, ids=ids)
    again = purify_images(images, denoiser, t_star=T + 1, num_inference_steps=1, ids=ids)
    assert torch.equal(together, again)
    alone = purify_images(images[3:4], denoiser, t_star=T + 1, num_inference_steps=1, ids=ids[3:4])
    assert torch.equal(together[3:4], alone)
    copied = purify_images(images, copy.deepcopy(denoiser), t_star=T + 1, num_inference_steps=1, ids=ids)
    assert torch.equal(together, copied)


@needs_vnni
def test_each_step_has_its_own_scales_and_tiles_agree_with_the_whole(denoiser):
    images = ((smooth(1, 150, 130) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    set_precision(denoiser, "int8")
    given = {"t_star": T + 1, "num_inference_steps": 3, "ids": ["a"], "sampler": "ddim"}
    whole = purify_images(images, denoiser, **given).numpy().astype(float)
    assert len(denoiser.networks) == 3
    assert max(denoiser.networks) == T
    tiles = purify_images(images, denoiser, tile=96, tile_overlap=48, **given).numpy().astype(float)
    denoiser.precision = "float32"
    exact = purify_images(images, denoiser, **given).numpy().astype(float)
    assert np.abs(whole - exact).mean() < 4
    assert np.abs(tiles - whole).mean() < 2


@needs_vnni
def test_a_trained_denoiser_loses_less_than_a_fifth_of_a_decibel():
    """Trained a little on smooth images; what it returns is nearer to them than what it is given."""
    config = debug_config(block_out_channels=[16], layers_per_block=2, num_train_timesteps=1000, t_max=500)
    torch.manual_seed(0)
    denoiser = build_denoiser(build_unet(config), config)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    abar = float(denoiser.alphas_cumprod[T])
    for step in range(150):
        x_t = noised(denoiser, smooth(16, 16, 16, seed=step), seed=step)
        eps = (x_t - abar**0.5 * smooth(16, 16, 16, seed=step)) / (1 - abar) ** 0.5
        loss = functional.mse_loss(denoiser(x_t, torch.full((16,), T)), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = smooth(32, 32, 32, seed=999)
    x_t = noised(denoiser.eval(), images, seed=999)

    def psnr(precision):
        eps_pred, _ = split_output(output(denoiser, x_t, precision))
        return float(10 * torch.log10(4 / functional.mse_loss(predict_x0(x_t, eps_pred, abar), images)))

    exact, noise = psnr("float32"), float(10 * torch.log10(4 / functional.mse_loss(x_t / abar**0.5, images)))
    assert exact > noise + 5
    assert abs(psnr("int8") - exact) < 0.2


def test_where_it_cannot_be_had_it_is_refused_in_one_sentence(denoiser, monkeypatch):
    for known, words in (
        ({"avx512_vnni": False}, "a CPU without it"),
        ({}, "a CPU of which torch .* cannot tell"),
    ):
        monkeypatch.setattr(network, "_capabilities", lambda known=known: known)
        with pytest.raises(ConfigError, match=f"AVX512-VNNI, and this machine computes on {words}"):
            set_precision(denoiser, "int8")
    config = debug_config(network="unet2d")
    with pytest.raises(ConfigError, match="network shuffled"):
        set_precision(build_denoiser(build_unet(config), config), "int8")
