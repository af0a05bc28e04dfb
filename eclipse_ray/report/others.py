"""What a sweep or an audit has left in its folder, shown as it lies there."""

from __future__ import annotations

from typing import Any

import yaml

from eclipse_ray.config import flatten
from eclipse_ray.data.store import Store
from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout
from eclipse_ray.report.accuracy import read_rows
from eclipse_ray.report.blocks import Block, Picture, Section, Table, Text
from eclipse_ray.report.folders import AUDIT, BEST, RESULTS, read_json

TRIALS_SHOWN = 100
PICTURES = {
    "pareto.png": (
        "Trials by accuracy and cost; the Pareto front is marked.",
        "Accuracy against cost of every trial",
    ),
    "heatmap.png": ("Accuracy by depth and compensation.", "Accuracy by two settings"),
    "audit.png": ("What the audit measured.", "Measurements of the audit"),
}


def sweep(store: Store) -> Section:
    """Return the section on a sweep: its best settings, its pictures, its trials."""
    best = _mapping(store, BEST)
    words = ", ".join(f"{key} = {_word(value)}" for key, value in flatten(best).items())
    lead = f"The sweep recommends {words}." if words else "The sweep recommends nothing."
    blocks: list[Block] = [Text(lead), *_pictures(store, ("pareto.png", "heatmap.png"))]
    blocks.append(Table("The best settings", ["setting", "value"], _pairs(best)))
    if store.exists(RESULTS):
        rows = read_rows(store)
        head = list(rows[0]) if rows else []
        shown = [[_word(row[name]) for name in head] for row in rows[:TRIALS_SHOWN]]
        first = f"the first {TRIALS_SHOWN} of " if len(rows) > TRIALS_SHOWN else ""
        blocks.append(Table(f"Trials ({first}{len(rows):,})", head, shown))
    return Section("sweep", "Sweep", blocks, [lead])


def audit(store: Store) -> Section:
    """Return the section on an audit: its verdict and what speaks for it."""
    found = read_json(store, AUDIT)
    verdict, p_value = found.get("verdict", "unknown"), found.get("p_value")
    evidence = f" (p = {p_value:.2g})" if isinstance(p_value, int | float) else ""
    lead = f"The verdict of the audit: {verdict}{evidence}."
    blocks: list[Block] = [Text(lead), *_pictures(store, ("audit.png",))]
    blocks.append(Table("The audit", ["", "value"], _pairs(found), numeric=False))
    return Section("audit", "Audit", blocks, [lead])


def _pictures(store: Store, names: tuple[str, ...]) -> list[Block]:
    found: list[Block] = []
    for name in names:
        png = layout.read_optional(store, name)
        if png is not None:
            caption, alt = PICTURES[name]
            found.append(Picture(alt, caption, png))
    return found


def _mapping(store: Store, key: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(store.read(key))
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        raise InputError(f"{store.path(key)}: damaged; run the command that writes it again")
    return tree


def _pairs(tree: dict[str, Any]) -> list[list[str]]:
    return [[key, _word(value)] for key, value in flatten(tree).items()]


def _word(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
