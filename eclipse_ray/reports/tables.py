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
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout
from eclipse_ray.reports.blocks import Block, Heading, Table, Text
from eclipse_ray.results import MatrixAxis, MatrixView
from eclipse_ray.storage.store import Store

RESULTS, RESULTS_CSV, TABLE = "results.parquet", "results.csv", "table.md"
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
        ("rho", pa.float64()),
        ("device", pa.string()),
        ("fingerprint", pa.string()),
    ]
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
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.write(RESULTS, sink.getvalue().to_pybytes())
    text = io.StringIO()
    writer = csv.DictWriter(text, TIDY.names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(view.rows)
    store.write(RESULTS_CSV, text.getvalue().encode())
    markdown = to_markdown(tables_of(view))
    store.write(TABLE, markdown.encode())
    return markdown


def read_rows(store: Store) -> list[Row]:
    """Return the rows of results.parquet. Raises InputError if it is damaged."""
    rows: list[Row] = _read_table(store).to_pylist()
    return rows


def read_view(store: Store, dataset: str | None) -> MatrixView:
    """Return the view that `write_tables` wrote. Raises InputError if it is damaged.

    Folders of earlier versions may lack a column, which is null then. Or they hold rows only: their axes are the
    labels of the rows, and `dataset` names the paper's dataset, or is None.
    """
    table = _read_table(store)
    rows = [dict.fromkeys(TIDY.names) | row for row in table.to_pylist()]
    axes = (table.schema.metadata or {}).get(AXES)
    if axes is None:
        return _view_of_rows(rows, dataset)
    tree = json.loads(axes)
    for name in ("columns", "defenses", "victims"):
        tree[name] = [MatrixAxis(**axis) for axis in tree[name]]
    return MatrixView(**tree, rows=rows)


def _read_table(store: Store) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(store.read(RESULTS)))
    except layout.DAMAGE as error:
        raise InputError(f"{store.path(RESULTS)}: cannot be read ({error}); run its command again") from error


def _view_of_rows(rows: list[Row], dataset: str | None) -> MatrixView:
    def axis(column: str, details: str = "") -> list[MatrixAxis]:
        found = {row[column]: row.get(details) or "" for row in rows}
        return [MatrixAxis(label, label, words) for label, words in found.items()]

    return MatrixView(
        columns=axis("poison", "budget"),
        defenses=axis("defense"),
        victims=axis("victim"),
        seeds=sorted({row["seed"] for row in rows}),
        dataset=dataset,
        images=max((row["n"] for row in rows), default=0),
        sparse=max((row["sparse"] for row in rows), default=0),
        test_images=max((row["test_images"] for row in rows), default=0),
        rows=rows,
    )


def tables_of(view: MatrixView) -> list[Block]:
    """Return all tables of a matrix, victim by victim, with a legend and the count of unfinished cells."""
    blocks: list[Block] = [Text(line) for line in _legend(view)]
    for victim in view.victims:
        cells = Cells(view, victim)
        training = f"{victim.details}; device" if victim.details else "Device"
        blocks += [Heading(victim.label), Text(f"{training}: {cells.devices()}.")]
        makers = (_accuracy, _clean, _gap, _best, _costs)
        blocks += [table for maker in makers if (table := maker(view, cells))]
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
        """Return the mean over columns for each seed; None if a seed of a column is missing."""
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


def _poisons(view: MatrixView) -> list[MatrixAxis]:
    return [column for column in view.columns if column.label != CLEAN]


def _title(view: MatrixView, column: MatrixAxis) -> str:
    """Return the label of a column; a poison that was fitted with reduced numbers is called so."""
    costs = {row["cost"] for row in view.rows if row["poison"] == column.label}
    reduced = costs == {"reduced"} and column.published not in ONE_COST
    return f"{column.label} (reduced)" if reduced and "reduced" not in column.label else column.label


def _accuracy(view: MatrixView, cells: Cells) -> Table | None:
    poisons = _poisons(view)

    def row(defense: MatrixAxis) -> list[str]:
        texts = [
            cells.text(defense.label, column.label, "test_accuracy") + _beside(cells.paper(defense, [column]))
            for column in poisons
        ]
        labels = [column.label for column in poisons]
        mean = cells.by_seed(defense.label, labels, "test_accuracy")
        return [*texts, spread(mean or []) + _beside(cells.paper(defense, poisons))]

    head = [*(_title(view, column) for column in poisons), "AVG"]
    return _table(view, "Test accuracy", head, row) if poisons else None


def _clean(view: MatrixView, cells: Cells) -> Table | None:
    column = next((column for column in view.columns if column.label == CLEAN), None)
    if column is None:
        return None
    reference = _undefended(view, cells)

    def row(defense: MatrixAxis) -> list[str]:
        text = cells.text(defense.label, CLEAN, "test_accuracy") + _beside(cells.paper(defense, [column]))
        return [text, _difference(reference, cells.values(defense.label, CLEAN, "test_accuracy"))]

    return _table(view, "Clean accuracy", ["clean", "gap to undefended clean"], row)


def _gap(view: MatrixView, cells: Cells) -> Table | None:
    poisons, reference = _poisons(view), _undefended(view, cells)
    if not poisons or reference is None:
        return None

    def row(defense: MatrixAxis) -> list[str]:
        labels = [column.label for column in poisons]
        gaps = [_difference(reference, cells.values(defense.label, label, "test_accuracy")) for label in labels]
        return [*gaps, _difference(reference, cells.by_seed(defense.label, labels, "test_accuracy") or [])]

    head = [*(_title(view, column) for column in poisons), "AVG"]
    return _table(view, f"Gap to undefended clean ({reference:.1f})", head, row)


def _best(view: MatrixView, cells: Cells) -> Table:
    def row(defense: MatrixAxis) -> list[str]:
        return [cells.text(defense.label, column.label, "best_epoch_accuracy") for column in view.columns]

    title = "Best epoch (chosen on the test images, so no result; the last epoch decides)"
    return _table(view, title, [_title(view, column) for column in view.columns], row)


COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "defense_seconds": ("transform, s", "{:,.0f}".format),
    "images_per_second": ("images/s", "{:,.0f}".format),
    "psnr": ("PSNR, dB", "{:.1f}".format),
    "ssim": ("SSIM", "{:.3f}".format),
    "rho": ("poison left, rho", "{:.2f}".format),
    "seconds": ("training of a victim, s", "{:,.0f}".format),
}
"""Column of the rows: its head in the table of costs, and how its mean is written."""


def _costs(view: MatrixView, cells: Cells) -> Table:
    """Return what a defense costs, and how far its training images are from the clean ones."""

    def cell(defense: MatrixAxis, name: str, write: Callable[[float], str]) -> str:
        every = [value for column in view.columns for value in cells.values(defense.label, column.label, name)]
        known = [value for value in every if value is not None]
        return write(statistics.fmean(known)) if known else "-" if every else UNFINISHED

    def row(defense: MatrixAxis) -> list[str]:
        return [cell(defense, name, write) for name, (_, write) in COSTS.items()]

    title = (
        "Cost, and likeness to the clean images: means over the columns measured; a dash where no image is "
        "transformed or changed"
    )
    return _table(view, title, [head for head, _ in COSTS.values()], row)


def _undefended(view: MatrixView, cells: Cells) -> float | None:
    plain = next((defense.label for defense in view.defenses if defense.published == "none"), "none")
    values = cells.values(plain, CLEAN, "test_accuracy")
    return statistics.fmean(values) if values else None


def _difference(reference: float | None, values: Sequence[float]) -> str:
    return UNFINISHED if reference is None or not values else f"{reference - statistics.fmean(values):.1f}"


def _beside(value: float | None) -> str:
    return "" if value is None else f" [{value:.2f}]"


def _table(view: MatrixView, title: str, head: Sequence[str], row: Callable[[MatrixAxis], list[str]]) -> Table:
    return Table(title, ["defense", *head], [[defense.label, *row(defense)] for defense in view.defenses])


# Numbers of the paper (arXiv 2406.15093), tables 1 to 7: test accuracy in per cent. Figure 5 prints none.
# Rows have the names of our defenses where there is one, else a name that an entry of a matrix can ask for with
# `published`.
POISONS = ("em", "tap", "rem", "sep", "efp", "urp", "lsp", "ar", "adp")
AVERAGE = "avg"
CLEAN = "clean"
ONE_COST = ("urp", "lsp", "ar", "cuda", "shift", "mixture", "ops")
"""Poisons that have no reduced numbers."""

Published = dict[str, float]


def _numbers(columns: tuple[str, ...], *values: float) -> Published:
    return dict(zip(columns, values, strict=True))


def _all_rows(columns: tuple[str, ...], table: dict[str, tuple[float, ...]]) -> dict[str, Published]:
    return {name: _numbers(columns, *values) for name, values in table.items()}


_EIGHT = POISONS[:8]
_WITHOUT_SEP = tuple(name for name in POISONS if name != "sep")
_IMAGENET = ("tap", "urp", "ar", CLEAN)

_TABLE_1_RESNET18 = _all_rows(
    (*POISONS, AVERAGE),
    {
        "none": (17.58, 26.16, 27.34, 9.01, 86.64, 16.80, 24.48, 10.59, 25.93, 27.17),
        "cutout": (17.63, 29.16, 22.42, 9.30, 87.76, 84.41, 22.93, 12.92, 21.39, 34.21),
        "mixup": (30.74, 24.36, 29.99, 8.35, 88.76, 17.29, 23.48, 11.46, 31.20, 29.51),
        "cutmix": (29.73, 23.70, 29.42, 6.66, 87.74, 84.24, 20.86, 14.56, 23.14, 35.56),
        "dp-sgd": (18.17, 30.96, 25.92, 8.24, 87.98, 20.49, 22.11, 10.19, 21.51, 27.29),
        "iss-g": (88.42, 21.88, 65.29, 7.57, 86.54, 60.64, 65.89, 38.64, 34.42, 52.14),
        "aa": (85.30, 67.12, 39.73, 24.94, 87.76, 90.81, 87.38, 51.19, 58.22, 65.83),
        "op": (65.42, 45.86, 30.44, 10.01, 82.64, 89.28, 90.14, 33.60, 33.80, 53.47),
        "avatar-sparse": (27.45, 86.63, 35.74, 44.97, 75.90, 86.86, 39.93, 83.98, 67.95, 61.05),
        "at": (68.31, 82.46, 60.80, 63.23, 71.46, 85.63, 81.94, 84.04, 82.76, 75.63),
        "iss-j": (78.35, 80.77, 81.54, 80.93, 70.54, 81.27, 79.55, 81.39, 80.98, 79.48),
        "eclipse": (82.80, 86.13, 82.72, 82.85, 77.20, 86.98, 84.58, 87.32, 82.62, 83.69),
    },
)

_TABLE_1_VGG19 = _all_rows(
    (*_WITHOUT_SEP, AVERAGE),
    {
        "none": (19.90, 27.81, 31.22, 81.83, 16.53, 21.80, 13.94, 24.02, 29.63),
        "cutout": (39.51, 31.69, 22.87, 85.06, 29.20, 25.92, 10.44, 18.38, 32.88),
        "mixup": (22.75, 28.38, 33.30, 82.49, 16.32, 24.59, 14.47, 37.14, 32.43),
        "cutmix": (29.85, 25.09, 30.26, 81.71, 10.14, 25.27, 15.71, 24.16, 30.27),
        "dp-sgd": (20.45, 27.09, 24.52, 84.23, 30.77, 25.73, 14.33, 27.66, 31.85),
        "iss-g": (86.47, 27.57, 71.16, 83.23, 60.84, 80.91, 39.60, 41.60, 61.42),
        "aa": (78.99, 56.81, 10.00, 78.71, 82.73, 9.99, 25.32, 24.35, 45.86),
        "op": (79.79, 54.09, 31.88, 78.65, 87.14, 87.43, 13.64, 29.47, 57.76),
        "avatar-sparse": (34.92, 83.63, 39.41, 74.57, 84.08, 53.96, 83.49, 65.22, 64.91),
        "at": (64.31, 81.33, 63.28, 66.63, 83.22, 79.15, 80.69, 80.58, 74.90),
        "iss-j": (78.69, 80.93, 79.16, 68.75, 80.74, 78.49, 81.56, 78.46, 78.35),
        "eclipse": (80.73, 84.83, 79.90, 75.87, 85.86, 83.48, 85.84, 80.11, 82.08),
    },
)

_TABLE_2 = {
    "resnet18": _all_rows(
        (*_IMAGENET, AVERAGE),
        {
            "none": (40.8, 51.3, 25.7, 72.1, 47.5),
            "iss-g": (28.5, 27.8, 19.5, 56.9, 33.2),
            "avatar-sparse": (52.3, 65.3, 54.0, 72.3, 61.0),
            "at": (58.2, 61.9, 47.3, 66.8, 58.5),
            "iss-j": (61.2, 60.8, 59.4, 66.2, 61.9),
            "eclipse": (61.9, 60.4, 58.9, 67.0, 62.1),
        },
    ),
    "densenet121": _all_rows(
        (*_IMAGENET, AVERAGE),
        {
            "none": (46.2, 69.5, 22.4, 77.8, 54.0),
            "iss-g": (31.2, 40.5, 23.7, 62.7, 39.5),
            "avatar-sparse": (57.0, 68.1, 48.9, 73.1, 61.8),
            "at": (61.8, 63.1, 41.9, 71.9, 59.7),
            "iss-j": (61.6, 60.8, 62.0, 68.6, 63.3),
            "eclipse": (60.9, 63.4, 59.4, 72.7, 64.1),
        },
    ),
}

_VICTIMS = ("resnet18", "resnet50", "vgg16", "vgg19", "densenet121")
_TABLE_3 = _all_rows(
    (*_VICTIMS, AVERAGE),
    {
        "none": (94.95, 94.53, 93.27, 93.04, 93.91, 93.94),
        "at": (89.57, 89.88, 88.04, 86.93, 89.11, 88.71),
        "iss-j": (85.23, 85.85, 84.42, 84.26, 85.08, 84.97),
        "eclipse": (90.43, 90.17, 88.38, 88.58, 89.35, 89.38),
    },
)

_TABLE_4 = {
    "eclipse-abc": (82.80, 86.13, 82.72, 82.85, 77.20, 86.98, 84.58, 87.32, 83.82),
    "eclipse-ab": (73.22, 86.31, 67.48, 41.30, 77.58, 85.59, 81.58, 84.22, 74.66),
    "eclipse-ac": (61.30, 86.94, 77.33, 84.07, 76.72, 87.52, 68.70, 87.59, 78.77),
    "eclipse-bc": (78.82, 83.32, 75.51, 14.66, 81.62, 88.87, 80.08, 60.96, 70.48),
    "eclipse-a": (27.45, 86.63, 35.74, 44.97, 75.90, 86.86, 39.93, 83.98, 60.18),
    "eclipse-b": (78.69, 30.95, 67.05, 7.53, 86.14, 58.70, 68.19, 37.63, 54.36),
    "eclipse-c": (20.43, 84.90, 28.83, 11.93, 79.06, 89.54, 27.11, 33.14, 46.87),
}
_TABLE_5 = {
    "replication 0": (78.30, 86.59, 81.56, 77.97, 78.60, 87.52, 83.53, 87.56, 82.70),
    "replication 2": (79.72, 86.88, 82.05, 81.29, 78.02, 86.77, 84.50, 86.98, 83.28),
    "replication 4": (82.80, 86.13, 82.72, 82.85, 77.20, 86.98, 84.58, 87.32, 83.82),
    "replication 6": (80.75, 86.79, 82.68, 82.71, 78.41, 86.52, 83.88, 87.05, 83.60),
}
_TABLE_6 = {
    "sparse 2 %": (80.25, 84.28, 82.45, 82.39, 73.72, 84.70, 82.04, 85.08, 81.86),
    "sparse 4 %": (82.80, 86.13, 82.72, 82.85, 77.20, 86.98, 84.58, 87.32, 83.82),
    "sparse 6 %": (80.07, 87.05, 79.61, 78.51, 79.82, 87.54, 84.77, 88.25, 83.20),
    "sparse 8 %": (78.13, 86.75, 77.65, 65.51, 80.39, 88.26, 81.82, 87.48, 80.75),
}
_TABLE_7 = {
    "t_star 50": (77.23, 87.66, 78.20, 55.07, 81.33, 88.43, 81.97, 88.27, 79.77),
    "t_star 100": (82.80, 86.13, 82.72, 82.85, 77.20, 86.98, 84.58, 87.32, 83.82),
    "t_star 150": (80.91, 84.30, 82.56, 83.99, 74.23, 83.25, 79.46, 84.37, 81.63),
}
_SWEEPS = _all_rows((*_EIGHT, AVERAGE), {**_TABLE_4, **_TABLE_5, **_TABLE_6, **_TABLE_7})

TABLES: dict[str, dict[str, dict[str, Published]]] = {
    "cifar10": {"resnet18": {**_TABLE_1_RESNET18, **_SWEEPS}, "vgg19": _TABLE_1_VGG19},
    "imagenet": _TABLE_2,
}
"""Dataset, victim, row, column: test accuracy. `avg` is over the columns of its own table, as printed."""

CLEAN_ACCURACY: dict[str, Published] = _TABLE_3
"""Row, victim: accuracy on CIFAR-10 when the training set is clean (table 3)."""

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
        return CLEAN_ACCURACY.get(row, {}).get(victim if victim in _VICTIMS else REFERENCE_VICTIM)
    rows = TABLES[dataset]
    return rows.get(victim, rows[REFERENCE_VICTIM]).get(row, {}).get(column)
