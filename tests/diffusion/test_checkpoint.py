"""The denoiser folder: what diffusers and we read back, and what is refused."""

import json
import os
import pickle

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from eclipse_ray.diffusion import network
from eclipse_ray.diffusion.checkpoint import (
    CARD_FILE,
    SCHEDULER_FILE,
    WEIGHTS_FILE,
    Card,
    load_denoiser,
    read_card,
    save_denoiser,
    weights_digest,
)
from eclipse_ray.diffusion.process import cosine_alphas_cumprod
from eclipse_ray.diffusion.shuffled import open_shuffled
from eclipse_ray.errors import ConfigError, InputError
from tests.support import change_json, untrained_denoiser


@pytest.fixture(params=[("shuffled", [8]), ("unet2d", [8, 8])], ids=["shuffled", "unet2d"])
def folder(request, tmp_path):
    kind, channels = request.param
    card = Card(
        t_max=5,
        t_star=4,
        num_inference_steps=1,
        iterations=1,
        denoise_psnr=30.0,
        noisy_psnr=20.0,
        sparse_images=2,
        sparse_hashes=["00" * 16],
        fingerprint="f",
        settings={},
    )
    save_denoiser(tmp_path, untrained_denoiser(network=kind, block_out_channels=channels), card)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "written"),
    [
        (CARD_FILE, {"sampler": "dpm"}),
        (CARD_FILE, {"sampler": "ddim", "settings": {"timestep_sampler": "loss_second_moment"}}),
        # Up to ENGINE_VERSION 3 the default network was a class of diffusers' kind, which wrote its version too.
        ("config.json", {"_diffusers_version": "0.35.1"}),
    ],
)
def test_a_folder_that_an_earlier_version_wrote_still_opens(folder, file, written):
    change_json(folder / file, **written)
    assert load_denoiser(folder).sampler == ("ddim" if "sampler" in written else "ddpm")


def test_round_trip(folder):
    denoiser = load_denoiser(folder)
    x, t = torch.rand(2, 3, 16, 16), torch.tensor([1, 4])
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    plain = (UNet2DModel.from_pretrained(folder) if name == "UNet2DModel" else open_shuffled(folder)).eval()
    with torch.inference_mode():
        assert torch.allclose(denoiser(x, t), plain(x, t).sample, atol=1e-4)  # layouts sum in another order
    assert (denoiser.t_max, denoiser.t_star, denoiser.num_inference_steps) == (5, 4, 1)
    assert read_card(folder).sparse_hashes == ["00" * 16]


def test_a_denoiser_opens_in_the_precision_that_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(network, "_capabilities", lambda: {"avx512_vnni": True, "avx512_bf16": True})
    assert load_denoiser(folder).precision == "float32"
    assert load_denoiser(folder, precision=None).precision == "bfloat16"
    for precision in ("float32", "bfloat16"):
        assert load_denoiser(folder, precision=precision).precision == precision
    if load_denoiser(folder).int8:
        assert load_denoiser(folder, precision="int8").precision == "int8"
    else:
        with pytest.raises(ConfigError, match="network shuffled"):
            load_denoiser(folder, precision="int8")
    with pytest.raises(ConfigError, match=r"purify\.precision fp16: expected one of float32, bfloat16, int8"):
        load_denoiser(folder, precision="fp16")


def test_diffusers_reads_our_schedule(folder):
    scheduler = DDPMScheduler.from_pretrained(folder)
    assert torch.allclose(scheduler.alphas_cumprod, cosine_alphas_cumprod(20).float(), atol=1e-6)


def test_the_digest_follows_the_weights_not_the_card(folder):
    before = weights_digest(folder)
    change_json(folder / CARD_FILE, iterations=2)
    assert weights_digest(folder) == before
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)
    assert weights_digest(folder) != before


@pytest.mark.parametrize("file", [CARD_FILE, WEIGHTS_FILE, SCHEDULER_FILE, "config.json"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(InputError) as caught:
        load_denoiser(folder)
    assert str(folder) in str(caught.value)
    assert f"{file} is missing" in str(caught.value)
    assert "\n" not in str(caught.value)
    (folder / file).mkdir()
    with pytest.raises(InputError, match=f"{file} is unreadable"):
        load_denoiser(folder)


def without_a_tensor(folder):
    weights = load_file(folder / WEIGHTS_FILE)
    del weights["conv_out.bias"]
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


TAPS = [{"label": 0, "taps": [[1.0, 0.0], [0.0]], "images": ["00"]}]
DAMAGE = {
    "truncated weights": (lambda folder: os.truncate(folder / WEIGHTS_FILE, 500), "cannot be read"),
    "a missing tensor": (without_a_tensor, r"conv_out\.bias"),
    "ragged taps of a filter": (lambda folder: change_json(folder / CARD_FILE, filters=TAPS), "cannot be read"),
    "another schedule": (lambda folder: change_json(folder / SCHEDULER_FILE, beta_schedule="sigmoid"), "cosine"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(folder, damage):
    harm, words = DAMAGE[damage]
    harm(folder)
    with pytest.raises(InputError, match=words):
        load_denoiser(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    settings = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", block_out_channels=[8 * each for each in settings["block_out_channels"]])
    with pytest.raises(InputError, match=r"conv_in|blocks|cannot be read") as caught:
        load_denoiser(folder)
    assert "\n" not in str(caught.value)
    if settings["_class_name"] == "ShuffledNetwork":
        assert "conv_in.weight is [8, 12, 3, 3], by config.json [64, 12, 3, 3]" in str(caught.value)


def test_weights_of_half_the_precision_are_opened_in_float32(folder):
    weights = {name: value.half() for name, value in load_file(folder / WEIGHTS_FILE).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    assert {parameter.dtype for parameter in load_denoiser(folder).parameters()} == {torch.float32}


def test_pickled_weights_are_never_loaded(folder):
    canary = folder / "canary"

    class Exploit:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    (folder / WEIGHTS_FILE).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(InputError):
        load_denoiser(folder)
    assert not canary.exists()
