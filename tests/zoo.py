"""Unusual images, each with its expected outcome; docs/formats.md has one row per name."""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
WIDE = np.random.default_rng(1).integers(0, 65536, (9, 7, 4), np.uint16)
_BITS, _PHOTOMETRIC, _STRIPS, _SAMPLES, _COUNTS, _PLANES = 258, 262, 273, 277, 279, 284


@dataclass(frozen=True)
class Specimen:
    """Encoded bytes, and either the expected RGB pixels or a part of the expected error message."""

    data: bytes
    pixels: np.ndarray | None = None
    reason: str = ""


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    """Return `image` as Pillow encodes it."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, colour: int, data: bytes, extra: bytes = b"", interlaced: bool = False
) -> bytes:
    """Return a PNG of already compressed `data`, which need not match the header."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    chunks = chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def wide_png(values: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    """Return uint16 (H, W, C) `values` as a 16-bit PNG."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, colour, zlib.compress(rows), extra)


def tiff(values: np.ndarray, order: str = "<", planes: bool = False, bits: int = 16, white: int = 1) -> bytes:
    """Return uint16 (H, W, C) `values` as an uncompressed TIFF, channels interleaved or in separate planes.

    For one channel, `white` is the photometric interpretation: 1 for "black is zero", 0 for "white is zero".
    """
    height, width, channels = values.shape
    ordered = np.moveaxis(values, -1, 0) if planes else values
    body = ordered.astype(f"{order}u2").tobytes()
    strips = channels if planes else 1
    size = len(body) // strips
    tags = [
        (256, [width]),
        (257, [height]),
        (_BITS, [bits] * channels),
        (259, [1]),
        (_PHOTOMETRIC, [2 if channels > 1 else white]),
        (_STRIPS, [8 + n * size for n in range(strips)]),
        (_SAMPLES, [channels]),
        (278, [height]),
        (_COUNTS, [size] * strips),
        (_PLANES, [2 if planes else 1]),
    ]
    directory = 8 + len(body)
    spill_at = directory + 2 + 12 * len(tags) + 4
    entries, spill = b"", b""
    for tag, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            value = struct.pack(f"{order}I", spill_at + len(spill))
            spill += packed
        else:
            value = packed.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + value
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", directory)
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + spill


def _white_is_zero_8() -> bytes:
    whole = saved(Image.new("L", (4, 4), 55), "TIFF")
    entry = struct.pack("<HHIHH", _PHOTOMETRIC, 3, 1, 1, 0)
    assert whole.count(entry) == 1
    return whole.replace(entry, struct.pack("<HHIHH", _PHOTOMETRIC, 3, 1, 0, 0))


def scaled(values: np.ndarray) -> np.ndarray:
    """Return uint16 `values` scaled to 8 bits, rounded."""
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def flat(colour: Sequence[int], width: int = 4, height: int = 4) -> np.ndarray:
    """Return uint8 (height, width, 3) of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def compressed_zeros(count: int) -> bytes:
    """Return `count` zero bytes, deflated in pieces, so that making a bomb needs little memory."""
    deflate = zlib.compressobj(1)
    pieces = [deflate.compress(bytes(min(2**20, count - start))) for start in range(0, count, 2**20)]
    return b"".join([*pieces, deflate.flush()])


def _turned(format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0}
    return saved(Image.fromarray(NOISE), format, exif=exif, **(options if format != "TIFF" else {}))


def _turned_pixels(format: str) -> np.ndarray:
    # The expected image is the unrotated one, rotated by hand by 90 degrees clockwise.
    with Image.open(io.BytesIO(_turned(format))) as image:
        if format == "TIFF":  # Pillow itself turns these.
            return np.rot90(NOISE, -1)
        return np.rot90(np.asarray(image), -1)


def _frames(format: str, **options: object) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return saved(frames[0], format, save_all=True, append_images=frames[1:], **options)


def _with_alpha(mode: str, format: str, **options: object) -> bytes:
    # The left half is transparent, the right half opaque black.
    image = Image.new(mode, (4, 4), (0,) * (len(mode) - 1) + (0,))
    image.paste((0,) * (len(mode) - 1) + (255,), (2, 0, 4, 4))
    return saved(image, format, **options)


def _clear_palette(format: str) -> bytes:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(1, (2, 0, 4, 4))
    return saved(image, format, transparency=0)


def _half_white(colour: Sequence[int]) -> np.ndarray:
    pixels = flat(WHITE)
    pixels[:, 2:] = colour
    return pixels


def _cmyk() -> Image.Image:
    return Image.merge("CMYK", [Image.new("L", (8, 8), value) for value in (0, 255, 255, 0)])


def _patched(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = saved(Image.new("RGB", (8, 8)), "JPEG")
    return _patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def _webp_claiming(side: int) -> bytes:
    data = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
    return _patched(data, data.index(b"VP8L") + 9, struct.pack("<I", (side - 1) | (side - 1) << 14))


def _gif_claiming(side: int) -> bytes:
    return _patched(saved(Image.new("P", (8, 8)), "GIF"), 6, struct.pack("<HH", side, side))


@cache
def specimens() -> dict[str, Specimen]:
    """Return every specimen by its name in docs/formats.md."""
    rgb = Image.fromarray(NOISE)
    gray = np.repeat(np.asarray(rgb.convert("L"))[..., None], 3, axis=2)
    noise_png, noise_jpeg = saved(rgb, "PNG"), saved(rgb, "JPEG", quality=90)
    opaque = WIDE.copy()
    opaque[..., 3] = 65535
    return {
        "RGB PNG": Specimen(noise_png, NOISE),
        "gray PNG": Specimen(saved(rgb.convert("L"), "PNG"), gray),
        "1-bit PNG": Specimen(saved(Image.new("1", (4, 4), 1), "PNG"), flat(WHITE)),
        "palette PNG": Specimen(
            saved(Image.new("RGB", (4, 4), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
            flat((9, 8, 7)),
        ),
        "palette with a transparent entry, PNG": Specimen(_clear_palette("PNG"), _half_white((40, 50, 60))),
        "palette with a transparent entry, GIF": Specimen(_clear_palette("GIF"), _half_white((40, 50, 60))),
        "RGBA PNG": Specimen(_with_alpha("RGBA", "PNG"), _half_white((0, 0, 0))),
        "gray with alpha PNG": Specimen(_with_alpha("LA", "PNG"), _half_white((0, 0, 0))),
        "RGBA WebP": Specimen(_with_alpha("RGBA", "WEBP", lossless=True), _half_white((0, 0, 0))),
        "16-bit gray PNG": Specimen(wide_png(WIDE[..., :1], 0), np.repeat(scaled(WIDE[..., :1]), 3, axis=2)),
        "16-bit RGB PNG": Specimen(wide_png(WIDE[..., :3], 2), scaled(WIDE[..., :3])),
        "16-bit RGBA PNG": Specimen(wide_png(opaque, 6), scaled(WIDE[..., :3])),
        "16-bit gray with alpha PNG": Specimen(
            wide_png(opaque[..., 2:], 4), np.repeat(scaled(WIDE[..., 2:3]), 3, axis=2)
        ),
        "16-bit gray TIFF": Specimen(tiff(WIDE[..., :1]), np.repeat(scaled(WIDE[..., :1]), 3, axis=2)),
        "16-bit RGB TIFF": Specimen(tiff(WIDE[..., :3]), scaled(WIDE[..., :3])),
        "16-bit RGB TIFF, big-endian": Specimen(tiff(WIDE[..., :3], ">"), scaled(WIDE[..., :3])),
        "16-bit TIFF in separate planes": Specimen(tiff(WIDE[..., :3], planes=True), reason="separate planes"),
        "16-bit gray TIFF, white is zero": Specimen(
            tiff(WIDE[..., :1], white=0), 255 - np.repeat(scaled(WIDE[..., :1]), 3, axis=2)
        ),
        "16-bit gray TIFF, white is zero, big-endian": Specimen(
            tiff(WIDE[..., :1], ">", white=0), reason="known format"
        ),
        "8-bit gray TIFF, white is zero": Specimen(_white_is_zero_8(), np.full((4, 4, 3), 200, np.uint8)),
        "12-bit TIFF": Specimen(tiff(WIDE[:, :, :1], bits=12), reason="12-bit"),
        "32-bit TIFF": Specimen(saved(Image.new("F", (4, 4)), "TIFF"), reason="32-bit"),
        "LAB TIFF": Specimen(saved(Image.new("LAB", (4, 4)), "TIFF"), reason="LAB"),
        "CMYK JPEG": Specimen(saved(_cmyk(), "JPEG", quality=100), flat((255, 0, 0), 8, 8)),
        "CMYK TIFF": Specimen(saved(_cmyk(), "TIFF"), flat((255, 0, 0), 8, 8)),
        "turned by EXIF, JPEG": Specimen(_turned("JPEG"), _turned_pixels("JPEG")),
        "turned by EXIF, WebP": Specimen(_turned("WEBP"), _turned_pixels("WEBP")),
        "turned by EXIF, TIFF": Specimen(_turned("TIFF"), _turned_pixels("TIFF")),
        "animated GIF": Specimen(_frames("GIF", duration=100), flat((255, 0, 0))),
        "animated PNG": Specimen(_frames("PNG", duration=100), flat((255, 0, 0))),
        "animated PNG with a picture of its own": Specimen(_frames("PNG", default_image=True), flat((255, 0, 0))),
        "animated WebP": Specimen(_frames("WEBP", lossless=True, duration=100), flat((255, 0, 0))),
        "TIFF of several pages": Specimen(_frames("TIFF"), flat((255, 0, 0))),
        "JPEG with a second picture (MPO)": Specimen(
            saved(rgb, "MPO", save_all=True, append_images=[rgb], quality=90),
            np.asarray(Image.open(io.BytesIO(noise_jpeg))),
        ),
        "1 x 1": Specimen(saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), flat((1, 2, 3), 1, 1)),
        "65535 x 1": Specimen(saved(Image.new("RGB", (65535, 1)), "PNG"), flat((0, 0, 0), 65535, 1)),
        "1 x 65535": Specimen(saved(Image.new("RGB", (1, 65535)), "PNG"), flat((0, 0, 0), 1, 65535)),
        "empty": Specimen(b"", reason="empty"),
        "a web page": Specimen(b"<!doctype html><html><body>404</body></html>", reason="known format"),
        "PostScript": Specimen(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", reason="known format"),
        "SVG": Specimen(b'<svg xmlns="http://www.w3.org/2000/svg"/>', reason="known format"),
        "truncated JPEG": Specimen(noise_jpeg[: len(noise_jpeg) // 2], reason="damaged"),
        "truncated PNG": Specimen(noise_png[: len(noise_png) // 2], reason="damaged"),
        **bombs(),
    }


def bombs() -> dict[str, Specimen]:
    """Return small files with far more pixels than data.max_pixels permits."""
    many = r"more than data\.max_pixels|can be decoded safely"
    return {
        "13,500 x 13,500 PNG": Specimen(png(13500, 13500, 1, 0, compressed_zeros(13500 * 1689)), reason=many),
        "9,400 x 9,400 PNG": Specimen(png(9400, 9400, 8, 2, compressed_zeros(9400 * 28201)), reason=many),
        "JPEG that claims 65,500 x 65,500": Specimen(_jpeg_claiming(65500, 65500), reason=many),
        "WebP that claims 16,383 x 16,383": Specimen(_webp_claiming(16383), reason=many),
        "GIF that claims 65,535 x 65,535": Specimen(_gif_claiming(65535), reason=many),
        "PNG with 64 MB of text": Specimen(
            png(1, 1, 8, 2, zlib.compress(bytes(4)), chunk(b"zTXt", b"a\0\0" + compressed_zeros(2**26))),
            reason="damaged",
        ),
    }
