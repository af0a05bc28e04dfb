"""What victims say: one dataset judged, the three sets of the demo, a matrix, and the trials of a sweep."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from eclipse_ray.config import flatten
from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout
from eclipse_ray.reports.blocks import Block, Chart, Charts, Code, Note, Section, Table, Text, value_words
from eclipse_ray.reports.charts import DASHES, MARKERS, WIDE, Theme, draw, legible
from eclipse_ray.reports.folder import BEST, read_json
from eclipse_ray.reports.tables import CLEAN, RESULTS, published, read_rows, read_view, tables_of
from eclipse_ray.results import DEMO_FILE, EVALUATION_FILE, SweepView, sweep_order
from eclipse_ray.storage.store import Store

TITLE = "Test accuracy"
COLUMNS_WITH_CURVES = 4
"""The first columns of a matrix, at most this many, have a chart of training curves each."""
DEFENSES_OF_A_CHART = len(MARKERS)
"""A chart shows at most this many defenses."""

Result = Mapping[str, Any]


def evaluation(store: Store) -> Section:
    """Return the section on one judged dataset."""
    result = read_json(store, EVALUATION_FILE)
    lead = f"A victim trained on {result['train']} reaches {_result(result)} on {result['test']}."
    rows = [[f"victim {index + 1}", f"{value:.2f}"] for index, value in enumerate(result["accuracies"])]
    blocks: list[Block] = [Text(lead), Table("Test accuracy of each victim, %", ["", "last epoch"], rows)]
    blocks += [Charts(found)] if (found := victims({"victims": result["curves"]})) else []
    return Section("accuracy", TITLE, blocks, [lead])


def demo(store: Store) -> Section:
    """Return the section on the three victims of the demo."""
    if not store.exists(DEMO_FILE):
        text = "The accuracies of this demo were not recorded; run the demo on this folder again."
        return Section("accuracy", TITLE, [Note(text)])
    note = read_json(store, DEMO_FILE)
    found: dict[str, Result] = note["victims"]
    clean, poisoned, purified = (float(note[name]) for name in ("clean", "poisoned", "purified"))
    recovered = (
        f": {100 * (purified - poisoned) / (clean - poisoned):.0f} % of the gap" if clean > poisoned else ""
    )
    lead = (
        f"A victim trained on clean images reaches {clean:.1f} % test accuracy, on poisoned ones {poisoned:.1f} "
        f"%, on purified ones {purified:.1f} %{recovered}."
    )
    paper = {"clean": ("none", CLEAN), "poisoned": ("none", "ar"), "purified": ("eclipse", "ar")}
    rows = [
        [name, _result(result), _percent(published("cifar10", "small", *paper[name]))]
        for name, result in found.items()
    ]
    caption = "Test accuracy after the last epoch; the paper's is ResNet-18 on CIFAR-10, AR, all images, 80 epochs"
    blocks: list[Block] = [Text(lead), Table(caption, ["trained on", "here", "the paper"], rows)]
    blocks.append(
        Text(
            "The images here are synthetic and the victim is small: the paper's numbers stand beside ours for the "
            "order of things, not for their size."
        )
    )
    blocks += [Charts(curves)] if (curves := victims({name: r["curves"] for name, r in found.items()})) else []
    return Section("accuracy", TITLE, blocks, [lead])


def matrix(store: Store, dataset: str | None) -> Section:
    """Return the section with all tables of a matrix; `dataset` names the paper's dataset, or is None."""
    view = read_view(store, dataset)
    rows, blocks = view.rows, tables_of(view)
    charts: list[Block] = [_dots(rows, name, dataset) for name in _unique(rows, "victim")]
    curves = _curves(store, rows)
    if curves:
        charts.append(Charts(curves))
    best = _best(rows)
    return Section("accuracy", TITLE, [*charts, *blocks], [best] if best else [])


def _best(rows: Sequence[Result]) -> str:
    """Return a sentence on the best defense of the first victim, on average over all poisons."""
    if not rows:
        return "No cell is measured yet."
    victim = rows[0]["victim"]
    poisons = [name for name in _unique(rows, "poison") if name != CLEAN]
    cells = {
        (d, p): values
        for d in _unique(rows, "defense")
        for p in poisons
        if (values := _accuracies(rows, victim, d, p))
    }
    whole = [d for d in _unique(rows, "defense") if poisons and all((d, p) in cells for p in poisons)]
    if not whole:
        return f"{len(rows):,} victims are trained; no defense has met every poison yet."
    means = {d: statistics.fmean(statistics.fmean(cells[d, p]) for p in poisons) for d in whole}
    best = max(means, key=lambda name: means[name])
    if best == "none":
        return f"{len(rows):,} victims are trained; on average no defense beats none ({means[best]:.1f} %)."
    none = f"; without a defense it reaches {means['none']:.1f} %" if "none" in means else ""
    return (
        f"{len(rows):,} victims are trained. Averaged over {len(poisons)} poisons, victim {victim} does best "
        f"under the defense “{best}”, with {means[best]:.1f} % test accuracy{none}."
    )


def _dots(rows: Sequence[Result], victim: str, dataset: str | None) -> Block:
    defenses, poisons = _drawn(_unique(rows, "defense")), _unique(rows, "poison")

    def paint(axes: Axes, theme: Theme) -> None:
        for index, name in enumerate(defenses):
            shift = (index - (len(defenses) - 1) / 2) * 0.13
            found = [(place, _accuracies(rows, victim, name, poison)) for place, poison in enumerate(poisons)]
            found = [(place, values) for place, values in found if values]
            axes.errorbar(
                [place + shift for place, _ in found],
                [statistics.fmean(values) for _, values in found],
                [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in found],
                fmt=MARKERS[index],
                color=theme.series[index],
                capsize=2,
                label=legible(name),
            )
            paper = [(place + shift, published(dataset, victim, name, p)) for place, p in enumerate(poisons)]
            known = [(place, value) for place, value in paper if value is not None]
            if known:
                axes.scatter(
                    [place for place, _ in known],
                    [value for _, value in known],
                    s=26,
                    facecolors="none",
                    edgecolors=theme.series[index],
                )
        axes.set(ylabel="test accuracy, %", ylim=(0, 100), xlim=(-0.5, len(poisons) - 0.5))
        axes.set_xticks(range(len(poisons)), poisons)
        axes.grid(visible=False, axis="x")
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    caption = (
        f"Victim {victim}: mean and standard deviation over seeds"
        + (f", {DEFENSES_OF_A_CHART} of the defenses" if len(_unique(rows, "defense")) > len(defenses) else "")
        + (". Hollow circles are the paper's numbers." if dataset else ".")
    )
    place = _unique(rows, "victim").index(victim) + 1
    alt = f"Test accuracy of victim {victim} by poison and defense; the tables below hold every number."
    return draw(f"accuracy-{place}", alt, caption, paint, WIDE)


def _curves(store: Store, rows: Sequence[Result]) -> list[Chart]:
    """Return charts of test accuracy by epoch of the first victim, one for each of the first columns."""
    if not rows:
        return []
    victim = rows[0]["victim"]
    charts: list[Chart] = []
    for place, poison in enumerate(_unique(rows, "poison")[:COLUMNS_WITH_CURVES], 1):
        curves: dict[str, list[list[float]]] = {}
        for row in rows:
            if row["victim"] == victim and row["poison"] == poison:
                data = layout.read_optional(store, f"results/{row['fingerprint']}.json")
                if data is not None:
                    curves.setdefault(row["defense"], []).append(json.loads(data)["test_accuracy"])
        charts += victims(
            {name: curves[name] for name in _drawn(list(curves))},
            f"epochs-{place}",
            f"{poison}, victim {victim}. ",
        )
    return charts


def _drawn(defenses: Sequence[str]) -> list[str]:
    """Return at most DEFENSES_OF_A_CHART names in their order; rivals are left out before "none" and our own."""
    ranked = sorted(defenses, key=lambda name: name != "none" and not name.startswith("eclipse"))
    return [name for name in defenses if name in ranked[:DEFENSES_OF_A_CHART]]


def _accuracies(rows: Sequence[Result], victim: str, defense: str, poison: str) -> list[float]:
    return [
        row["test_accuracy"]
        for row in rows
        if (row["victim"], row["defense"], row["poison"]) == (victim, defense, poison)
    ]


def _unique(rows: Sequence[Result], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _result(result: Result) -> str:
    return (
        f"{result['test_accuracy']:.2f} ± {result['test_accuracy_std']:.2f} % (n = {result['seeds']}, "
        f"{result['victim']}, {result['epochs']} epochs)"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


Curves = Mapping[str, Sequence[Sequence[float]]]
"""Name: for each victim, its test accuracy after every epoch."""


def victims(curves: Curves, name: str = "victims", words: str = "") -> list[Chart]:
    """Return a chart of test accuracy by epoch, one line per name; none if every run has one epoch.

    The caption begins with `words`.
    """
    if not any(len(run) > 1 for runs in curves.values() for run in runs):
        return []

    def paint(axes: Axes, theme: Theme) -> None:
        for index, (label, runs) in enumerate(curves.items()):
            style = index % len(theme.series)
            mean, epochs = _over_victims(runs)
            colour = theme.series[style]
            (line,) = axes.plot(epochs, mean, color=colour, marker=MARKERS[style], linestyle=DASHES[style])
            line.set_label(legible(label))
            if len(runs) > 1:
                values = np.array([run[: len(mean)] for run in runs])
                axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(0, 100))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")

    last = "; ".join(f"{label} ends at {_over_victims(runs)[0][-1]:.1f} %" for label, runs in curves.items())
    caption = f"{words}Test accuracy after each epoch: mean, least and most over victims. The last epoch decides."
    return [draw(name, f"{words}Test accuracy by epoch: {last}.", caption, paint)]


def _over_victims(runs: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    epochs = min(len(run) for run in runs)
    return np.mean([run[:epochs] for run in runs], axis=0), np.arange(1, epochs + 1)


SWEEP_TIDY = pa.schema(
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
"""Columns of results.parquet, one row per trial: accuracies, score and sparse_percent in per cent, psnr in dB."""
OBJECTIVE, WORDS = "proxy_accuracy", "proxy accuracy, %"


def write_sweep(output: str, view: SweepView) -> None:
    """Write results.parquet, and once there is a result best.yaml, pareto.png and heatmap.png into `output`."""
    store = Store(output)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(view.rows, schema=SWEEP_TIDY), sink)
    store.write("results.parquet", sink.getvalue().to_pybytes())
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
    """Return the rows by falling score, trials that were stopped early after all others."""
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


TRIALS_SHOWN = 100
"""The table lists at most this many trials."""
SETTINGS = tuple(SWEEP_TIDY.names[: SWEEP_TIDY.names.index("point")])
"""Columns of a sweep's rows that hold the settings of a trial."""


def sweep(store: Store) -> Section:
    """Return the section on a sweep: its best settings, its pictures, its trials."""
    best = _mapping(store, BEST)
    rows = read_rows(store) if store.exists(RESULTS) else []
    settings = Table("The best settings", ["setting", "value"], _pairs(best), numeric=False)
    command = Code("Purify with them", f"eclipse-ray purify SRC DST --config {store.path(BEST)}", open=True)
    if not rows:
        lead = "No trial of this sweep is measured."
        return Section("sweep", "Sweep", [Note(lead), settings], [lead])
    missing = SWEEP_TIDY.names - rows[0].keys()
    if missing or any(row[OBJECTIVE] is None for row in rows):
        name = min(missing, default=OBJECTIVE)
        raise InputError(f"{store.path(RESULTS)}: has no whole column {name}; run the same sweep command again")
    view = _view(rows, best)
    lead = _found(view)
    blocks: list[Block] = [Text(lead), Charts([pareto_chart(view), heat_map(view)]), settings, command]
    return Section("sweep", "Sweep", [*blocks, _trials(view)], [lead])


def _view(rows: list[dict[str, Any]], best: dict[str, Any]) -> SweepView:
    axes = [name for name in SETTINGS if len({str(row[name]) for row in rows}) > 1]
    return SweepView(axes, rows, best, f"{len(rows):,} trials")


def _found(view: SweepView) -> str:
    best = best_first(view.rows)[0]
    settings = ", ".join(
        f"{name} {value_words(best[name])}" for name in view.axes or ["t_star", "num_inference_steps"]
    )
    return (
        f"The best of {view.summary} has {settings}: a victim trained on what it purifies is right on "
        f"{best['proxy_accuracy']:.1f} % of held-out clean images, and clean images keep {best['psnr']:.1f} dB "
        "PSNR."
    )


def _trials(view: SweepView) -> Table:
    """Return the trials, best first, with the columns that differ; results.parquet holds all of them."""
    head = [*view.axes, OBJECTIVE, "psnr", "score", "pareto", "stopped", "seconds"]
    ranked = best_first(view.rows)
    shown = [[value_words(row[name]) for name in head] for row in ranked[:TRIALS_SHOWN]]
    first = f"the best {TRIALS_SHOWN} of " if len(ranked) > TRIALS_SHOWN else ""
    return Table(f"Trials ({first}{len(ranked):,}), best first", head, shown)


def _mapping(store: Store, key: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(store.read(key))
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        raise InputError(f"{store.path(key)}: damaged; run the command that writes it again")
    return tree


def _pairs(tree: dict[str, Any]) -> list[list[str]]:
    return [[key, value_words(value)] for key, value in flatten(tree).items()]
