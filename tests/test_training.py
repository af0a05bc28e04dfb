"""Ray Train: the folder it leaves, several workers, resume by fingerprint."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from eclipse_ray import verbs
from eclipse_ray.config import load_config
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.diffusion.checkpoint import load_denoiser, read_card
from eclipse_ray.diffusion.training import run_fit, split_heldout, start_fit
from eclipse_ray.errors import ConfigError, InputError, ResumeError
from eclipse_ray.parameters import resolve
from eclipse_ray.training import deciding_settings
from tests.support import DEBUG, kill_when

SHORT = {**DEBUG, "denoiser.iterations": 20, "denoiser.checkpoint_every": 10, "denoiser.num_workers": 2}


def train(world, output, **settings):
    return verbs.train(clean=world.clean, out=str(output), settings={**SHORT, **settings})


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "denoiser"
    return output, train(world, output)


def test_the_folder_is_a_denoiser(world, trained):
    output, result = trained
    assert result.iterations == 20
    assert result.denoise_psnr > 0
    UNet2DModel.from_pretrained(output)
    card = read_card(output)
    assert sorted(card.sparse_hashes) == sorted(load_images(world.clean, resolve(None, None, {}).data).hashes())
    assert [point["iteration"] for point in card.history] == [10, 20]
    assert load_denoiser(output).t_max == 5


def test_running_again_returns_at_once(world, trained):
    output, first = trained
    before = (output / "eclipse.json").stat().st_mtime_ns
    assert train(world, output) == first
    assert (output / "eclipse.json").stat().st_mtime_ns == before


def test_a_denoiser_of_a_timestep_sampler_that_is_gone_still_opens(world, tmp_path):
    shutil.copytree(world.denoiser, tmp_path / "old")
    card = json.loads((tmp_path / "old/eclipse.json").read_text())
    card["settings"]["timestep_sampler"] = "loss_second_moment"
    (tmp_path / "old/eclipse.json").write_text(json.dumps(card))
    assert load_denoiser(tmp_path / "old").t_star == load_denoiser(world.denoiser).t_star


def test_a_training_begun_when_there_were_two_timestep_samplers_is_the_same_run():
    assert deciding_settings(load_config(None, DEBUG).denoiser)["timestep_sampler"] == "uniform"


def test_other_settings_are_refused_with_the_difference(world, trained):
    with pytest.raises(ResumeError, match=r"denoiser\.learning_rate: 0\.001 -> 0\.01"):
        train(world, trained[0], **{"denoiser.learning_rate": 0.01})


def test_two_workers_train_the_network_of_one_process(world, trained):
    config = load_config(None, SHORT)
    images = torch.from_numpy(load_images(world.clean, config.data).images)
    part, heldout = split_heldout(len(images), config.denoiser.heldout_fraction, config.run.seed)
    fit = start_fit(config.denoiser, config.run.seed, torch.device("cpu"))
    run_fit(fit, images[part], images[heldout], config.run.seed, lambda _: None, lambda _: None)
    assert trained[1].denoise_psnr == pytest.approx(fit.history[-1]["denoise_psnr"], abs=0.01)


@pytest.mark.chaos
def test_a_killed_training_continues(world, trained, tmp_path):
    output = tmp_path / "killed"
    arguments = ["train", "--clean", world.clean, "--out", str(output)]
    settings = {**SHORT, "denoiser.iterations": 90, "denoiser.checkpoint_every": 30}
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]

    def checkpointed() -> bool:
        return any(output.glob("_eclipse/train/*/checkpoint_*"))

    kill_when(arguments, checkpointed, tmp_path / "killed.log")
    result = verbs.train(clean=world.clean, out=str(output), settings=settings)
    assert result.iterations == 90
    card = read_card(output)
    iterations = [point["iteration"] for point in card.history]
    assert iterations == sorted(set(iterations))
    assert iterations[-1] == 90


@pytest.mark.chaos
def test_images_of_several_sizes_are_trained_on_by_crops(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "src").mkdir()
    for index, (height, width) in enumerate([(16, 16), (40, 17), (25, 60), (18, 18)]):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (tmp_path / f"src/{index}.png").write_bytes(encode_image(image, "png"))
    settings = {**SHORT, "denoiser.iterations": 4, "denoiser.num_workers": 2}
    result = verbs.train(clean=str(tmp_path / "src"), out=str(tmp_path / "out"), settings=settings)
    assert result.iterations == 4
    assert read_card(tmp_path / "out").sparse_images == 4


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"denoiser.image_size": 32}, InputError, "is 16x16 pixels, the denoiser trains on 32x32"),
        ({"denoiser.num_workers": 17}, ConfigError, "num_workers 17 exceeds batch_size 16"),
        ({"denoiser.num_workers": 500, "denoiser.batch_size": 500}, ConfigError, "needs 500 CPUs"),
    ],
)
def test_what_cannot_be_trained_is_refused(world, tmp_path, settings, error, words):
    with pytest.raises(error, match=words):
        train(world, tmp_path / "bad", **settings)


@pytest.mark.chaos
def test_curves_go_to_the_loggers_asked_for(world, tmp_path):
    output = tmp_path / "logged"
    train(world, output, **{"denoiser.num_workers": 1, "run.loggers": ["tensorboard"]})
    (events,) = output.glob("_eclipse/tensorboard/*/events.*")
    assert b"denoise_psnr" in events.read_bytes()


def test_gpus_that_are_not_there_are_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="needs 1 GPUs, the Ray cluster has 0"):
        train(world, tmp_path / "out", **{"denoiser.use_gpu": True, "denoiser.num_workers": 1})
