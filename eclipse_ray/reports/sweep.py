"""Files and pictures of a sweep: tidy rows, the best settings, defense against fidelity, and a heat map."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from matplotlib.axes import Axes

from eclipse_ray.reports.blocks import Chart, value_words
from eclipse_ray.reports.charts import Theme, draw
from eclipse_ray.results import SweepView, sweep_order
from eclipse_ray.storage.store import Store

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
"""Columns of results.parquet: one row per trial; accuracies, scores and sparse_percent in per cent, psnr in dB."""
OBJECTIVE, WORDS = "proxy_accuracy", "proxy accuracy, %"


def write_sweep(output: str, view: SweepView) -> None:
    """Write results.parquet, and once there is a result best.yaml, pareto.png and heatmap.png into `output`."""
    store = Store(output)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(view.rows, schema=TIDY), sink)
    store.write("results.parquet", sink.getvalue().to_pybytes())
    if not view.rows:
        return
    head = f"# eclipse-ray purify SRC DST --config best.yaml\n# The best of {view.summary}.\n"
    store.write("best.yaml", (head + yaml.safe_dump(view.best, sort_keys=False)).encode())
    store.write("pareto.png", pareto_chart(view).png)
    store.write("heatmap.png", heat_map(view).png)


def pareto_chart(view: SweepView) -> Chart:
    """Return defense against fidelity, a point a trial, coloured by t_star, the front joined."""
    rows = [row for row in view.rows if not row["stopped"]] or view.rows
    front = sorted((row["psnr"], row[OBJECTIVE]) for row in rows if row["pareto"])
    best = best_first(rows)[0]

    def paint(axes: Axes, theme: Theme) -> None:
        dots = axes.scatter(
            [row["psnr"] for row in rows],
            [row[OBJECTIVE] for row in rows],
            c=[row["t_star"] for row in rows],
            cmap="viridis",
            zorder=2,
        )
        axes.plot(*zip(*front, strict=True), color=theme.muted, linewidth=1, zorder=1, label="Pareto front")
        place = [best["psnr"]], [best[OBJECTIVE]]
        axes.scatter(*place, s=140, facecolors="none", edgecolors=theme.series[1], label="best")
        axes.set(xlabel="fidelity: PSNR of purified clean images, dB", ylabel=f"defense: {WORDS}")
        axes.legend()
        axes.figure.colorbar(dots, ax=axes, label="t_star")

    caption = f"{view.summary}: what purification leaves of clean images, and how well it defends."
    return draw("pareto", "Defense against fidelity of every trial; the table holds every number.", caption, paint)


def heat_map(view: SweepView) -> Chart:
    """Return the mean objective over the two axes with the most values, t_star first if it varies."""
    names = _two_axes(view)
    columns, lines = ([_sorted_values(view.rows, name) for name in names] + [[""]])[:2]
    means = [[_mean(view, dict(zip(names, (x, y), strict=False))) for x in columns] for y in lines]

    def paint(axes: Axes, theme: Theme) -> None:
        shown = axes.imshow(means, cmap="viridis", aspect="auto")
        axes.grid(visible=False)
        # Not quite white: that is the page, which turns dark, and the cells do not.
        box = {"facecolor": "black", "alpha": 0.35, "linewidth": 0, "pad": 1.5}
        for row, line in enumerate(means):
            for column, value in enumerate(line):
                text = "·" if value != value else f"{value:.1f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color="#fefefe", bbox=box)
        axes.set_xticks(range(len(columns)), [value_words(value) for value in columns])
        axes.set_yticks(range(len(lines)), [value_words(value) for value in lines])
        axes.set(xlabel=names[0], ylabel=names[1] if len(names) > 1 else "")
        axes.figure.colorbar(shown, ax=axes, label=f"mean {WORDS}")

    caption = f"Mean {WORDS}, by {' and '.join(names)}; other settings are averaged over."
    return draw("heatmap", f"Mean objective by {' and '.join(names)}.", caption, paint)


def best_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows by falling score, those that were stopped early after all others."""
    return sorted(rows, key=lambda row: sweep_order(row["stopped"], row["score"]))


def _two_axes(view: SweepView) -> list[str]:
    values = {name: len(_sorted_values(view.rows, name)) for name in view.axes or ["t_star"]}
    return sorted(values, key=lambda name: (name != "t_star", -values[name]))[:2]


def _sorted_values(rows: list[dict[str, Any]], name: str) -> list[Any]:
    values = {row[name] for row in rows}
    return sorted(values, key=lambda value: (value is None, isinstance(value, str), value))


def _mean(view: SweepView, place: dict[str, Any]) -> float:
    found = [row[OBJECTIVE] for row in view.rows if all(row[name] == value for name, value in place.items())]
    return statistics.fmean(found) if found else float("nan")
