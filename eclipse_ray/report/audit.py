"""The picture of an audit, and the folder it lies in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eclipse_ray.data.store import Store
from eclipse_ray.detection import features
from eclipse_ray.detection.features import Images
from eclipse_ray.detection.verdict import class_means
from eclipse_ray.report.figures import png
from eclipse_ray.results import AuditResult, to_json

SHOWN = 10
"""Most classes whose mean is shown."""


def write_audit(output: str, settings: str, result: AuditResult, sample: Images, clean: Images | None) -> None:
    """Leave config.yaml, audit.png and, last, audit.json in the folder `output`, in place of earlier ones."""
    store = Store(output)
    store.write("config.yaml", settings.encode())
    store.write("audit.png", audit_picture(result, sample, clean))
    store.write("audit.json", json.dumps(to_json(result), indent=1).encode())


def audit_picture(result: AuditResult, sample: Images, clean: Images | None) -> bytes:
    """Return a PNG: what class means lose in the mirror, p-values, and the residual's energy by frequency."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    title = f"{result.verdict}, p = {result.p_value:.2g}"
    if result.frequency:
        title += f", {result.frequency} frequency, {result.scope}-wise"
    figure.suptitle(title, fontsize=12)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 2))
    top, bottom = parts
    _draw_means(top, sample)
    left, right = bottom.subplots(1, 2)
    _draw_p_values(left, result.evidence)
    _draw_bands(right, sample, clean)
    return png(figure, dpi=110)


def _draw_means(figure: Any, sample: Images) -> None:
    assert sample.labels is not None
    found, labels = torch.unique(sample.labels, return_inverse=True)
    means = class_means(sample, labels, torch.ones_like(labels, dtype=torch.bool))[:SHOWN]
    # One gain for all, so that a class that is poisoned more looks it.
    gain = 100 / max(1.0, float(means.abs().max()))
    figure.suptitle(f"odd part of class means, times {gain:.1f}", fontsize=9)
    axes = figure.subplots(1, len(means), squeeze=False)[0]
    for axis, mean, label in zip(axes, means, found.tolist(), strict=False):
        pixels = (128 + gain * mean).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(f"class {label}", fontsize=8)
        axis.set_axis_off()


def _draw_p_values(axis: Axes, evidence: Sequence[dict[str, Any]]) -> None:
    names = [score["name"] for score in evidence]
    heights = [-math.log10(score["p_value"]) for score in evidence]
    colours = ["tab:red" if score["counted"] else "tab:gray" for score in evidence]
    axis.barh(names[::-1], heights[::-1], color=colours[::-1])
    axis.set_xlabel("-log10 p, each score alone (gray: not counted)")


def _draw_bands(axis: Axes, sample: Images, clean: Images | None) -> None:
    assert sample.labels is not None
    rows = features.rows_of(sample, features.bands)
    middles = (np.arange(features.BANDS) + 0.5) / (2 * features.BANDS)
    for label in torch.unique(sample.labels)[:SHOWN].tolist():
        axis.plot(middles, rows[sample.labels == label].mean(0).numpy(), color="tab:red", alpha=0.4, linewidth=1)
    axis.plot([], [], color="tab:red", label="classes of the dataset")
    if clean is not None:
        theirs = features.rows_of(clean, features.bands).mean(0).numpy()
        axis.plot(middles, theirs, color="black", linewidth=2, label="clean set")
    axis.set_xlabel("radial frequency, cycles a pixel")
    axis.set_ylabel("log energy of the residual, mean over images")
    axis.legend(fontsize=8)
