"""A procedurally drawn colour dataset of ten shapes, so that everything can be tried without a download.

Colours, gradients, textures, position, size, angle, light and noise vary at random within each class. Only the
shape identifies the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import canonical_table
from eclipse_ray.datasets.write import write_dataset

Array = NDArray[np.floating[Any]]

# Images per block. Random numbers are drawn for whole blocks, so that image i does not depend on the count.
_BLOCK = 250

# Contrast of the images. In full contrast a classifier learns the shapes before a poison within its published
# bound can mislead it. Muted colours make the shapes as hard to learn as objects in photographs.
CONTRAST = 0.4


def draw_synthetic(count: int, size: int = 32, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images uint8 (count, size, size, 3) and labels int64 (count), balanced over CLASSES.

    Image i depends only on `seed`, `size` and i.
    """
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for start in range(0, count, _BLOCK):
        stop = min(count, start + _BLOCK)
        block, block_labels = _draw_block(start // _BLOCK, size, seed)
        images[start:stop] = block[: stop - start]
        labels[start:stop] = block_labels[: stop - start]
    return images, labels


def write_synthetic(url: str, count: int, size: int = 32, seed: int = 0, first: int = 0) -> int:
    """Write images `first` to `first + count` as a new canonical dataset with ids like synthetic-000001.

    Datasets with disjoint ranges have no image in common. Returns the number of images; raises InputError if `url`
    already holds data.
    """
    images, labels = draw_synthetic(first + count, size, seed)

    def tables() -> Iterator[pa.Table]:
        for start in range(first, first + count, 1000):
            rows = range(start, min(start + 1000, first + count))
            yield canonical_table(
                [f"synthetic-{row:06d}" for row in rows],
                [encode_image(images[row], "png") for row in rows],
                labels[rows.start : rows.stop],
                classes=CLASSES,
            )

    return write_dataset(url, tables(), classes=CLASSES, source=f"synthetic seed {seed}")


def _draw_block(block: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    rng = np.random.Generator(np.random.Philox(key=[seed, block]))
    labels = rng.permutation(np.arange(_BLOCK, dtype=np.int64) % len(CLASSES))
    # Channels come before rows and columns until the end, which makes numpy several times faster.
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) * (2 / size) + (1 / size - 1)
    x, y = np.broadcast_to(xs, (_BLOCK, size, size)), np.broadcast_to(ys, (_BLOCK, size, size))

    scale = _uniform(rng, 0.42, 0.78)
    local_x, local_y = _place(rng, x, y, scale)
    distance = _distance(labels, local_x, local_y) * scale
    softness = 2 / size
    cover = np.clip(0.5 - distance / softness, 0, 1)[:, None]

    back, front = _colours(rng)
    background = back + _gradient(rng, x, y, 0.22) + _texture(rng, x, y, 0.09) + _clouds(rng, size, 0.10)
    background += _specks(rng, x, y, softness) * _uniform(rng, -0.35, 0.35)[:, None]
    foreground = front + _gradient(rng, x, y, 0.18) + _texture(rng, x, y, 0.10)
    shadow = _shadow(rng, labels, local_x, local_y, scale)
    image = background * (1 - shadow) * (1 - cover) + foreground * cover

    light = 1 + _gradient(rng, x, y, 0.15)[:, :1]
    noise = rng.standard_normal(image.shape, np.float32) * _uniform(rng, 0.01, 0.03)[:, None]
    pixels = np.clip(0.5 + CONTRAST * (image * light - 0.5) + noise, 0, 1)
    return np.rint(pixels * 255).astype(np.uint8).transpose(0, 2, 3, 1), labels


def _uniform(rng: np.random.Generator, low: float, high: float) -> Array:
    return (low + (high - low) * rng.random((_BLOCK, 1, 1), np.float32)).astype(np.float32)


def _place(rng: np.random.Generator, x: Array, y: Array, scale: Array) -> tuple[Array, Array]:
    # The plane is moved, turned and stretched, so that shapes can always be drawn upright around the origin.
    room = np.maximum(0.95 - scale, 0.05)
    x, y = x - _uniform(rng, -1, 1) * room, y - _uniform(rng, -1, 1) * room
    angle, stretch = _uniform(rng, 0, 2 * np.pi), _uniform(rng, 0.85, 1.18)
    cos, sin = np.cos(angle), np.sin(angle)
    across, down = (cos * x + sin * y) / (scale * stretch), (cos * y - sin * x) * stretch / scale
    return across.astype(np.float32), down.astype(np.float32)


def _colours(rng: np.random.Generator) -> tuple[Array, Array]:
    # Returns two colours with an RGB distance of at least 0.45, so that the shape is visible.
    back = rng.random((_BLOCK, 3, 1, 1), np.float32) * 0.8 + 0.1
    front = rng.random((_BLOCK, 3, 1, 1), np.float32) * 0.9 + 0.05
    offset = front - back
    gap = np.sqrt((offset**2).sum(1, keepdims=True))
    # Each channel moves away from its nearer end, where there is always room.
    away = np.where(back > 0.5, back - 0.45, back + 0.45)
    return back, np.where(gap < 0.45, away + 0.2 * offset, front).astype(np.float32)


def _gradient(rng: np.random.Generator, x: Array, y: Array, strength: float) -> Array:
    angle = _uniform(rng, 0, 2 * np.pi)
    ramp = np.cos(angle) * x + np.sin(angle) * y
    colour = (rng.random((_BLOCK, 3, 1, 1), np.float32) * 2 - 1) * strength
    return ramp[:, None] * colour


def _texture(rng: np.random.Generator, x: Array, y: Array, strength: float) -> Array:
    # About half of the images get waves, or waves multiplied by perpendicular waves.
    angle, frequency = _uniform(rng, 0, np.pi), _uniform(rng, 5, 16)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    wave = np.sin(along * frequency + _uniform(rng, 0, 6.3))
    checks = wave * np.sin(across * frequency + _uniform(rng, 0, 6.3))
    kind = _uniform(rng, 0, 1)
    pattern = np.where(kind < 0.25, wave, np.where(kind < 0.5, checks * 1.5, 0))
    colour = (rng.random((_BLOCK, 3, 1, 1), np.float32) * 1.5 - 0.5) * strength
    return pattern[:, None] * colour


def _clouds(rng: np.random.Generator, size: int, strength: float) -> Array:
    # Coarse random values are interpolated smoothly over the whole image.
    coarse = rng.standard_normal((_BLOCK, 3, 5, 5), np.float32) * strength
    position = np.linspace(0, 4, size, dtype=np.float32)
    low = np.minimum(position.astype(np.int64), 3)
    part = position - low
    part = part * part * (3 - 2 * part)
    weights = np.zeros((size, 5), np.float32)
    weights[np.arange(size), low] = 1 - part
    weights[np.arange(size), low + 1] = part
    rows = np.matmul(weights, coarse)
    return np.matmul(rows, weights.T)


def _specks(rng: np.random.Generator, x: Array, y: Array, softness: float) -> Array:
    # A few small blots, which belong to no class.
    blots = np.zeros((len(x), 1, *x.shape[1:]), np.float32)
    for _ in range(3):
        radius = _uniform(rng, 0.04, 0.14)
        across = np.hypot(x - _uniform(rng, -1, 1), y - _uniform(rng, -1, 1))
        np.maximum(blots, np.clip(0.5 - (across - radius) / softness, 0, 1)[:, None], out=blots)
    return blots


def _shadow(rng: np.random.Generator, labels: NDArray[np.int64], x: Array, y: Array, scale: Array) -> Array:
    depth, angle, strength = _uniform(rng, 0.05, 0.22), _uniform(rng, 0, 6.3), _uniform(rng, 0, 0.5)
    distance = _distance(labels, x - depth * np.cos(angle), y - depth * np.sin(angle)) * scale
    return (np.clip(0.5 - distance / 0.25, 0, 1) * strength)[:, None]


def _distance(labels: NDArray[np.int64], x: Array, y: Array) -> Array:
    # Signed distance, negative inside, from the outline of the shape of each image; the radius is about 0.8.
    distance = np.empty_like(x)
    for label, shape in enumerate(_SHAPES.values()):
        rows = labels == label
        distance[rows] = shape(x[rows], y[rows]).astype(np.float32)
    return distance


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _dots(x: Array, y: Array) -> Array:
    centres = ((0.0, 0.52), (-0.45, -0.26), (0.45, -0.26))
    distances = [np.hypot(x - across, y - down) for across, down in centres]
    return np.minimum.reduce(distances) - np.float32(0.31)


def _star(x: Array, y: Array) -> Array:
    # The five tips with their two sides are folded onto one edge of one tip.
    turn = np.arctan2(x, y)
    folded = np.abs(turn - np.round(turn / (0.4 * np.pi)) * (0.4 * np.pi))
    radius = np.hypot(x, y)
    tip, notch = 0.98, 0.40 * np.exp(0.2j * np.pi)
    edge = notch - tip
    normal = edge * -1j / abs(edge)
    along, aside = float(normal.real), float(normal.imag)
    return (radius * np.cos(folded) - tip) * along + radius * np.sin(folded) * aside


def _triangle(x: Array, y: Array) -> Array:
    sides = (y, -0.866 * x - 0.5 * y, 0.866 * x - 0.5 * y)
    return np.maximum.reduce(sides) - np.float32(0.46)


_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "bars": lambda x, y: np.maximum(np.abs(np.abs(np.abs(x) - 0.29) - 0.29) - 0.155, np.abs(y) - 0.75),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.85, 0.66 - np.hypot(x - 0.42, y)),
    "cross": lambda x, y: np.minimum(_box(x, y, 0.88, 0.25), _box(x, y, 0.25, 0.88)),
    "disc": lambda x, y: np.hypot(x, y) - 0.78,
    "dots": _dots,
    "frame": lambda x, y: np.abs(_box(x, y, 0.55, 0.55)) - 0.15,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.64) - 0.18,
    "square": lambda x, y: _box(x, y, 0.66, 0.66),
    "star": _star,
    "triangle": _triangle,
}
CLASSES = tuple(_SHAPES)
