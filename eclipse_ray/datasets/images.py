"""Decoding images to uint8 pixels and encoding them; the only module that uses Pillow."""

from __future__ import annotations

import io
import sys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from eclipse_ray.config import Alpha, Animated, DataConfig
from eclipse_ray.datasets import PARSER_ERRORS
from eclipse_ray.errors import ConfigError, InputError

Pixels = NDArray[np.uint8]

# The only formats that are decoded. Pillow has dozens more, some of which start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe")

# The exceptions that Pillow raises for damaged images.
_DAMAGE: tuple[type[Exception], ...] = (
    OSError,
    *PARSER_ERRORS,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# The opposite of the byte order at the end of a raw mode; N is the byte order of this machine.
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_ORIENTATION_TAG = 0x0112
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANES = 258, 262, 284
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\x00", ".tif"),
    (b"MM\x00*", ".tif"),
)
# Lowest, highest and default number of each encoding: zlib's level, libwebp's method, JPEG's quality. The defaults
# are the fastest that compress, because a higher level would take longer than denoising.
_ENCODINGS: dict[str, tuple[int, int, int | None]] = {
    "png": (0, 9, 1),
    "webp-lossless": (0, 6, 0),
    "jpeg": (1, 100, None),
}


class ImageError(ValueError):
    """One image cannot be decoded or encoded; the message gives the reason in one sentence."""


class LargeImageError(ImageError):
    """An image has more pixels than data.max_pixels."""


def decode_stored(data: bytes, policy: DataConfig) -> Pixels:
    """Return encoded `data` as RGB uint8 (H, W, 3) under the limits of `policy`. Raises ImageError."""
    return decode_image(data, policy.max_pixels, alpha=policy.alpha, animated=policy.animated)


def decode_required(where: str, data: bytes, policy: DataConfig) -> Pixels:
    """Return what decode_stored returns. Raises InputError that names `where` if the image cannot be decoded."""
    try:
        return decode_stored(data, policy)
    except ImageError as error:
        raise InputError(f"{where}: {error}; mend it or leave it out") from error


def decode_image(
    data: bytes, max_pixels: int, *, alpha: Alpha = "composite", animated: Animated = "first"
) -> Pixels:
    """Return the first frame of encoded `data` as RGB uint8 (H, W, 3), upright and composited on white.

    16-bit channels are scaled to 8 bits and rounded. Raises ImageError unless `data` is a complete image in one of
    FORMATS with at most `max_pixels` pixels, which is checked before decoding. Also raises ImageError if `alpha`
    or `animated` is "refuse" and the image is transparent or animated.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise LargeImageError(
                    f"the image has {width}x{height} pixels, more than data.max_pixels ({max_pixels}) permits"
                )
            if animated == "refuse" and _is_animated(image):
                raise ImageError("the image has several frames, which data.animated=refuse does not permit")
            return np.array(_upright(image, _to_rgb(_to_8_bits(image, data), alpha)), dtype=np.uint8)
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError(_explain(error)) from error


def encode_image(pixels: Pixels, encoding: str) -> bytes:
    """Return uint8 (H, W, 3) `pixels` as `png:L`, `webp-lossless:M` or `jpeg:Q`; equal pixels give equal bytes.

    Raises ConfigError for an unknown encoding and ImageError for a size that the encoding cannot hold.
    """
    name, number = _parse_encoding(encoding)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    try:
        if name == "png":
            image.save(buffer, "PNG", compress_level=number)
        elif name == "webp-lossless":
            image.save(buffer, "WEBP", lossless=True, quality=50, method=number, exact=True)
        else:
            # No chroma subsampling, because on small images it damages more than the quantisation does.
            image.save(buffer, "JPEG", quality=number, subsampling=0)
    except (OSError, ValueError) as error:
        height, width = pixels.shape[:2]
        raise ImageError(f"{width}x{height} pixels cannot be stored as {encoding}: {error}") from error
    return buffer.getvalue()


def jpeg_roundtrip(images: Pixels, quality: int) -> Pixels:
    """Return uint8 (N, H, W, 3) `images` after encoding each as JPEG of `quality` (1..100) and decoding it.

    Uses Pillow's default settings with 4:2:0 chroma, like image shortcut squeezing (arXiv 2301.13838).
    """
    result = np.empty_like(images)
    for index, pixels in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer, formats=("JPEG",)) as stored:
            result[index] = np.asarray(stored)
    return result


def resize_image(pixels: Pixels, side: int | None) -> Pixels:
    """Return the central square of uint8 (H, W, 3) `pixels` resized to (side, side, 3), unchanged for None.

    This is "resize the short side, crop the centre" in one antialiased bicubic pass. Small images are enlarged.
    """
    height, width = pixels.shape[:2]
    if side is None or (height, width) == (side, side):
        return pixels
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    image = Image.fromarray(pixels)
    square = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
    return np.array(square, dtype=np.uint8)


def centre_crop(pixels: Pixels, side: int) -> Pixels:
    """Return a copy of the centre of uint8 (H, W, 3) `pixels`, at most `side` pixels high and wide."""
    top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side].copy()


def check_encoding(encoding: str, allow_lossy: bool) -> str:
    """Return `encoding` with its number, such as png:1 for png.

    Raises ConfigError if it is unknown, or if it changes pixels and `allow_lossy` is false.
    """
    name, number = _parse_encoding(encoding)
    if name == "jpeg" and not allow_lossy:
        raise ConfigError(
            f"data.encoding jpeg:{number} changes pixels; add --allow-lossy to permit it, or use png"
        )
    return f"{name}:{number}"


def suffix_of(data: bytes) -> str | None:
    """Return the usual file suffix of encoded `data`, found by its first bytes, or None if they are unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), None)


def _is_animated(image: Image.Image) -> bool:
    # A JPEG of a camera may hold a second picture (MPO), a thumbnail or stereo view, which is no animation.
    return image.format in ("GIF", "PNG", "WEBP", "TIFF") and bool(getattr(image, "is_animated", False))


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    # Rotates `rgb` by the EXIF orientation of `image`. Pillow rotates a TIFF itself and deletes the tag.
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:
        return rgb  # Damaged EXIF is ignored, because the picture itself is intact.
    method = _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return rgb if method is None else rgb.transpose(method)


def _to_8_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Load `image` and return it with 16-bit channels scaled to 8 bits and rounded."""
    raw_mode = _raw_mode(image)
    _refuse_wide_planes(image)
    image.load()
    if image.mode.startswith("I;16"):
        if raw_mode == "I;12":
            raise ImageError("the image has 12-bit pixels; save it with 8 or 16 bits a channel")
        wide = np.asarray(image)
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0:
            wide = 65535 - wide  # White is zero, which Pillow ignores in images of 16 bits.
        return _narrow(wide[..., None] // 256, wide[..., None] % 256, "L", image.info.get("transparency"))
    if ";16" in raw_mode and raw_mode.partition(";")[0] in ("RGB", "RGBA", "RGBX", "CMYK"):
        # Pillow keeps only the high bytes. Decoded in the other byte order, it keeps the low bytes.
        low = _decode_as(data, raw_mode[:-1] + _OTHER_ORDER[raw_mode[-1]])
        return _narrow(np.asarray(image), np.asarray(low), image.mode, image.info.get("transparency"))
    if raw_mode == "LA;16B":
        four = np.asarray(_decode_as(data, "RGBA"))  # Gray high, gray low, alpha high, alpha low.
        return _narrow(four[..., 0::2], four[..., 1::2], "LA", None)
    return image


def _refuse_wide_planes(image: Image.Image) -> None:
    # Pillow silently reads the bytes of 16-bit planes as if they were 8-bit pixels.
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_TIFF_PLANES) == 2:
        bits = image.tag_v2.get(_TIFF_BITS, (1,))
        if max(bits if isinstance(bits, tuple) else (bits,)) > 8:
            raise ImageError("the image has 16-bit channels in separate planes; save it with interleaved channels")


def _raw_mode(image: Image.Image) -> str:
    # The raw mode says how the file stores a pixel. Pillow forgets it when it loads the pixels.
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    arguments = tiles[0].args if tiles else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _decode_as(data: bytes, raw_mode: str) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    assert isinstance(image, ImageFile.ImageFile)
    tiles = []
    for tile in image.tile:
        arguments = (raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode
        tiles.append(tile._replace(args=arguments))
    image.tile = tiles
    image.load()
    return image


def _narrow(high: NDArray[np.uint8], low: NDArray[np.uint8], mode: str, transparent: object) -> Image.Image:
    # Makes an 8-bit image of the high and low bytes (H, W, C) of 16-bit values, row by row to save memory.
    narrow = np.empty(high.shape, np.uint8)
    clear = np.zeros(high.shape[:2], np.bool_)
    for row in range(len(high)):
        wide = high[row].astype(np.uint32) * 256 + low[row]
        narrow[row] = (wide + 128) // 257
        if isinstance(transparent, int | tuple):
            clear[row] = (wide == np.array(transparent)).all(axis=-1)
    image = Image.frombytes(mode, (high.shape[1], high.shape[0]), narrow.tobytes())
    if clear.any():
        image = image.convert("RGBA")
        image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return image


def _to_rgb(image: Image.Image, alpha: Alpha) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(f"the image has 32-bit pixels (mode {image.mode}), which have no fixed range")
    if image.mode == "LAB":
        raise ImageError("the image is in the LAB colour space; save it as RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    see_through = image.convert("RGBA")
    if alpha == "refuse" and see_through.getchannel("A").getextrema() != (255, 255):
        raise ImageError("the image is transparent in places, which data.alpha=refuse does not permit")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, see_through).convert("RGB")


def _explain(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a known format (expected one of {', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"the image has more pixels than can be decoded safely: {error}"
    return f"the image is damaged: {error or type(error).__name__}"


def _parse_encoding(encoding: str) -> tuple[str, int]:
    name, colon, digits = encoding.partition(":")
    low, high, default = _ENCODINGS.get(name, (0, -1, None))
    if not colon and default is not None:
        return name, default
    if digits.isascii() and digits.isdigit() and low <= int(digits) <= high:
        return name, int(digits)
    raise ConfigError(
        f"data.encoding {encoding!r} is unknown; use png or png:L with L from 0 to 9, webp-lossless or "
        "webp-lossless:M with M from 0 to 6, or jpeg:Q with Q from 1 to 100"
    )
