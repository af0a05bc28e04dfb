"""The tables of a matrix: tidy Parquet and CSV, and the paper's layout with its numbers beside ours.

Markdown (table.md) and the report's page show the same blocks, made from the same rows.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import pyarrow as pa

from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout
from eclipse_ray.reports.blocks import Block, Heading, Table, Text
from eclipse_ray.results import MatrixAxis, MatrixView
from eclipse_ray.storage.store import Store

RESULTS, RESULTS_CSV, TABLE = "results.parquet", "results.csv", "table.md"
UNFINISHED = "·"
TIDY = layout.columns(
    "poison:string variant:string budget:string cost:string poison_seconds:float64 defense:string victim:string "
    "recipe:string epochs:int64 seed:int64 n:int64 sparse:int64 b_over_n:float64 test_images:int64 "
    "test_accuracy:float64 best_epoch_accuracy:float64 best_epoch:int64 seconds:float64 defense_seconds:float64 "
    "images_per_second:float64 psnr:float64 ssim:float64 rho:float64 device:string fingerprint:string"
)
"""Columns of results.parquet: accuracies and b_over_n in per cent, psnr in dB; one row is one trained victim."""

Row = dict[str, Any]
AXES = b"eclipse_ray.axes"
"""Key in the metadata of results.parquet; its value is the view without its rows, as JSON."""


def write_tables(output: str, view: MatrixView) -> str:
    """Write results.parquet, results.csv and table.md into `output`; return the Markdown."""
    store = Store(output)
    axes = {name: value for name, value in asdict(view).items() if name != "rows"}
    table = pa.Table.from_pylist(view.rows, schema=TIDY.with_metadata({AXES: json.dumps(axes)}))
    store.write(RESULTS, layout.table_bytes(table))
    text = io.StringIO()
    writer = csv.DictWriter(text, TIDY.names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(view.rows)
    store.write(RESULTS_CSV, text.getvalue().encode())
    markdown = to_markdown(tables_of(view))
    store.write(TABLE, markdown.encode())
    return markdown


def read_table(store: Store) -> pa.Table:
    """Return results.parquet. Raises InputError if it is damaged."""
    try:
        return layout.open_parquet(store.read(RESULTS)).read()
    except layout.DAMAGE as error:
        raise InputError(f"{store.path(RESULTS)}: cannot be read ({error}); run its command again") from error


def read_view(store: Store) -> MatrixView:
    """Return the view that `write_tables` wrote. Raises InputError if it is damaged or of another version."""
    table = read_table(store)
    axes = (table.schema.metadata or {}).get(AXES)
    if axes is None or table.column_names != TIDY.names:
        raise InputError(f"{store.path(RESULTS)}: not written by this version; run its command again")
    tree = json.loads(axes)
    for name in ("columns", "defenses", "victims"):
        tree[name] = [MatrixAxis(**axis) for axis in tree[name]]
    return MatrixView(**tree, rows=table.to_pylist())


def tables_of(view: MatrixView) -> list[Block]:
    """Return all tables of a matrix, victim by victim, with a legend and the count of unfinished cells."""
    blocks: list[Block] = [Text(line) for line in _legend(view)]
    for victim in view.victims:
        cells = Cells(view, victim)
        training = f"{victim.details}; device" if victim.details else "Device"
        devices = {row["device"] for rows in cells.rows.values() for row in rows}
        blocks += [Heading(victim.label), Text(f"{training}: {', '.join(sorted(devices)) or 'none yet'}.")]
        blocks += [table for maker in (_accuracy, _clean, _gap, _costs) if (table := maker(cells))]
    return blocks


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return texts, headings and tables as Markdown."""
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, Heading):
            lines += [f"## {block.text}", ""]
        elif isinstance(block, Text):
            lines += [block.text, ""]
        elif isinstance(block, Table):
            rows = [block.head, ["---"] * len(block.head), *block.rows]
            lines += [f"### {block.caption}", "", *("| " + " | ".join(cells) + " |" for cells in rows), ""]
    return "\n".join(lines)


class Cells:
    """The tidy rows of one victim by defense and column, and what tables say of them."""

    def __init__(self, view: MatrixView, victim: MatrixAxis) -> None:
        self.view, self.victim = view, victim
        self.poisons = [column for column in view.columns if column.label != CLEAN]
        self.rows: dict[tuple[str, str], list[Row]] = {}
        for row in view.rows:
            if row["victim"] == victim.label:
                self.rows.setdefault((row["defense"], row["poison"]), []).append(row)
        plain = next((defense.label for defense in view.defenses if defense.published == "none"), "none")
        clean = self.values(plain, CLEAN)
        self.reference = statistics.fmean(clean) if clean else None
        """Accuracy without a defense on clean images, None if it is not measured."""

    def values(self, defense: str, column: str, name: str = "test_accuracy") -> list[float]:
        """Return one number of every seed that is measured."""
        return [row[name] for row in self.rows.get((defense, column), [])]

    def by_seed(self, defense: str) -> list[float]:
        """Return the mean accuracy over all poisons for each seed; none if a seed of a poison is missing."""
        found = [self.values(defense, poison.label) for poison in self.poisons]
        whole = all(len(values) == len(self.view.seeds) for values in found)
        return [statistics.fmean(values) for values in zip(*found, strict=True)] if whole else []

    def text(self, defense: MatrixAxis, column: MatrixAxis) -> str:
        """Return "mean ± deviation" with n where seeds are missing, and the paper's number in brackets."""
        values = self.values(defense.label, column.label)
        partial = "" if len(values) in (0, len(self.view.seeds)) else f" (n = {len(values)})"
        return spread(values) + partial + self.paper(defense, [column])

    def gap(self, values: Sequence[float]) -> str:
        """Return how far the mean of accuracies is below the reference."""
        if self.reference is None or not values:
            return UNFINISHED
        return f"{self.reference - statistics.fmean(values):.1f}"

    def paper(self, defense: MatrixAxis, columns: Sequence[MatrixAxis]) -> str:
        """Return the mean of the paper's numbers for all of `columns` in brackets, nothing if one is missing."""
        arch = self.victim.published
        found = [published(self.view.dataset, arch, defense.published, column.published) for column in columns]
        known = [value for value in found if value is not None]
        return f" [{statistics.fmean(known):.2f}]" if known and len(known) == len(found) else ""


def spread(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation" of the sample, the mean alone for one value, UNFINISHED for none."""
    if not values:
        return UNFINISHED
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def _legend(view: MatrixView) -> list[str]:
    wanted = len(view.columns) * len(view.defenses) * len(view.victims) * len(view.seeds)
    ratio = 100 * view.sparse / view.images if view.images else 0.0
    seeds = f"n = {len(view.seeds)} seed{'s' if len(view.seeds) > 1 else ''} per cell"
    lines = [
        f"{view.images:,} training images, {view.sparse:,} sparse clean images (B/N = {ratio:.1f} %), "
        f"{view.test_images:,} test images; {seeds}. Test accuracy in per cent after the last epoch, mean ± "
        "standard deviation over victims; poisons and transformed sets are made once.",
        f"{UNFINISHED} marks a cell that is not measured: {wanted - len(view.rows)} of {wanted} are left.",
    ]
    if ratio > 5:
        lines.append(f"Warning: B/N = {ratio:.1f} % is above the 5 % of the threat model.")
    if view.dataset:
        known = ", ".join(TABLES[view.dataset])
        lines.append(
            f"In brackets: the paper's number (arXiv 2406.15093; {view.dataset}, {known}, all images, 80 epochs); "
            f"a victim that the paper does not have is compared with its {REFERENCE_VICTIM}. AVG is over the "
            "columns shown, for the paper's numbers as well."
        )
    budgets = [f"{_title(view, column)}: {column.details}" for column in view.columns if column.details]
    if budgets:
        lines.append(f"Budgets: {'; '.join(budgets)}.")
    own = [f"{defense.label}: {defense.details}" for defense in view.defenses if defense.details]
    if own:
        lines.append(f"Rows with another sparse set: {'; '.join(own)}.")
    return lines


def _title(view: MatrixView, column: MatrixAxis) -> str:
    """Return the label of a column; a poison that was fitted with reduced numbers is called so."""
    costs = {row["cost"] for row in view.rows if row["poison"] == column.label}
    return f"{column.label} (reduced)" if costs == {"reduced"} and "reduced" not in column.label else column.label


def _accuracy(cells: Cells) -> Table | None:
    def row(defense: MatrixAxis) -> list[str]:
        average = spread(cells.by_seed(defense.label)) + cells.paper(defense, cells.poisons)
        return [*(cells.text(defense, poison) for poison in cells.poisons), average]

    return _table(cells, "Test accuracy", _heads(cells), row) if cells.poisons else None


def _clean(cells: Cells) -> Table | None:
    def row(defense: MatrixAxis) -> list[str]:
        return [cells.text(defense, clean[0]), cells.gap(cells.values(defense.label, CLEAN))]

    clean = [column for column in cells.view.columns if column.label == CLEAN]
    return _table(cells, "Clean accuracy", ["clean", "gap to undefended clean"], row) if clean else None


def _gap(cells: Cells) -> Table | None:
    def row(defense: MatrixAxis) -> list[str]:
        gaps = [cells.gap(cells.values(defense.label, poison.label)) for poison in cells.poisons]
        return [*gaps, cells.gap(cells.by_seed(defense.label))]

    if not cells.poisons or cells.reference is None:
        return None
    return _table(cells, f"Gap to undefended clean ({cells.reference:.1f})", _heads(cells), row)


def _heads(cells: Cells) -> list[str]:
    return [*(_title(cells.view, poison) for poison in cells.poisons), "AVG"]


COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "defense_seconds": ("transform, s", "{:,.0f}".format),
    "images_per_second": ("images/s", "{:,.0f}".format),
    "psnr": ("PSNR, dB", "{:.1f}".format),
    "ssim": ("SSIM", "{:.3f}".format),
    "rho": ("poison left, rho", "{:.2f}".format),
    "seconds": ("training of a victim, s", "{:,.0f}".format),
}
"""Column of the rows: its head in the table of costs, and how its mean is written."""


def _costs(cells: Cells) -> Table:
    """Return what a defense costs, and how far its training images are from the clean ones."""

    columns = cells.view.columns

    def cell(defense: MatrixAxis, name: str, write: Callable[[float], str]) -> str:
        every = [value for column in columns for value in cells.values(defense.label, column.label, name)]
        known = [value for value in every if value is not None]
        return write(statistics.fmean(known)) if known else "-" if every else UNFINISHED

    def row(defense: MatrixAxis) -> list[str]:
        return [cell(defense, name, write) for name, (_, write) in COSTS.items()]

    title = (
        "Cost, and likeness to the clean images: means over the columns measured; a dash where no image is "
        "transformed or changed"
    )
    return _table(cells, title, [head for head, _ in COSTS.values()], row)


def _table(cells: Cells, title: str, head: Sequence[str], row: Callable[[MatrixAxis], list[str]]) -> Table:
    return Table(title, ["defense", *head], [[defense.label, *row(defense)] for defense in cells.view.defenses])


CLEAN = "clean"

_PUBLISHED: dict[str, Any] = json.loads(
    files("eclipse_ray.reports").joinpath("published.json").read_text(encoding="utf-8")
)
CLEAN_ACCURACY: dict[str, dict[str, float]] = _PUBLISHED.pop("clean")
"""Row, victim: accuracy on CIFAR-10 when the training set is clean (table 3)."""
TABLES: dict[str, dict[str, dict[str, dict[str, float]]]] = _PUBLISHED
"""Dataset, victim, row, column: test accuracy in per cent (arXiv 2406.15093, tables 1 to 7; figure 5 prints none).

Rows have the names of our defenses where there is one, else a name that an entry of a matrix can ask for with
`published`. `avg` is over the columns of its own table, as printed.
"""
REFERENCE_VICTIM = "resnet18"

# Our rows that are compared with a row of the paper under another name. "avatar" has none: what the paper calls
# AVATAR is module A of its own method.
SAME_ROW = {"eclipse-published": "eclipse", "eclipse-augment": "eclipse", "eclipse-baked": "eclipse"}


def published(dataset: str | None, victim: str, row: str, column: str) -> float | None:
    """Return the paper's accuracy for a cell, or None where it has none.

    A victim that the paper does not have is compared with the paper's ResNet-18. `column` is a poison or "clean".
    """
    if dataset is None:
        return None
    row = SAME_ROW.get(row, row)
    if dataset == "cifar10" and column == CLEAN:
        found = CLEAN_ACCURACY.get(row, {})
        return found.get(victim, found.get(REFERENCE_VICTIM))
    rows = TABLES[dataset]
    return rows.get(victim, rows[REFERENCE_VICTIM]).get(row, {}).get(column)
