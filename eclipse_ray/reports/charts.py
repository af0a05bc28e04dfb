"""How a chart is drawn: for a light page, for a dark page, and as a PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from eclipse_ray.reports.blocks import Chart

WIDE, NARROW = (7.2, 3.1), (4.4, 3.1)
"""Sizes in inches. A narrow chart is as wide as a phone, so that its letters are as large as the text."""
PNG_DPI = 160
AMPLIFY = 10
"""Changes of pixels are shown enlarged this many times."""

Pixels = NDArray[np.uint8]


class Theme(NamedTuple):
    """Colours of a page: ink, muted ink, grid, background, and the series in order; all are legible on it."""

    ink: str
    muted: str
    grid: str
    page: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#1f2328", "#59636e", "#d8dee4", "#ffffff", ("#0b5cad", "#b5470b", "#00715a", "#7a3b9a", "#59636e", "#a1124e")
)
DARK = Theme(
    "#e6e9ed", "#a3adb8", "#3a424c", "#14181d", ("#71b7ff", "#ff9e61", "#4fd1a5", "#d2a8ff", "#a3adb8", "#ff8fb3")
)
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))

Paint = Callable[[Axes], None]
"""Draws on axes in the colours of LIGHT."""
Values = Sequence[float] | NDArray[Any]


def draw(name: str, alt: str, caption: str, paint: Paint, size: tuple[float, float] = NARROW) -> Chart:
    """Return the chart that `paint` draws on the axes it is given.

    `alt` says what a reader should see in it; `name` names its files. The dark drawing is the light one with other
    colours, because the layout takes most of the time.
    """
    figure = _figure(paint, size)
    light = _save(figure, "svg")
    return Chart(name, alt, caption, light, _in_the_dark(light), _save(figure, "png"), wide=size == WIDE)


def _in_the_dark(drawing: bytes) -> bytes:
    pairs = zip([*LIGHT[:-1], *LIGHT.series], [*DARK[:-1], *DARK.series], strict=True)
    colours = {str(light).encode(): str(dark).encode() for light, dark in pairs}
    return re.sub(rb"#[0-9a-f]{6}", lambda match: colours.get(match[0], match[0]), drawing)


def lines(curves: Mapping[str, tuple[Values, Values]], **settings: Any) -> Paint:
    """Return what draws one line (x, y) per name; `settings` are of the axes."""

    def paint(axes: Axes) -> None:
        for index, (label, (x, y)) in enumerate(curves.items()):
            style = index % len(LIGHT.series)
            # Marks would hide a curve of many points.
            marker = MARKERS[style] if len(x) < 20 else ""
            colour, dashes = LIGHT.series[style], DASHES[style]
            axes.plot(x, y, color=colour, linestyle=dashes, marker=marker, label=legible(label))
        axes.set(**settings)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                axis.set_minor_formatter(NullFormatter())
        axes.legend(loc="best")

    return paint


def legible(label: str) -> str:
    """Return `label` in a form that a legend shows: matplotlib leaves out labels that start with an underscore."""
    return f"\u200b{label}" if label.startswith("_") else label


def _figure(paint: Paint, size: tuple[float, float]) -> Figure:
    settings = {
        "font.size": 10,
        # Labels may contain any text: a dollar sign does not begin a formula.
        "text.parse_math": False,
        "axes.edgecolor": LIGHT.muted,
        "axes.labelcolor": LIGHT.ink,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": LIGHT.grid,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "lines.markersize": 4,
        "text.color": LIGHT.ink,
        "xtick.color": LIGHT.muted,
        "ytick.color": LIGHT.muted,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        # The layout is computed while the settings hold, because labels are made when they are drawn.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def _save(figure: Figure, kind: str) -> bytes:
    # Letters stay text: smaller files, sharp at any size, in the reader's own sans-serif font.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "eclipse_ray", "font.family": ["sans-serif"]}
    with matplotlib.rc_context(settings):
        if kind == "png":
            return png(figure, PNG_DPI)
        stream = io.BytesIO()
        # No date, so that the same data give the same bytes.
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue().replace(b"'DejaVu Sans'", b"system-ui, 'DejaVu Sans'")


def amplified(images: Pixels, reference: Pixels) -> Pixels:
    """Return (images - reference) * AMPLIFY around mid-gray, uint8 of the same shape."""
    change = images.astype(np.int32) - reference.astype(np.int32)
    return np.clip(128 + AMPLIFY * change, 0, 255).astype(np.uint8)


def image_grid(rows: Mapping[str, Sequence[Pixels] | Pixels], columns: Sequence[str], title: str) -> bytes:
    """Return a PNG with one labelled row per entry (uint8 images (H, W, 3)) and one column per image."""
    figure = Figure(figsize=(1.1 * len(columns) + 1.5, 1.1 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    figure.suptitle(title, fontsize=11)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, head in zip(axes[0], columns, strict=True):
        axis.set_title(head, fontsize=8)
    return png(figure)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """Return a figure as PNG with `dpi` pixels per inch."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()
