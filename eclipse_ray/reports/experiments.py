"""What victims say: one dataset judged, the three sets of the demo, a matrix, and the trials of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import yaml
from matplotlib.axes import Axes

from eclipse_ray.config import flatten
from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout
from eclipse_ray.log import counted
from eclipse_ray.reports.blocks import Block, Chart, Charts, Code, Section, Table, Text, value_words
from eclipse_ray.reports.charts import LIGHT, MARKERS, WIDE, draw, legible, lines
from eclipse_ray.reports.folder import BEST, read_mapping
from eclipse_ray.reports.tables import CLEAN, RESULTS, Cells, read_table, read_view, tables_of
from eclipse_ray.results import DEMO_FILE, EVALUATION_FILE, SweepView, sweep_order
from eclipse_ray.storage.store import Store

TITLE = "Test accuracy"
DEFENSES_OF_A_CHART = len(MARKERS)
"""A chart shows at most this many defenses."""

Result = Mapping[str, Any]


def evaluation(store: Store) -> Section:
    """Return the section on one judged dataset."""
    result = read_mapping(store, EVALUATION_FILE)
    lead = f"A victim trained on {result['train']} reaches {_result(result)} on {result['test']}."
    rows = [[f"victim {index + 1}", f"{value:.2f}"] for index, value in enumerate(result["accuracies"])]
    blocks: list[Block] = [Text(lead), Table("Test accuracy of each victim, %", ["", "last epoch"], rows)]
    blocks += victims({"victims": result["curves"]})
    return Section("accuracy", TITLE, blocks, [lead])


def demo(store: Store) -> Section:
    """Return the section on the three victims of the demo."""
    if not store.exists(DEMO_FILE):
        text = "The accuracies of this demo were not recorded; run the demo on this folder again."
        return Section("accuracy", TITLE, [Text(text, note=True)])
    note = read_mapping(store, DEMO_FILE)
    found: dict[str, Result] = note["victims"]
    clean, poisoned, purified = (float(note[name]) for name in ("clean", "poisoned", "purified"))
    recovered = (
        f": {100 * (purified - poisoned) / (clean - poisoned):.0f} % of the gap" if clean > poisoned else ""
    )
    lead = (
        f"A victim trained on clean images reaches {clean:.1f} % test accuracy, on poisoned ones {poisoned:.1f} "
        f"%, on purified ones {purified:.1f} %{recovered}."
    )
    rows = [[name, _result(result)] for name, result in found.items()]
    table = Table("Test accuracy after the last epoch", ["trained on", "test accuracy"], rows, numeric=False)
    curves = victims({name: result["curves"] for name, result in found.items()})
    return Section("accuracy", TITLE, [table, *curves], [lead])


def matrix(store: Store) -> Section:
    """Return the section with all tables of a matrix."""
    view = read_view(store)
    measured = [cells for victim in view.victims if (cells := Cells(view, victim)).rows]
    charts = [_dots(cells, place) for place, cells in enumerate(measured, 1)]
    best = _best(measured[0]) if measured else "No cell is measured yet."
    return Section("accuracy", TITLE, [Charts(charts), *tables_of(view)], [best])


def _best(cells: Cells) -> str:
    """Return a sentence on the best defense of a victim, on average over all poisons."""
    rows, victim = cells.view.rows, cells.victim.label
    poisons = [name for name in _unique(rows, "poison") if name != CLEAN]
    means: dict[str, float] = {}
    for defense in _unique(rows, "defense"):
        found = [cells.values(defense, poison) for poison in poisons]
        if found and all(found):
            means[defense] = statistics.fmean(map(statistics.fmean, found))
    if not means:
        return f"{len(rows):,} victims are trained; no defense has met every poison yet."
    best = max(means, key=lambda name: means[name])
    if best == "none":
        return f"{len(rows):,} victims are trained; on average no defense beats none ({means[best]:.1f} %)."
    none = f"; without a defense it reaches {means['none']:.1f} %" if "none" in means else ""
    return (
        f"{len(rows):,} victims are trained. Averaged over {len(poisons)} poisons, victim {victim} does best "
        f"under the defense “{best}”, with {means[best]:.1f} % test accuracy{none}."
    )


def _dots(cells: Cells, place: int) -> Chart:
    rows, victim = cells.view.rows, cells.victim.label
    defenses, poisons = _drawn(_unique(rows, "defense")), _unique(rows, "poison")

    def paint(axes: Axes) -> None:
        for index, name in enumerate(defenses):
            shift = (index - (len(defenses) - 1) / 2) * 0.13
            accuracies = [cells.values(name, poison) for poison in poisons]
            found = {across + shift: values for across, values in enumerate(accuracies) if values}
            axes.errorbar(
                [*found],
                [statistics.fmean(values) for values in found.values()],
                [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found.values()],
                fmt=MARKERS[index],
                color=LIGHT.series[index],
                capsize=2,
                label=legible(name),
            )
        axes.set(ylabel="test accuracy, %", ylim=(0, 100), xlim=(-0.5, len(poisons) - 0.5))
        axes.set_xticks(range(len(poisons)), poisons)
        axes.grid(visible=False, axis="x")
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    left_out = len(_unique(rows, "defense")) > len(defenses)
    some = f", {DEFENSES_OF_A_CHART} of the defenses" if left_out else ""
    caption = f"Victim {victim}: mean and standard deviation over seeds{some}."
    alt = f"Test accuracy of victim {victim} by poison and defense; the tables below hold every number."
    return draw(f"accuracy-{place}", alt, caption, paint, WIDE)


def _drawn(defenses: Sequence[str]) -> list[str]:
    """Return at most DEFENSES_OF_A_CHART names in their order; rivals are left out before "none" and our own."""
    ranked = sorted(defenses, key=lambda name: name != "none" and not name.startswith("eclipse"))
    return [name for name in defenses if name in ranked[:DEFENSES_OF_A_CHART]]


def _unique(rows: Sequence[Result], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _result(result: Result) -> str:
    return (
        f"{result['test_accuracy']:.2f} ± {result['test_accuracy_std']:.2f} % (n = {result['seeds']}, "
        f"{result['victim']}, {result['epochs']} epochs)"
    )


def victims(curves: Mapping[str, Sequence[Sequence[float]]]) -> list[Block]:
    """Return a chart of test accuracy by epoch, one line per name, the mean over its victims.

    `curves` has a list per victim. There is none if every victim has one epoch.
    """
    means = {
        name: [statistics.fmean(values) for values in zip(*runs, strict=False)] for name, runs in curves.items()
    }
    if max(map(len, means.values()), default=0) < 2:
        return []
    drawn = {name: (range(1, len(mean) + 1), mean) for name, mean in means.items()}
    paint = lines(drawn, xlabel="epoch", ylabel="test accuracy, %", ylim=(0, 100))
    last = "; ".join(f"{name} ends at {mean[-1]:.1f} %" for name, mean in means.items())
    caption = "Test accuracy after each epoch, mean over victims. The last epoch decides."
    return [Charts([draw("victims", f"Test accuracy by epoch: {last}.", caption, paint)])]


SWEEP_TIDY = layout.columns(
    "t_star:int64 num_inference_steps:int64 sampler:string mode:string p:float64 sigma:float64 "
    "coarse_sigma:float64 coarse_grid:int64 colour_sigma:float64 preset:string replication:int64 iterations:int64 "
    "sparse:int64 sparse_percent:float64 point:string proxy_accuracy:float64 psnr:float64 score:float64 "
    "pareto:bool stopped:bool epochs:int64 images:int64 scored_images:int64 seconds:float64 device:string "
    "fingerprint:string"
)
"""Columns of results.parquet, one row per trial: accuracies, score and sparse_percent in per cent, psnr in dB."""
OBJECTIVE, WORDS = "proxy_accuracy", "proxy accuracy, %"


def write_sweep(output: str, view: SweepView) -> None:
    """Write results.parquet, and once there is a result best.yaml, pareto.png and heatmap.png into `output`."""
    store = Store(output)
    store.write(RESULTS, layout.table_bytes(pa.Table.from_pylist(view.rows, schema=SWEEP_TIDY)))
    if not view.rows:
        return
    head = f"# eclipse-ray purify SRC DST --config best.yaml\n# The best of {view.summary}.\n"
    store.write("best.yaml", (head + yaml.safe_dump(view.best, sort_keys=False)).encode())
    store.write("pareto.png", pareto_chart(view).png)
    store.write("heatmap.png", heat_map(view).png)


def pareto_chart(view: SweepView) -> Chart:
    """Return defense against fidelity, one point per trial, coloured by t_star, the Pareto front as a line."""
    rows = [row for row in view.rows if not row["stopped"]] or view.rows
    front = sorted((row["psnr"], row[OBJECTIVE]) for row in rows if row["pareto"])
    best = best_first(rows)[0]

    def paint(axes: Axes) -> None:
        dots = axes.scatter(
            [row["psnr"] for row in rows],
            [row[OBJECTIVE] for row in rows],
            c=[row["t_star"] for row in rows],
            cmap="viridis",
            zorder=2,
        )
        axes.plot(*zip(*front, strict=True), color=LIGHT.muted, linewidth=1, zorder=1, label="Pareto front")
        place = [best["psnr"]], [best[OBJECTIVE]]
        axes.scatter(*place, s=140, facecolors="none", edgecolors=LIGHT.series[1], label="best")
        axes.set(xlabel="fidelity: PSNR of purified clean images, dB", ylabel=f"defense: {WORDS}")
        axes.legend()
        axes.figure.colorbar(dots, ax=axes, label="t_star")

    caption = f"{view.summary}: what purification leaves of clean images, and how well it defends."
    return draw("pareto", "Defense against fidelity of every trial; the table holds every number.", caption, paint)


def heat_map(view: SweepView) -> Chart:
    """Return the mean objective over the two axes with the most values, t_star first if it varies."""
    values = {name: _sorted_values(view.rows, name) for name in view.axes or ["t_star"]}
    names = sorted(values, key=lambda name: (name != "t_star", -len(values[name])))[:2]
    across, down = [*(values[name] for name in names), [""]][:2]
    cells: dict[tuple[Any, ...], list[float]] = {}
    for row in view.rows:
        cells.setdefault(tuple(row[name] for name in names), []).append(row[OBJECTIVE])
    found = [[cells.get((x, y)[: len(names)], [math.nan]) for x in across] for y in down]
    means = [[statistics.fmean(cell) for cell in line] for line in found]

    def paint(axes: Axes) -> None:
        shown = axes.imshow(means, cmap="viridis", aspect="auto")
        axes.grid(visible=False)
        # Not quite white: that is the page, which turns dark, and the cells do not.
        box = {"facecolor": "black", "alpha": 0.35, "linewidth": 0, "pad": 1.5}
        for row, line in enumerate(means):
            for column, value in enumerate(line):
                text = "·" if value != value else f"{value:.1f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color="#fefefe", bbox=box)
        axes.set_xticks(range(len(across)), [value_words(value) for value in across])
        axes.set_yticks(range(len(down)), [value_words(value) for value in down])
        axes.set(xlabel=names[0], ylabel=names[1] if len(names) > 1 else "")
        axes.figure.colorbar(shown, ax=axes, label=f"mean {WORDS}")

    caption = f"Mean {WORDS}, by {' and '.join(names)}; other settings are averaged over."
    return draw("heatmap", f"Mean objective by {' and '.join(names)}.", caption, paint)


def best_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows by falling score, trials that were stopped early after all others."""
    return sorted(rows, key=lambda row: sweep_order(row["stopped"], row["score"]))


def _sorted_values(rows: list[dict[str, Any]], name: str) -> list[Any]:
    values = {row[name] for row in rows}
    return sorted(values, key=lambda value: (value is None, isinstance(value, str), value))


TRIALS_SHOWN = 100
"""The table lists at most this many trials."""
SETTINGS = tuple(SWEEP_TIDY.names[: SWEEP_TIDY.names.index("point")])
"""Columns of a sweep's rows that hold the settings of a trial."""


def sweep(store: Store) -> Section:
    """Return the section on a sweep: its best settings, its pictures, its trials."""
    best = read_mapping(store, BEST)
    rows = read_table(store).to_pylist() if store.exists(RESULTS) else []
    pairs = [[key, value_words(value)] for key, value in flatten(best).items()]
    settings = Table("The best settings", ["setting", "value"], pairs, numeric=False)
    command = Code("Purify with them", f"eclipse-ray purify SRC DST --config {store.path(BEST)}", open=True)
    if not rows:
        lead = "No trial of this sweep is measured."
        return Section("sweep", "Sweep", [Text(lead, note=True), settings], [lead])
    missing = SWEEP_TIDY.names - rows[0].keys()
    if missing or any(row[OBJECTIVE] is None for row in rows):
        name = min(missing, default=OBJECTIVE)
        raise InputError(f"{store.path(RESULTS)}: has no whole column {name}; run the same sweep command again")
    axes = [name for name in SETTINGS if len({str(row[name]) for row in rows}) > 1]
    view = SweepView(axes, rows, best, counted(len(rows), "trial"))
    first = best_first(rows)[0]
    words = ", ".join(f"{name} {value_words(first[name])}" for name in axes or ["t_star", "num_inference_steps"])
    lead = (
        f"The best of {view.summary} has {words}: a victim trained on what it purifies is right on "
        f"{first[OBJECTIVE]:.1f} % of held-out clean images, and clean images keep {first['psnr']:.1f} dB PSNR."
    )
    blocks: list[Block] = [Text(lead), Charts([pareto_chart(view), heat_map(view)]), settings, command]
    return Section("sweep", "Sweep", [*blocks, _trials(view)], [lead])


def _trials(view: SweepView) -> Table:
    """Return the trials, best first, with the columns that differ; results.parquet holds all of them."""
    head = [*view.axes, OBJECTIVE, "psnr", "score", "pareto", "stopped", "seconds"]
    ranked = best_first(view.rows)
    shown = [[value_words(row[name]) for name in head] for row in ranked[:TRIALS_SHOWN]]
    first = f"the best {TRIALS_SHOWN} of " if len(ranked) > TRIALS_SHOWN else ""
    return Table(f"Trials ({first}{len(ranked):,}), best first", head, shown)
