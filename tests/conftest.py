"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.memory import load_images
from tests.datasets.helpers import fill
from tests.support import World, make_world

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images: ECLIPSE_RAY_DATA, else ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ECLIPSE_RAY_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set ECLIPSE_RAY_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Poisoned, clean and test sets of 16 px images and a debug denoiser, below one folder."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def unlabelled(world, tmp_path_factory) -> str:
    """Folder of the images of `world.clean` without their labels."""
    images = load_images(world.clean, DataConfig()).images
    keys = [f"{index}.png" for index in range(len(images))]
    return fill(tmp_path_factory.mktemp("unlabelled"), *keys, images=images)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny networks are slower on several threads, by far if the cores are busy.

    Of a whole module, so that it comes before what the module fits once.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
