"""Files and pictures of a sweep: tidy rows, the best settings, defense against fidelity, and a heat map."""

from __future__ import annotations

import statistics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from matplotlib.figure import Figure

from eclipse_ray.data.store import Store
from eclipse_ray.report.figures import png
from eclipse_ray.results import SweepView

TIDY = pa.schema(
    [
        ("t_star", pa.int64()),
        ("num_inference_steps", pa.int64()),
        ("sampler", pa.string()),
        ("mode", pa.string()),
        ("p", pa.float64()),
        ("sigma", pa.float64()),
        ("coarse_sigma", pa.float64()),
        ("coarse_grid", pa.int64()),
        ("preset", pa.string()),
        ("replication", pa.int64()),
        ("iterations", pa.int64()),
        ("sparse", pa.int64()),
        ("sparse_percent", pa.float64()),
        ("point", pa.string()),
        ("proxy_accuracy", pa.float64()),
        ("shortcut_score", pa.float64()),
        ("removed_accuracy", pa.float64()),
        ("clean_confidence", pa.float64()),
        ("psnr", pa.float64()),
        ("score", pa.float64()),
        ("pareto", pa.bool_()),
        ("stopped", pa.bool_()),
        ("epochs", pa.int64()),
        ("images", pa.int64()),
        ("scored_images", pa.int64()),
        ("seconds", pa.float64()),
        ("device", pa.string()),
        ("fingerprint", pa.string()),
    ]
)
"""Columns of results.parquet: one row a trial; accuracies, scores and sparse_percent in per cent, psnr in dB."""
WORDS = {"proxy_accuracy": "proxy accuracy, %", "shortcut_score": "shortcut score, points"}


def write_sweep(output: str, view: SweepView) -> None:
    """Write results.parquet, and once there is a result best.yaml, pareto.png and heatmap.png into `output`."""
    store = Store(output)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(view.rows, schema=TIDY), sink)
    store.write("results.parquet", sink.getvalue().to_pybytes())
    if not view.rows:
        return
    head = f"# eclipse-ray purify SRC DST --config best.yaml\n# The best by {view.objective} of {view.summary}.\n"
    store.write("best.yaml", (head + yaml.safe_dump(view.best, sort_keys=False)).encode())
    store.write("pareto.png", pareto_picture(view))
    store.write("heatmap.png", heat_map(view))


def pareto_picture(view: SweepView) -> bytes:
    """Return a PNG of defense against fidelity, a point a trial, coloured by t_star, the front joined."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    rows = [row for row in view.rows if not row["stopped"]] or view.rows
    fidelity, defense = [row["psnr"] for row in rows], [row[view.objective] for row in rows]
    dots = axis.scatter(fidelity, defense, c=[row["t_star"] for row in rows], cmap="viridis", zorder=2)
    front = sorted((row["psnr"], row[view.objective]) for row in rows if row["pareto"])
    axis.plot(
        [x for x, _ in front], [y for _, y in front], color="0.6", linewidth=1, zorder=1, label="Pareto front"
    )
    best = max(rows, key=lambda row: row["score"])
    axis.scatter(
        [best["psnr"]], [best[view.objective]], s=140, facecolors="none", edgecolors="crimson", label="best"
    )
    axis.set_xlabel("fidelity: PSNR of purified clean images, dB")
    axis.set_ylabel(f"defense: {WORDS[view.objective]}")
    axis.set_title(view.summary, fontsize=9)
    axis.legend(fontsize=8)
    figure.colorbar(dots, ax=axis, label="t_star")
    return png(figure)


def heat_map(view: SweepView) -> bytes:
    """Return a PNG of the mean objective over the two axes with the most values, t_star first if it varies."""
    names = _two_axes(view)
    columns, lines = ([_sorted_values(view.rows, name) for name in names] + [[""]])[:2]
    figure = Figure(figsize=(1.0 * len(columns) + 2.2, 0.6 * len(lines) + 1.6), layout="constrained")
    axis = figure.subplots()
    means = [[_mean(view, dict(zip(names, (x, y), strict=False))) for x in columns] for y in lines]
    shown = axis.imshow(means, cmap="viridis", aspect="auto")
    for row, line in enumerate(means):
        for column, value in enumerate(line):
            text = "·" if value != value else f"{value:.1f}"
            axis.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=9,
                color="white",
                bbox={"facecolor": "black", "alpha": 0.35, "linewidth": 0, "pad": 1.5},
            )
    axis.set_xticks(range(len(columns)), [_word(value) for value in columns])
    axis.set_yticks(range(len(lines)), [_word(value) for value in lines])
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1] if len(names) > 1 else "")
    figure.colorbar(shown, ax=axis, label=f"mean {WORDS[view.objective]}")
    return png(figure)


def _two_axes(view: SweepView) -> list[str]:
    values = {name: len(_sorted_values(view.rows, name)) for name in view.axes or ["t_star"]}
    return sorted(values, key=lambda name: (name != "t_star", -values[name]))[:2]


def _sorted_values(rows: list[dict[str, Any]], name: str) -> list[Any]:
    values = {row[name] for row in rows}
    return sorted(values, key=lambda value: (value is None, isinstance(value, str), value))


def _mean(view: SweepView, place: dict[str, Any]) -> float:
    found = [row[view.objective] for row in view.rows if all(row[name] == value for name, value in place.items())]
    return statistics.fmean(found) if found else float("nan")


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
