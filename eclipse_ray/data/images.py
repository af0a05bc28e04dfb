"""Encoded images to uint8 pixels and back; the only module that knows Pillow."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from eclipse_ray.errors import ConfigError

Pixels = NDArray[np.uint8]

# Pillow knows dozens of formats; some of them start other programs. Nothing else is ever tried.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# What Pillow's parsers raise on damaged bytes; there is no common base class short of Exception.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_ORIENTATION_TAG = 0x0112
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
# Measured: within 0.2 % of level 9 in size, on 32 px and on large photographs, at two thirds of its time on
# large ones; below level 4 large ones grow by 7 %.
_PNG_LEVEL = 4


class ImageError(ValueError):
    """One image cannot be decoded or encoded; the message says why in one sentence."""


def decode_image(data: bytes, max_pixels: int) -> Pixels:
    """Return the upright first frame of encoded `data` as RGB uint8 (H, W, 3), alpha laid on white.

    16-bit gray is scaled to 8 bits. Raises ImageError for anything that is not a whole image in one of
    FORMATS with at most `max_pixels` pixels; the size is checked before pixels are decoded.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"the image has {width}x{height} pixels, more than data.max_pixels ({max_pixels}) permits"
                )
            image.load()
            return np.array(_to_rgb(_upright(image)), dtype=np.uint8)
    except ImageError:
        raise
    except _DAMAGE as error:
        raise ImageError(_explain(error)) from error


def encode_image(pixels: Pixels, encoding: str) -> bytes:
    """Return uint8 (H, W, 3) `pixels` as `png`, `webp-lossless` or `jpeg:Q`, the same bytes every time.

    Raises ConfigError for an unknown encoding and ImageError for a size that the encoding cannot hold.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    try:
        if encoding == "png":
            image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
        elif encoding == "webp-lossless":
            image.save(buffer, "WEBP", lossless=True, quality=50, method=2, exact=True)
        else:
            # Without chroma subsampling: on small images it costs more than the coefficients do.
            image.save(buffer, "JPEG", quality=_jpeg_quality(encoding), subsampling=0)
    except (OSError, ValueError) as error:
        height, width = pixels.shape[:2]
        raise ImageError(f"{width}x{height} pixels cannot be stored as {encoding}: {error}") from error
    return buffer.getvalue()


def resize_image(pixels: Pixels, side: int | None) -> Pixels:
    """Return the central square of uint8 (H, W, 3) `pixels` resized to (side, side, 3); None leaves them alone.

    The usual "resize the short side, crop the centre", in one antialiased bicubic pass; it enlarges too.
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
    """Return the middle of uint8 (H, W, 3) `pixels`, at most `side` pixels a side, as a copy."""
    top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side].copy()


def check_encoding(encoding: str, allow_lossy: bool) -> None:
    """Raise ConfigError unless `encoding` is known and, if it changes pixels, permitted."""
    if encoding in ("png", "webp-lossless"):
        return
    quality = _jpeg_quality(encoding)
    if not allow_lossy:
        raise ConfigError(
            f"data.encoding jpeg:{quality} changes pixels; add --allow-lossy to permit it, or use png"
        )


def content_hash(pixels: Pixels) -> str:
    """Return 32 hex digits of SHA-256 over the shape and the uint8 pixels, whatever their encoding was."""
    shape = "x".join(str(side) for side in pixels.shape)
    return hashlib.sha256(f"{shape}:".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:32]


def suffix_of(data: bytes) -> str | None:
    """Return the usual file suffix for encoded `data` by its first bytes, None if they are unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), None)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:
        return image  # A damaged note about the camera is no reason to lose the picture.
    method = _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"the image has 32-bit pixels (mode {image.mode}), which have no fixed range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _explain(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a known format (expected one of {', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"the image has more pixels than can be decoded safely: {error}"
    return f"the image is damaged: {error or type(error).__name__}"


def _jpeg_quality(encoding: str) -> int:
    name, _, digits = encoding.partition(":")
    if name == "jpeg" and digits.isascii() and digits.isdigit() and 1 <= int(digits) <= 100:
        return int(digits)
    raise ConfigError(
        f"data.encoding {encoding!r} is unknown; use png, webp-lossless or jpeg:Q with Q from 1 to 100"
    )
