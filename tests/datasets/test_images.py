import io
import struct
import zlib

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

LIMIT = 40_000_000
PIXELS = arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)))


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
@given(one=PIXELS, other=PIXELS)
def test_hashes_are_equal_only_for_equal_pixels(one, other):
    assert len(content_hash(one)) == 32
    assert (content_hash(one) == content_hash(other)) == (one.shape == other.shape and bool((one == other).all()))


def test_hash_sees_the_shape():
    assert content_hash(np.zeros((2, 8, 3), np.uint8)) != content_hash(np.zeros((4, 4, 3), np.uint8))


def test_jpeg_keeps_a_smooth_image_close():
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (32, 32, 3))
    decoded = decode_image(encode_image(ramp, "jpeg:95"), LIMIT)
    assert np.abs(decoded.astype(int) - ramp).max() <= 6


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


def test_sixteen_bits_are_scaled():
    wide = np.array([[0, 257, 32896, 65535]], np.uint16)
    decoded = decode_image(saved(Image.fromarray(wide), "PNG"), LIMIT)
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decoded.shape == (1, 4, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(mode):
    image = Image.new(mode, (2, 1), (0,) * (len(mode) - 1) + (0,))
    image.putpixel((1, 0), (0,) * (len(mode) - 1) + (255,))
    decoded = decode_image(saved(image, "PNG"), LIMIT)
    assert decoded.tolist() == [[[255, 255, 255], [0, 0, 0]]]


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode_image(saved(image, "PNG", transparency=0), LIMIT)
    assert decoded.tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(("mode", "format"), [("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("CMYK", "TIFF")])
def test_other_modes_become_rgb(mode, format):
    decoded = decode_image(saved(Image.new(mode, (5, 3)), format), LIMIT)
    assert decoded.shape == (3, 5, 3)
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert decode_image(data, LIMIT)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(pixels), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(data, LIMIT), expected)


def test_size_is_checked_before_pixels_are_decoded():
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ImageError, match="more pixels"):
        decode_image(data + b"\0\0\0\0IDAT\x35\xaf\x06\x1e", LIMIT)
    with pytest.raises(ImageError, match=r"5x4 pixels, more than data\.max_pixels"):
        decode_image(saved(Image.new("RGB", (5, 4)), "PNG"), 19)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
        (saved(Image.new("F", (2, 2)), "TIFF"), "32-bit"),
    ],
)
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data, LIMIT)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_images_are_refused_never_filled(format):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = saved(Image.fromarray(noise), format)
    with pytest.raises(ImageError, match=r"damaged|known format"):
        decode_image(data[: len(data) // 2], LIMIT)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300, deadline=None)
@given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=8),
)
def test_damage_is_an_image_error_or_an_image(format, flips):
    whole = saved(Image.new("RGB", (9, 7), "teal"), format)
    assert decode_image(whole, 10_000).shape == (7, 9, 3)
    data = bytearray(whole)
    for place, mask in flips:
        data[place % len(data)] ^= mask
    try:
        decoded = decode_image(bytes(data), 10_000)
    except ImageError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3
    assert decoded.shape[2] == 3
    assert decoded.shape[0] * decoded.shape[1] <= 10_000


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        ("PNG", ".png"),
        ("JPEG", ".jpg"),
        ("WEBP", ".webp"),
        ("BMP", ".bmp"),
        ("GIF", ".gif"),
        ("TIFF", ".tif"),
    ],
)
def test_suffix_by_content(format, suffix):
    assert suffix_of(saved(Image.new("RGB", (2, 2)), format)) == suffix
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
