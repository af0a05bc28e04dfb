"""Pictures of what purification does, since none of it can be seen by eye."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def image_grid(rows: Mapping[str, Pixels], columns: list[str], title: str) -> bytes:
    """Return a PNG with one labelled row for each entry (uint8 (N, H, W, 3)) and one column an image."""
    count = len(columns)
    figure = Figure(figsize=(1.1 * count + 1.5, 1.1 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    figure.suptitle(title, fontsize=11)
    for row, (name, images) in enumerate(rows.items()):
        for column in range(count):
            axis = axes[row][column]
            axis.imshow(images[column], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
            if row == 0:
                axis.set_title(columns[column], fontsize=8)
        axes[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return png(figure)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """Return a figure as PNG, `dpi` pixels an inch."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()
