"""What victims say: one dataset judged, the three of the demo, or a matrix with the paper's numbers beside."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq
from matplotlib.axes import Axes

from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout
from eclipse_ray.reports.blocks import Block, Chart, Charts, Note, Section, Table, Text
from eclipse_ray.reports.charts import MARKERS, WIDE, Theme, draw, legible
from eclipse_ray.reports.folder import RESULTS, TABLE, read_json
from eclipse_ray.reports.learning import victims
from eclipse_ray.reports.markdown import parse_tables
from eclipse_ray.reports.published import CLEAN, published
from eclipse_ray.results import DEMO_FILE, EVALUATION_FILE
from eclipse_ray.storage.store import Store

TITLE = "Test accuracy"
COLUMNS_WITH_CURVES = 4
"""A curve chart for so many columns of a matrix."""
DEFENSES_OF_A_CHART = len(MARKERS)

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
    """Return the section with all tables of a matrix; `dataset` is the paper's whose numbers stand beside."""
    rows = read_rows(store)
    try:
        blocks = parse_tables(store.read(TABLE).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{store.path(TABLE)}: damaged; run the same evaluate command again") from error
    charts: list[Block] = [_dots(rows, name, dataset) for name in _unique(rows, "victim")]
    curves = _curves(store, rows)
    if curves:
        charts.append(Charts(curves))
    best = _best(rows)
    return Section("accuracy", TITLE, [*charts, *blocks], [best] if best else [])


def read_rows(store: Store) -> list[dict[str, Any]]:
    """Return the rows of results.parquet. Raises InputError if it is damaged."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(store.read(RESULTS))).to_pylist()
    except layout.DAMAGE as error:
        raise InputError(f"{store.path(RESULTS)}: cannot be read ({error}); run its command again") from error
    return rows


def _best(rows: Sequence[Result]) -> str:
    """Return how the defenses of the first victim compare over the poisons that all of them were measured on."""
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
    """Return a chart of epochs for the first columns, for the victim that comes first."""
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
    """Return the defenses that a chart has room for: no defense and our own before their rivals, in order."""
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
