"""What a sweep or an audit has found."""

from __future__ import annotations

from typing import Any

import yaml

from eclipse_ray.config import flatten
from eclipse_ray.data.store import Store
from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout
from eclipse_ray.report.accuracy import read_rows
from eclipse_ray.report.blocks import Block, Charts, Code, Note, Picture, Section, Table, Text, value_words
from eclipse_ray.report.folders import AUDIT, BEST, RESULTS, read_json
from eclipse_ray.report.sweep import TIDY, best_first, heat_map, pareto_chart
from eclipse_ray.results import SweepView

TRIALS_SHOWN = 100
SETTINGS = tuple(TIDY.names[: TIDY.names.index("point")])
"""Columns of a sweep's rows that say what was tried."""


def sweep(store: Store) -> Section:
    """Return the section on a sweep: its best settings, its pictures, its trials."""
    best = _mapping(store, BEST)
    rows = read_rows(store) if store.exists(RESULTS) else []
    settings = Table("The best settings", ["setting", "value"], _pairs(best), numeric=False)
    command = Code("Purify with them", f"eclipse-ray purify SRC DST --config {store.path(BEST)}", open=True)
    if not rows:
        lead = "No trial of this sweep is measured."
        return Section("sweep", "Sweep", [Note(lead), settings], [lead])
    missing = TIDY.names - rows[0].keys()
    if missing:
        raise InputError(f"{store.path(RESULTS)}: has no column {min(missing)}; run the same sweep command again")
    view = _view(rows, best)
    lead = _found(view)
    blocks: list[Block] = [Text(lead), Charts([pareto_chart(view), heat_map(view)]), settings, command]
    return Section("sweep", "Sweep", [*blocks, _trials(view)], [lead])


def _view(rows: list[dict[str, Any]], best: dict[str, Any]) -> SweepView:
    trained = all(row["proxy_accuracy"] is not None for row in rows)
    axes = [name for name in SETTINGS if len({str(row[name]) for row in rows}) > 1]
    objective = "proxy_accuracy" if trained else "shortcut_score"
    return SweepView(objective, axes, rows, best, f"{len(rows):,} trials")


def _found(view: SweepView) -> str:
    best = best_first(view.rows)[0]
    settings = ", ".join(
        f"{name} {value_words(best[name])}" for name in view.axes or ["t_star", "num_inference_steps"]
    )
    reached = (
        f"a victim trained on what it purifies is right on {best['proxy_accuracy']:.1f} % of held-out clean images"
        if view.objective == "proxy_accuracy"
        else f"its shortcut score is {best['shortcut_score']:.1f} points"
    )
    return (
        f"The best of {view.summary} has {settings}: {reached}, and clean images keep {best['psnr']:.1f} dB PSNR."
    )


def _trials(view: SweepView) -> Table:
    """Return the trials, best first, with the columns that differ; results.parquet holds all of them."""
    head = [*view.axes, view.objective, "psnr", "score", "pareto", "stopped", "seconds"]
    ranked = best_first(view.rows)
    shown = [[value_words(row[name]) for name in head] for row in ranked[:TRIALS_SHOWN]]
    first = f"the best {TRIALS_SHOWN} of " if len(ranked) > TRIALS_SHOWN else ""
    return Table(f"Trials ({first}{len(ranked):,}), best first", head, shown)


def audit(store: Store) -> Section:
    """Return the section on an audit: its verdict and what speaks for it. Raises InputError if it is damaged."""
    found = read_json(store, AUDIT)
    try:
        verdict, _, evidence = str(found["words"]).partition(". ")
        scores = [
            [
                score["name"].replace("_", " "),
                f"{score['effect']:.3f}",
                f"{score['p_value']:.2g}",
                "yes" if score["counted"] else "no",
                score["detail"],
            ]
            for score in found["evidence"]
        ]
        against = f" and {found['clean_images']:,} clean ones" if found["clean_images"] else ""
        looked_at = f"{found['images']:,} images of {found['classes']:,} classes{against} were looked at."
        advice = {key: value for key, value in found["recommended"].items() if value is not None}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{store.path(AUDIT)}: damaged ({error}); run the same audit command again") from error
    lead = f"{verdict.rstrip('.')}. {looked_at}"
    blocks: list[Block] = [Text(lead)]
    blocks += [Text(f"What speaks for it: {evidence}")] if evidence else []
    if advice:
        blocks.append(Text(f"Purify with {', '.join(f'{key} {value:g}' for key, value in advice.items())}."))
    png = layout.read_optional(store, "audit.png")
    if png is not None:
        words = "Class means, p-values of the scores, and energy of the residual by frequency"
        blocks.append(Picture(f"{words}; the table holds every number.", f"{words}.", png))
    head = ["score", "effect", "p", "counts", "what it found"]
    return Section("audit", "Audit", [*blocks, Table("Scores", head, scores, numeric=False)], [lead])


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
