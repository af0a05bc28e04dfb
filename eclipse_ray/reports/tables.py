"""The tables of a matrix: tidy Parquet and CSV, and Markdown in the paper's layout, its numbers beside ours."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eclipse_ray.reports.published import CLEAN, REFERENCE_VICTIM, TABLES, published
from eclipse_ray.results import MatrixAxis, MatrixView
from eclipse_ray.storage.store import Store

UNFINISHED = "·"
TIDY = pa.schema(
    [
        ("poison", pa.string()),
        ("variant", pa.string()),
        ("budget", pa.string()),
        ("cost", pa.string()),
        ("poison_seconds", pa.float64()),
        ("defense", pa.string()),
        ("victim", pa.string()),
        ("recipe", pa.string()),
        ("epochs", pa.int64()),
        ("seed", pa.int64()),
        ("n", pa.int64()),
        ("sparse", pa.int64()),
        ("b_over_n", pa.float64()),
        ("test_images", pa.int64()),
        ("test_accuracy", pa.float64()),
        ("best_epoch_accuracy", pa.float64()),
        ("best_epoch", pa.int64()),
        ("seconds", pa.float64()),
        ("defense_seconds", pa.float64()),
        ("images_per_second", pa.float64()),
        ("psnr", pa.float64()),
        ("ssim", pa.float64()),
        ("device", pa.string()),
        ("fingerprint", pa.string()),
    ]
)
"""Columns of results.parquet: accuracies and b_over_n in per cent, psnr in dB; one row is one trained victim."""

Row = dict[str, Any]
Lines = list[str]


def write_tables(output: str, view: MatrixView) -> str:
    """Write results.parquet, results.csv and table.md into `output`; return the Markdown."""
    store = Store(output)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(view.rows, schema=TIDY), sink)
    store.write("results.parquet", sink.getvalue().to_pybytes())
    text = io.StringIO()
    writer = csv.DictWriter(text, TIDY.names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(view.rows)
    store.write("results.csv", text.getvalue().encode())
    markdown = to_markdown(view)
    store.write("table.md", markdown.encode())
    return markdown


def to_markdown(view: MatrixView) -> str:
    """Return all tables of a matrix, victim by victim, with a legend and the count of unfinished cells."""
    lines = _legend(view)
    for victim in view.victims:
        cells = Cells(view, victim)
        lines += ["", f"## {victim.label}", "", f"{victim.details}; device: {cells.devices()}.", ""]
        lines += _accuracy(view, cells)
        lines += _clean(view, cells)
        lines += _gap(view, cells)
        lines += _best(view, cells)
        lines += _costs(view, cells)
    return "\n".join(lines) + "\n"


class Cells:
    """The tidy rows of one victim by defense and column, and what tables say of them."""

    def __init__(self, view: MatrixView, victim: MatrixAxis) -> None:
        self.view, self.victim = view, victim
        self.rows: dict[tuple[str, str], list[Row]] = {}
        for row in view.rows:
            if row["victim"] == victim.label:
                self.rows.setdefault((row["defense"], row["poison"]), []).append(row)

    def values(self, defense: str, column: str, name: str) -> list[float]:
        """Return one number of every seed that is measured."""
        return [row[name] for row in self.rows.get((defense, column), [])]

    def complete(self, defense: str, column: str) -> bool:
        """Return whether every seed is measured."""
        return len(self.rows.get((defense, column), [])) == len(self.view.seeds)

    def by_seed(self, defense: str, columns: Sequence[str], name: str) -> list[float] | None:
        """Return the mean over columns for each seed; None where one is missing."""
        if not columns or not all(self.complete(defense, column) for column in columns):
            return None
        return [
            statistics.fmean(values)
            for values in zip(*(self.values(defense, column, name) for column in columns), strict=True)
        ]

    def text(self, defense: str, column: str, name: str) -> str:
        """Return "mean ± deviation", with n where seeds are missing, or the sign of an unfinished cell."""
        values = self.values(defense, column, name)
        partial = "" if len(values) in (0, len(self.view.seeds)) else f" (n = {len(values)})"
        return spread(values) + partial

    def devices(self) -> str:
        """Return what the victims were trained on."""
        names = sorted({row["device"] for rows in self.rows.values() for row in rows})
        return ", ".join(names) or "none yet"

    def paper(self, defense: MatrixAxis, columns: Sequence[MatrixAxis]) -> float | None:
        """Return the paper's number, or the mean of its numbers, for all of `columns`; None if one is missing."""
        arch = self.victim.published
        found = [published(self.view.dataset, arch, defense.published, column.published) for column in columns]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known and len(known) == len(found) else None


def spread(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation" of the sample, the mean alone for one value, UNFINISHED for none."""
    if not values:
        return UNFINISHED
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def _legend(view: MatrixView) -> Lines:
    wanted = len(view.columns) * len(view.defenses) * len(view.victims) * len(view.seeds)
    ratio = 100 * view.sparse / view.images
    seeds = f"n = {len(view.seeds)} seed{'s' if len(view.seeds) > 1 else ''} a cell"
    lines = [
        f"{view.images:,} training images, {view.sparse:,} sparse clean images (B/N = {ratio:.1f} %), "
        f"{view.test_images:,} test images; {seeds}. Test accuracy in per cent after the last epoch, mean ± "
        "standard deviation over victims; poisons and transformed sets are made once.",
        "",
        f"{UNFINISHED} is a cell that is not measured: {wanted - len(view.rows)} of {wanted} are left.",
    ]
    if ratio > 5:
        lines += ["", f"Warning: B/N = {ratio:.1f} % is above the 5 % of the threat model."]
    if view.dataset:
        known = ", ".join(TABLES[view.dataset])
        lines += [
            "",
            f"In brackets: the paper's number (arXiv 2406.15093; {view.dataset}, {known}, all images, 80 epochs); "
            f"a victim it does not have stands beside its {REFERENCE_VICTIM}. AVG is over the columns shown, "
            "and so is the paper's.",
        ]
    budgets = [f"{column.label}: {column.details}" for column in view.columns if column.details]
    if budgets:
        lines += ["", f"Budgets: {'; '.join(budgets)}."]
    own = [f"{defense.label}: {defense.details}" for defense in view.defenses if defense.details]
    if own:
        lines += ["", f"Rows with another sparse set: {'; '.join(own)}."]
    return lines


def _poisons(view: MatrixView) -> list[MatrixAxis]:
    return [column for column in view.columns if column.label != CLEAN]


def _accuracy(view: MatrixView, cells: Cells) -> Lines:
    poisons = _poisons(view)
    if not poisons:
        return []

    def row(defense: MatrixAxis) -> list[str]:
        texts = [
            cells.text(defense.label, column.label, "test_accuracy") + _beside(cells.paper(defense, [column]))
            for column in poisons
        ]
        labels = [column.label for column in poisons]
        mean = cells.by_seed(defense.label, labels, "test_accuracy")
        return [*texts, spread(mean or []) + _beside(cells.paper(defense, poisons))]

    head = [*(column.label for column in poisons), "AVG"]
    return ["### Test accuracy", "", *_table(view, head, row), ""]


def _clean(view: MatrixView, cells: Cells) -> Lines:
    column = next((column for column in view.columns if column.label == CLEAN), None)
    if column is None:
        return []
    reference = _undefended(view, cells)

    def row(defense: MatrixAxis) -> list[str]:
        text = cells.text(defense.label, CLEAN, "test_accuracy") + _beside(cells.paper(defense, [column]))
        return [text, _difference(reference, cells.values(defense.label, CLEAN, "test_accuracy"))]

    return ["### Clean accuracy", "", *_table(view, ["clean", "gap to undefended clean"], row), ""]


def _gap(view: MatrixView, cells: Cells) -> Lines:
    poisons, reference = _poisons(view), _undefended(view, cells)
    if not poisons or reference is None:
        return []

    def row(defense: MatrixAxis) -> list[str]:
        labels = [column.label for column in poisons]
        gaps = [_difference(reference, cells.values(defense.label, label, "test_accuracy")) for label in labels]
        return [*gaps, _difference(reference, cells.by_seed(defense.label, labels, "test_accuracy") or [])]

    title = f"### Gap to undefended clean ({reference:.1f})"
    return [title, "", *_table(view, [*(column.label for column in poisons), "AVG"], row), ""]


def _best(view: MatrixView, cells: Cells) -> Lines:
    labels = [column.label for column in view.columns]

    def row(defense: MatrixAxis) -> list[str]:
        return [cells.text(defense.label, label, "best_epoch_accuracy") for label in labels]

    title = "### Best epoch (chosen on the test images, so no result; the last epoch decides)"
    return [title, "", *_table(view, labels, row), ""]


def _costs(view: MatrixView, cells: Cells) -> Lines:
    """What a defense costs, and how far its training images are from the clean ones, over all columns measured."""
    names = ("defense_seconds", "images_per_second", "psnr", "ssim", "seconds")
    formats: tuple[Callable[[float], str], ...] = (
        "{:,.0f}".format,
        "{:,.0f}".format,
        "{:.1f}".format,
        "{:.3f}".format,
        "{:,.0f}".format,
    )

    def row(defense: MatrixAxis) -> list[str]:
        found = [
            [value for column in view.columns for value in cells.values(defense.label, column.label, name)]
            for name in names
        ]
        known = [[value for value in values if value is not None] for values in found]
        return [
            write(statistics.fmean(values)) if values else UNFINISHED if not every else "-"
            for write, values, every in zip(formats, known, found, strict=True)
        ]

    head = ["transform, s", "images/s", "PSNR, dB", "SSIM", "training of a victim, s"]
    return [
        "### Cost, and likeness to the clean images",
        "",
        "Means over the columns measured; - where no image is transformed or none is changed.",
        "",
        *_table(view, head, row),
        "",
    ]


def _undefended(view: MatrixView, cells: Cells) -> float | None:
    plain = next((defense.label for defense in view.defenses if defense.published == "none"), "none")
    values = cells.values(plain, CLEAN, "test_accuracy")
    return statistics.fmean(values) if values else None


def _difference(reference: float | None, values: Sequence[float]) -> str:
    return UNFINISHED if reference is None or not values else f"{reference - statistics.fmean(values):.1f}"


def _beside(value: float | None) -> str:
    return "" if value is None else f" [{value:.2f}]"


def _table(view: MatrixView, head: Sequence[str], row: Callable[[MatrixAxis], list[str]]) -> Lines:
    lines = [["defense", *head], ["---"] * (len(head) + 1)]
    lines += [[defense.label, *row(defense)] for defense in view.defenses]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
