"""Adapters: the same pixels as the engine, in the shapes that other libraries expect."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from eclipse_ray import load_denoiser, purify_images
from eclipse_ray.adapters import Compensate, PurifiedImages
from eclipse_ray.config import CompensationConfig, load_config
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.errors import InputError
from tests.reports.material import purify_here

pytestmark = pytest.mark.usefixtures("one_thread")


def photographs(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_art_gets_what_the_engine_gives_in_its_own_range_and_layout(world):
    art = pytest.importorskip("eclipse_ray.adapters.art")
    from art.defences.preprocessor.preprocessor import Preprocessor

    images = photographs()
    ids = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    expected = purify_images(images, load_denoiser(world.denoiser), ids=ids, seed=3).numpy()
    defence = art.EclipsePreprocessor(world.denoiser, seed=3, batch_size=2)
    assert isinstance(defence, Preprocessor)
    assert (defence.apply_fit, defence.apply_predict) == (True, False)
    labels = np.arange(5)
    purified, same = defence((images / 255).astype(np.float32), labels)
    assert same is labels
    assert purified.dtype == np.float32
    # Another batch size may move a pixel by one level.
    assert np.abs(np.rint(purified * 255) - expected).max() <= 1
    first = art.EclipsePreprocessor(world.denoiser, seed=3, clip_values=(0, 255), channels_first=True)
    moved, _ = first(np.moveaxis(images, -1, 1).astype(np.float64))
    assert moved.shape == (5, 3, 16, 16)
    assert np.abs(np.moveaxis(moved, 1, -1) - expected).max() <= 1


def test_art_refuses_a_range_that_is_none(world):
    art = pytest.importorskip("eclipse_ray.adapters.art")
    with pytest.raises(ValueError, match="clip_values"):
        art.EclipsePreprocessor(world.denoiser, clip_values=(1, 1))


def test_adapters_need_neither_art_nor_torchvision():
    program = (
        "import sys, eclipse_ray.adapters; print([n for n in ('art', 'torchvision', 'ray') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_compensation_as_a_transform_draws_anew_and_is_seeded_by_torch():
    image = torch.rand(3, 16, 16)
    transform = Compensate(CompensationConfig(p=1.0, sigma=0.0, coarse_sigma=0.0))
    gray = transform(image)
    assert torch.equal(gray[0], gray[1])
    noisy = Compensate()
    torch.manual_seed(1)
    first, second = noisy(image), noisy(image)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(noisy(image), first)
    with pytest.raises(ValueError, match="float"):
        noisy(torch.zeros(3, 16, 16, dtype=torch.uint8))


def test_a_plain_dataset_is_given_as_it_is_and_a_purified_one_compensated(world, tmp_path):
    plain = PurifiedImages(world.clean)
    pixels = load_images(world.clean, load_config().data)
    image, label = plain[3]
    assert torch.equal((image * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(pixels.images[3]))
    assert label == int(pixels.labels[3])
    assert plain.compensate is None
    output = str(tmp_path / "out")
    gray = {"compensation.p": 1.0, "compensation.sigma": 0.0}
    purify_here(world.poisoned, output, world.denoiser, **gray)
    image, label = PurifiedImages(output)[0]
    stored = load_images(output, load_config().data)
    assert label == int(stored.labels[0])
    assert torch.equal(image[0], image[2])
    assert not np.array_equal(stored.images[0][..., 0], stored.images[0][..., 2])


def test_recorded_settings_that_cannot_be_read_end_in_one_sentence(world, tmp_path):
    purify_here(world.poisoned, str(tmp_path), world.denoiser)
    settings = tmp_path / "_eclipse/config.yaml"
    for text in ("{{{", "hello", "compensation: hello", "compensation: {mode: foo}"):
        settings.write_text(text)
        with pytest.raises(InputError, match=r"config\.yaml: not settings of this version"):
            PurifiedImages(str(tmp_path))
    settings.write_text("compensation: {mode: baked, of_another_version: 3}")
    assert PurifiedImages(str(tmp_path)).compensate is None
    settings.unlink()
    with pytest.raises(InputError, match=r"config\.yaml: missing; run the command of purify again"):
        PurifiedImages(str(tmp_path))


def test_a_transform_of_another_mode_than_augment_changes_nothing(world):
    image = torch.rand(3, 16, 16)
    for mode in ("none", "baked"):
        assert torch.equal(Compensate(CompensationConfig(mode=mode))(image), image)
    assert Compensate()(image.half()).dtype == torch.float16


def test_batches_and_a_transform_of_ones_own(world):
    flipped = PurifiedImages(world.clean, transform=lambda image: image.flip(-1))
    plain = PurifiedImages(world.clean)
    assert torch.equal(flipped[0][0], plain[0][0].flip(-1))
    images, labels = next(iter(DataLoader(plain, batch_size=4)))
    assert images.shape == (4, 3, 16, 16)
    assert labels.dtype == torch.int64
