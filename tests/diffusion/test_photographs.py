"""Real photographs at native resolution: a denoiser fitted on their crops cleans others, without seams."""

import numpy as np
import pytest
import torch

from eclipse_ray.config import load_config
from eclipse_ray.datasets.images import decode_image
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.sampling import purify, purify_images, to_model_range
from eclipse_ray.diffusion.tiling import plan_axis
from eclipse_ray.diffusion.training import centre_crops, image_buffer, run_fit, start_fit
from eclipse_ray.quality import psnr
from tests.support import UNET

T_STAR, SIDE = 200, 320
SETTINGS = {
    "denoiser.preset": "debug",
    "denoiser.image_size": 24,
    "denoiser.num_train_timesteps": 4000,
    "denoiser.t_star": T_STAR,
    "denoiser.t_max": 250,
    "denoiser.iterations": 250,
    "denoiser.learning_rate": 6e-3,
    "denoiser.report_every": 250,
    "denoiser.checkpoint_every": 250,
    "denoiser.ema_decay": 0.98,
}
NETWORKS = {
    "unet2d": {f"denoiser.{key}": value for key, value in UNET.items()},
    "shuffled": {"denoiser.block_out_channels": [16], "denoiser.iterations": 500},
}
IDS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def photographs(shared_data):
    files = sorted((shared_data / "imagenet-samples").glob("*/*.JPEG"))
    if len(files) < 40:
        pytest.skip("no photographs in imagenet-samples")
    return [decode_image(file.read_bytes(), 10**8) for file in files[:40]]


@pytest.fixture(scope="module")
def purified_ones(photographs):
    """Four photographs that the denoiser never saw, uint8 (4, 320, 320, 3)."""
    large = [image for image in photographs if min(image.shape[:2]) >= SIDE][: len(IDS)]
    return torch.from_numpy(np.stack([image[:SIDE, :SIDE] for image in large]))


@pytest.fixture(scope="module", params=["unet2d", "shuffled"])
def denoiser(photographs, request):
    """Fitted on random crops of photographs of many sizes, those of `purified_ones` left out."""
    large = [index for index, image in enumerate(photographs) if min(image.shape[:2]) >= SIDE][: len(IDS)]
    images = [image for index, image in enumerate(photographs) if index not in large]
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    train = image_buffer(pixels, torch.tensor([image.shape[:2] for image in images]))
    config = load_config(None, {**SETTINGS, **NETWORKS[request.param]}).denoiser
    fit = start_fit(config, 0, torch.device("cpu"))
    heldout = centre_crops(train.select(torch.arange(4)), config.image_size)
    run_fit(fit, train, heldout, 0, lambda _: None, lambda _: None)
    return fit.averaged()


def residual(denoiser, images, tile, overlap):
    clean = to_model_range(images)
    return purify(clean, denoiser, T_STAR, 1, 0, IDS, tile=tile, tile_overlap=overlap) - clean


def seam_contrast(denoiser, images, tile, overlap):
    """How much larger steps of the residual are across tile borders than elsewhere, relative to no tiles at all.

    Dividing by the untiled residual at the same places takes out what the pictures themselves show there.
    """
    axis = plan_axis(SIDE, tile, overlap, denoiser.size_multiple)
    ends = {start + axis.length for start in axis.starts}
    border = torch.zeros(SIDE - 1, dtype=torch.bool)
    border[[edge - 1 for edge in {*axis.starts, *ends} if 0 < edge < SIDE]] = True
    at_border, elsewhere = [], []
    for image in (residual(denoiser, images, tile, overlap), residual(denoiser, images, SIDE, 0)):
        steps = [image.diff(dim=2).abs().mean(dim=(0, 1, 3)), image.diff(dim=3).abs().mean(dim=(0, 1, 2))]
        at_border.append(sum(float(step[border].mean()) for step in steps))
        elsewhere.append(sum(float(step[~border].mean()) for step in steps))
    return (at_border[0] / at_border[1]) / (elsewhere[0] / elsewhere[1])


def test_purified_photographs_gain_3_db_over_the_noised_ones(denoiser, purified_ones):
    clean = to_model_range(purified_ones)
    abar = float(denoiser.alphas_cumprod[T_STAR - 1])
    noised = (clean + ((1 - abar) / abar) ** 0.5 * noise(0, IDS, T_STAR, (3, SIDE, SIDE))).clamp(-1, 1)
    result = purify_images(purified_ones, denoiser, ids=IDS)
    assert psnr(to_model_range(result), clean) > psnr(noised, clean) + 3


@pytest.mark.parametrize(("tile", "overlap"), [(128, 32), (64, 16)])
def test_there_is_no_seam_between_tiles(denoiser, purified_ones, tile, overlap):
    assert 0.99 < seam_contrast(denoiser, purified_ones, tile, overlap) < 1.01


def test_without_overlap_there_would_be_one(denoiser, purified_ones):
    assert seam_contrast(denoiser, purified_ones, 64, 0) > 1.05
