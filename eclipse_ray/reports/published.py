"""Numbers of the paper (arXiv 2406.15093), tables 1 to 7: test accuracy in per cent. Figure 5 prints none.

Rows have the names of our defenses where there is one, else a name that a matrix entry can ask for (`published`).
"""

from __future__ import annotations

POISONS = ("em", "tap", "rem", "sep", "efp", "urp", "lsp", "ar", "adp")
AVERAGE = "avg"
CLEAN = "clean"

Row = dict[str, float]


def _row(columns: tuple[str, ...], *values: float) -> Row:
    return dict(zip(columns, values, strict=True))


def _rows(columns: tuple[str, ...], table: dict[str, tuple[float, ...]]) -> dict[str, Row]:
    return {name: _row(columns, *values) for name, values in table.items()}


_EIGHT = POISONS[:8]
_WITHOUT_SEP = tuple(name for name in POISONS if name != "sep")
_IMAGENET = ("tap", "urp", "ar", CLEAN)

_TABLE_1_RESNET18 = _rows(
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

_TABLE_1_VGG19 = _rows(
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
    "resnet18": _rows(
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
    "densenet121": _rows(
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
_TABLE_3 = _rows(
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
_SWEEPS = _rows((*_EIGHT, AVERAGE), {**_TABLE_4, **_TABLE_5, **_TABLE_6, **_TABLE_7})

TABLES: dict[str, dict[str, dict[str, Row]]] = {
    "cifar10": {"resnet18": {**_TABLE_1_RESNET18, **_SWEEPS}, "vgg19": _TABLE_1_VGG19},
    "imagenet": _TABLE_2,
}
"""Dataset, victim, row, column: test accuracy. `avg` is over that table's own columns, as printed there."""

CLEAN_ACCURACY: dict[str, Row] = _TABLE_3
"""Row, victim: accuracy on CIFAR-10 when the training set is clean (table 3)."""

REFERENCE_VICTIM = "resnet18"

# Rows of ours that answer to the paper's under another name. "avatar" is none: the paper ran module A in its name.
SAME_ROW = {"eclipse-published": "eclipse", "eclipse-augment": "eclipse", "eclipse-baked": "eclipse"}


def published(dataset: str | None, victim: str, row: str, column: str) -> float | None:
    """Return the paper's accuracy for a cell, or None where it has none.

    A victim that the paper does not have is compared with its ResNet-18. `column` is a poison or "clean".
    """
    if dataset is None:
        return None
    row = SAME_ROW.get(row, row)
    if dataset == "cifar10" and column == CLEAN:
        return CLEAN_ACCURACY.get(row, {}).get(victim if victim in _VICTIMS else REFERENCE_VICTIM)
    rows = TABLES[dataset]
    return rows.get(victim, rows[REFERENCE_VICTIM]).get(row, {}).get(column)
