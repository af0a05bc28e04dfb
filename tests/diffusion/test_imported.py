"""Imported weights compute what the original computes, and what cannot be imported is refused in one sentence."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from eclipse_ray.diffusion.checkpoint import load_denoiser, read_card
from eclipse_ray.diffusion.improved_diffusion import (
    FixedHeadsUNet2DModel,
    import_checkpoint,
    iterations_in,
    recommended_depth,
)
from eclipse_ray.diffusion.process import cosine_alphas_cumprod, linear_alphas_cumprod, linear_betas, noise_std
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.errors import ConfigError, InputError
from tests.diffusion.original_unet import Original, original_unet
from tests.support import change_json

pytestmark = pytest.mark.usefixtures("one_thread")

MULTIPLIERS = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4)}
SMALL = Original(image_size=16, multipliers=(1, 2), blocks=1, attention_pixels=(8,))
# Its last two levels attend, with 32 and 64 channels: 4 heads are 8 and 16 channels wide.
UNEVEN = Original(image_size=16, multipliers=(1, 2), blocks=1, attention_pixels=(16, 8))


FILE = "ema_0.9999_000120.pt"


def saved(folder, size: Original):
    """Save random weights as the published code does; return the network and the file."""
    network = original_unet(size)
    torch.save(network.state_dict(), folder / FILE)
    return network, folder / FILE


def imported(folder, size: Original, **options):
    """Save random weights and import them; return the network, what the import said, and the denoiser."""
    network, file = saved(folder, size)
    result = import_checkpoint(file, out=folder / "out", **options)
    return network, result, load_denoiser(folder / "out")


def largest_difference(network, denoiser) -> float:
    pixels = network.size.image_size
    x, t = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 99])
    with torch.inference_mode():
        # The network is shown a thousandth part of T = 4000.
        expected = network(x, t * 0.25)
        assert expected.std() > 0.1
        return float((denoiser(x, t) - expected).abs().max())


@pytest.mark.parametrize("learned_sigma", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("pixels", [32, 64])
def test_forward_passes_agree(tmp_path, pixels, scale_shift, learned_sigma):
    options = {"scale_shift": scale_shift, "learned_sigma": learned_sigma}
    size = Original(image_size=pixels, multipliers=MULTIPLIERS[pixels], **options)
    network, result, denoiser = imported(tmp_path, size)
    assert largest_difference(network, denoiser) < 1e-4
    assert result.parameters == sum(value.numel() for value in network.parameters())
    assert result.learned_range == learned_sigma
    assert result.attention_levels == {32: [1, 2], 64: [2, 3]}[pixels]
    assert isinstance(denoiser.unet, FixedHeadsUNet2DModel) == (pixels == 64)


def test_forward_passes_agree_at_full_width(tmp_path):
    network, result, denoiser = imported(tmp_path, Original(channels=128))
    assert 52e6 < result.parameters < 53e6
    assert largest_difference(network, denoiser) < 1e-4


@pytest.mark.parametrize("size", [SMALL, UNEVEN])
def test_residual_resampling(tmp_path, size):
    network, _, denoiser = imported(tmp_path, replace(size, resblock_updown=True))
    assert largest_difference(network, denoiser) < 1e-4


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_number_of_heads_is_the_one_that_was_said(tmp_path, heads):
    network, _, denoiser = imported(tmp_path, replace(UNEVEN, heads=heads), heads=heads)
    assert largest_difference(network, denoiser) < 1e-4
    import_checkpoint(tmp_path / FILE, out=tmp_path / "four")
    assert largest_difference(network, load_denoiser(tmp_path / "four")) > 1e-2


def test_plain_diffusers_opens_equal_heads_and_refuses_the_others(tmp_path, caplog):
    network, file = saved(tmp_path, SMALL)
    import_checkpoint(file, out=tmp_path / "plain")
    unet = UNet2DModel.from_pretrained(tmp_path / "plain").eval()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([40])
    with torch.inference_mode():
        assert torch.allclose(unet(x, t * 0.25).sample, network(x, t * 0.25), atol=1e-4)
    saved(tmp_path, UNEVEN)
    import_checkpoint(file, out=tmp_path / "own")
    assert json.loads((tmp_path / "own/config.json").read_text())["_class_name"] == "FixedHeadsUNet2DModel"
    for fast in (True, False):
        with pytest.raises(ValueError, match="FixedHeads"):
            UNet2DModel.from_pretrained(tmp_path / "own", low_cpu_mem_usage=fast)


def test_an_unknown_class_is_refused(tmp_path):
    imported(tmp_path, UNEVEN)
    change_json(tmp_path / "out/config.json", _class_name="SomeoneElsesModel")
    with pytest.raises(InputError, match="SomeoneElsesModel"):
        load_denoiser(tmp_path / "out")


def test_opening_the_folder_is_silent(tmp_path, caplog):
    from diffusers.utils import logging

    logging.enable_propagation()
    try:
        imported(tmp_path, UNEVEN)
    finally:
        logging.disable_propagation()
    assert caplog.text == ""


@pytest.mark.parametrize("size", [SMALL, UNEVEN])
def test_an_imported_denoiser_purifies(tmp_path, size):
    _, _, denoiser = imported(tmp_path, size, timesteps=1000, schedule="linear")
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    purified = purify_images(images, denoiser, num_inference_steps=2, ids=["a", "b"])
    assert purified.shape == images.shape
    assert torch.equal(purified[1:], purify_images(images[1:], denoiser, num_inference_steps=2, ids=["b"]))
    expected = linear_alphas_cumprod(1000, *linear_betas(1000))
    assert torch.allclose(denoiser.alphas_cumprod, expected)


def test_the_card(tmp_path):
    _, first, _ = imported(tmp_path, SMALL)
    card = read_card(tmp_path / "out")
    assert (card.t_max, card.t_star, card.num_inference_steps, card.sampler) == (4000, 100, 100, "ddpm")
    assert (card.timestep_scale, card.iterations, card.denoise_psnr, card.sparse_hashes) == (0.25, 120, None, [])
    assert card.settings["attention_heads"] == 4
    before = (tmp_path / "out/eclipse.json").stat().st_mtime_ns
    assert imported(tmp_path, SMALL)[1] == first
    assert (tmp_path / "out/eclipse.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="other options"):
        imported(tmp_path, SMALL, heads=2)


@pytest.mark.parametrize(
    ("name", "iterations"),
    [("ema_0.9999_250000.pt", 250_000), ("model010000.pt", 10_000), ("ema_0.9999.pt", 0), ("weights.pt", 0)],
)
def test_iterations_in_the_name(name, iterations):
    assert iterations_in(f"/some/2024/{name}") == iterations


def test_recommended_depth_has_the_noise_of_the_paper():
    assert recommended_depth(cosine_alphas_cumprod(4000)) == 100
    schedule = linear_alphas_cumprod(1000, *linear_betas(1000))
    depth = recommended_depth(schedule)
    assert noise_std(schedule, depth - 1) == pytest.approx(0.05, abs=0.004)
    assert recommended_depth(cosine_alphas_cumprod(25)) == 1


def without(state, endings):
    return {name: value for name, value in state.items() if not name.endswith(endings)}


def mistakes(state) -> dict[str, tuple[object, str]]:
    """Return, for each mistake, what the file holds and what the sentence must say."""
    qkv = "middle_block.1.qkv.weight"
    return {
        "wrapped": ({"state_dict": state}, "state_dict is no such tensor"),
        "a tensor": (state[qkv], "holds a Tensor"),
        "integers": ({**state, qkv: state[qkv].int()}, f"{qkv} is no such tensor"),
        "empty": ({}, "expected a dict"),
        "another network": ({"conv1.weight": state[qkv]}, "input_blocks.0.0.weight is missing"),
        "missing": (without(state, "qkv.bias"), r"lacks .*qkv\.bias"),
        "leftover": ({**state, "extra.weight": state[qkv]}, "unknown extra.weight"),
        "shape": ({**state, qkv: state[qkv][:-1]}, f"shape of {qkv}"),
        "classes": ({**state, "label_emb.weight": torch.zeros(10, 128)}, "class labels"),
        "pooling": (without(state, (".op.weight", ".op.bias", ".conv.weight", ".conv.bias")), "make no U-Net"),
        "grayscale": ({**state, "input_blocks.0.0.weight": torch.zeros(32, 1, 3, 3)}, "takes 1 channels"),
    }


@pytest.mark.parametrize("mistake", list(mistakes(dict.fromkeys(["middle_block.1.qkv.weight"], torch.zeros(3)))))
def test_what_cannot_be_imported(tmp_path, mistake):
    network, file = saved(tmp_path, SMALL)
    content, words = mistakes(network.state_dict())[mistake]
    torch.save(content, file)
    with pytest.raises(InputError, match=words) as caught:
        import_checkpoint(file, out=tmp_path / "out")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_and_missing_files(tmp_path):
    _, file = saved(tmp_path, SMALL)
    for damaged in (file.read_bytes()[:5000], b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            import_checkpoint(file, out=tmp_path / "out")
    with pytest.raises(InputError, match="No such file"):
        import_checkpoint(tmp_path / "none.pt", out=tmp_path / "out")


def test_impossible_options(tmp_path):
    _, file = saved(tmp_path, SMALL)
    for options, words in (
        ({"heads": 3}, "must divide"),
        ({"heads": 0}, "must divide"),
        ({"timesteps": 1}, "--timesteps 1"),
        ({"schedule": "sigmoid"}, "cosine or linear"),
        ({"out": file}, "local folder"),
        ({"out": "s3://bucket/denoiser"}, "local folder"),
        ({"out": tmp_path}, "holds other files"),
        ({"out": tmp_path / ("n" * 300)}, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            import_checkpoint(file, **{"out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_half_precision_is_widened(tmp_path):
    network, file = saved(tmp_path, SMALL)
    torch.save(network.half().state_dict(), file)
    import_checkpoint(file, out=tmp_path / "out")
    assert largest_difference(network.float(), load_denoiser(tmp_path / "out")) < 1e-4
