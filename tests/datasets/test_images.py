import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from eclipse_ray.config import content_hash
from eclipse_ray.datasets.images import (
    ImageError,
    centre_crop,
    check_encoding,
    decode_image,
    encode_image,
    resize_image,
    suffix_of,
)
from eclipse_ray.errors import ConfigError
from tests.zoo import saved

LIMIT = 40_000_000
PIXELS = arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)))


@settings(max_examples=60)
@given(pixels=PIXELS, encoding=st.sampled_from(["png", "png:0", "png:9", "webp-lossless", "webp-lossless:6"]))
def test_lossless_encodings_return_the_same_pixels(pixels, encoding):
    encoded = encode_image(pixels, encoding)
    assert encoded == encode_image(pixels, encoding)
    assert np.array_equal(decode_image(encoded, LIMIT), pixels)


def test_the_number_of_an_encoding_changes_bytes_and_no_pixel():
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, axis=2)
    for name, numbers in (("png", (1, 9)), ("webp-lossless", (0, 6))):
        fast, small = (encode_image(ramp, f"{name}:{number}") for number in numbers)
        assert encode_image(ramp, name) == fast
        assert len(small) < len(fast)
        assert np.array_equal(decode_image(small, LIMIT), decode_image(fast, LIMIT))


@settings(max_examples=60)
@given(one=PIXELS, other=PIXELS)
def test_hashes_are_equal_only_for_equal_pixels(one, other):
    assert len(content_hash(one)) == 32
    assert (content_hash(one) == content_hash(other)) == (one.shape == other.shape and bool((one == other).all()))


def test_hash_sees_the_shape():
    assert content_hash(np.zeros((2, 8, 3), np.uint8)) != content_hash(np.zeros((4, 4, 3), np.uint8))


def test_jpeg_keeps_a_smooth_image_close():
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (32, 32, 3))
    gray = saved(Image.fromarray(ramp[..., 0]), "JPEG", quality=95)
    for data in (encode_image(ramp, "jpeg:95"), gray):
        assert np.abs(decode_image(data, LIMIT).astype(int) - ramp).max() <= 6


@pytest.mark.parametrize(
    "encoding",
    ["jpeg", "jpeg:0", "jpeg:101", "jpeg:x", "avif", "", "PNG", "jpeg:-5", "png:10", "png:", "webp-lossless:7"],
)
def test_unknown_encodings_are_refused(encoding):
    with pytest.raises(ConfigError, match="webp-lossless"):
        check_encoding(encoding, True)


def test_lossy_needs_permission():
    assert check_encoding("png", False) == "png:1"
    assert check_encoding("webp-lossless", False) == "webp-lossless:0"
    assert check_encoding("png:6", False) == "png:6"
    assert check_encoding("jpeg:90", True) == "jpeg:90"
    with pytest.raises(ConfigError, match="allow-lossy"):
        check_encoding("jpeg:90", False)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(pixels), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(data, LIMIT), expected)


def test_the_limit_of_pixels_is_named():
    with pytest.raises(ImageError, match=r"5x4 pixels, more than data\.max_pixels"):
        decode_image(saved(Image.new("RGB", (5, 4)), "PNG"), 19)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_suffix_by_content(suffix):
    format = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix)
    assert suffix_of(saved(Image.new("RGB", (2, 2)), format)) == f".{suffix}"
    assert suffix_of(b"?") is None


def test_too_long_for_webp_is_an_image_error():
    with pytest.raises(ImageError, match="webp-lossless"):
        encode_image(np.zeros((1, 20_000, 3), np.uint8), "webp-lossless")


def test_resizing_takes_the_central_square():
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = (200, 100, 50)
    small = resize_image(pixels, 20)
    whole = np.array(Image.fromarray(pixels).resize((50, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(small, whole[:, 15:35])
    assert (small[:, 2:-2] == (200, 100, 50)).all()
    assert resize_image(pixels, None) is pixels
    assert resize_image(small, 20) is small
    assert resize_image(small, 33).shape == (33, 33, 3)


def test_resizing_averages_what_it_cannot_show():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[::2] = 255
    small = resize_image(pixels, 16).astype(int)
    assert np.abs(small[2:-2] - 127).max() <= 4


def test_centre_crop_is_the_middle():
    pixels = np.arange(5 * 9 * 3, dtype=np.uint8).reshape(5, 9, 3)
    assert np.array_equal(centre_crop(pixels, 3), pixels[1:4, 3:6])
    assert np.array_equal(centre_crop(pixels, 7), pixels[:, 1:8])
