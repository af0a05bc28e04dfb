"""Synthetic training sets."""

import numpy as np


def coloured(count, seed, size=16, classes=3):
    """Noise images whose class is the brighter channel."""
    draws = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = draws.integers(0, 128, (count, size, size, 3))
    images[np.arange(count), :, :, labels] += 100
    return images.astype(np.uint8), labels


def striped(count, seed):
    """Four classes of gratings in clutter, told apart by direction."""
    draws = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    rows, columns = np.mgrid[:32, :32]
    angles = labels[:, None, None] * np.pi / 4
    phase = draws.uniform(0, 2 * np.pi, count)[:, None, None]
    waves = 14 * np.sin(0.6 * (np.cos(angles) * rows + np.sin(angles) * columns) + phase)
    clutter = draws.normal(0, 18, (count, 8, 8)).repeat(4, axis=1).repeat(4, axis=2)
    images = (128 + waves + clutter)[..., None].repeat(3, axis=3)
    return images.clip(0, 255).round().astype(np.uint8), labels


def numbered(values, size=8):
    """Images of one gray level each, by which they are known again."""
    levels = np.asarray(values, dtype=np.uint8)
    return np.broadcast_to(levels[..., None, None, None], (*levels.shape, size, size, 3)).copy()
