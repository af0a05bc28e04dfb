"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest
import torch

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import load_images
from tests.support import World, make_world


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
    folder = tmp_path_factory.mktemp("unlabelled")
    for index, image in enumerate(load_images(world.clean, DataConfig()).images):
        (folder / f"{index}.png").write_bytes(encode_image(image, "png"))
    return str(folder)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny networks are slower on several threads, by far if the cores are busy.

    Of a whole module, so that it comes before what the module fits once.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
