"""Gray and JPEG training images, against Pillow itself."""

import io

import numpy as np
import torch
from PIL import Image

from eclipse_ray.config import DefenseConfig
from eclipse_ray.datasets.images import jpeg_roundtrip
from eclipse_ray.defenses import DEFENSES
from tests.defenses.support import generator, images, material


def every_colour():
    return torch.randint(0, 256, (6, 64, 64, 3), generator=generator(2), dtype=torch.uint8)


def test_gray_is_pillows_luma_on_three_channels():
    colours = every_colour()
    found = DEFENSES["iss-g"].transform(
        material(images=colours, labels=torch.zeros(6, dtype=torch.int64), ids=list("abcdef")), DefenseConfig()
    )
    expected = np.stack([np.asarray(Image.fromarray(image.numpy()).convert("L")) for image in colours])
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.from_numpy(expected)[..., None].expand_as(found))


def test_jpeg_is_stored_by_pillow_with_coarse_chroma():
    smooth = images(3, 32)
    found = jpeg_roundtrip(smooth.numpy(), 10)
    assert found.dtype == np.uint8
    assert found.shape == smooth.shape
    for before, after in zip(smooth.numpy(), found, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(before).save(buffer, "JPEG", quality=10, subsampling="4:2:0")
        assert np.array_equal(np.asarray(Image.open(buffer)), after)
        fine = io.BytesIO()
        Image.fromarray(before).save(fine, "JPEG", quality=10, subsampling="4:4:4")
        assert not np.array_equal(np.asarray(Image.open(fine)), after)


def test_iss_jpeg_uses_the_quality_that_is_set():
    source = material()
    rough = DEFENSES["iss-j"].transform(source, DefenseConfig())
    fine = DEFENSES["iss-j"].transform(source, DefenseConfig(iss_jpeg_quality=90))
    error = [(found.double() - source.images).abs().mean() for found in (rough, fine)]
    assert error[0] > 2 * error[1] > 0
    assert np.array_equal(rough.numpy(), jpeg_roundtrip(source.images.numpy(), 10))
