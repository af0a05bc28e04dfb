"""What a matrix has found so far, as tidy rows for tables, and about how long the rest will take."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from typing import Any

import torch

from eclipse_ray.cluster.connect import Resources
from eclipse_ray.experiments.grid import Cell, Column, Entry, Row, Victim
from eclipse_ray.experiments.matrix import Matrix, share
from eclipse_ray.poisons import budget, variant_of
from eclipse_ray.results import MatrixAxis, MatrixPlan, MatrixView

Result = dict[str, Any]


def view(matrix: Matrix) -> MatrixView:
    """Return the axes of the matrix, and a tidy row for every cell that is measured."""
    grid, sets = matrix.grid, matrix.sets
    results = read_results(matrix)
    axes: list[list[str]] = [
        [one.entry.label for one in grid.victims],
        [one.entry.label for one in grid.rows],
        [one.entry.label for one in grid.columns],
    ]
    victims, defenses, columns = ({label: place for place, label in enumerate(labels)} for labels in axes)
    ordered = sorted(
        grid.cells,
        key=lambda cell: (
            victims[cell.victim.entry.label],
            defenses[cell.row.entry.label],
            columns[cell.column.entry.label],
            cell.seed,
        ),
    )
    return MatrixView(
        columns=[_axis(column.entry, bound(matrix, column)) for column in grid.columns],
        defenses=[_axis(row.entry, _sparse_words(matrix, row)) for row in grid.rows],
        victims=[MatrixAxis(one.entry.label, one.config.arch, _training(one)) for one in grid.victims],
        seeds=grid.seeds,
        dataset=matrix.config.matrix.published,
        images=len(sets.source.ids),
        sparse=_sparse_count(matrix, None),
        test_images=len(sets.test.ids),
        rows=[_tidy(matrix, cell, results[cell.key]) for cell in ordered if cell.key in results],
    )


def read_results(matrix: Matrix) -> dict[str, Result]:
    """Return what was measured, by key, for the cells of this grid."""
    done = matrix.done()
    for key in {cell.key for cell in matrix.grid.cells if cell.key in done} - matrix.results.keys():
        # A result never changes.
        matrix.results[key] = json.loads(matrix.store.read(f"results/{key}.json"))
    return matrix.results


def plan(matrix: Matrix) -> MatrixPlan:
    """Return which cells a run would measure, and how long it would take where the like was measured before.

    Trainings are judged by those of the same defense and victim, else of the same victim; poisons and transforms
    by those of the same name. Everything is scaled by epochs and images.
    """
    missing = matrix.missing()
    done = matrix.done()
    _, concurrent, _ = share(matrix.config, _this_machine())
    training = _training_times(matrix)
    seconds, unknown = 0.0, set()
    for cell in missing:
        scale = cell.victim.config.epochs * len(matrix.sets.source.ids)
        pace = training.get((cell.row.entry.name, cell.victim.config.arch)) or training.get(
            ("", cell.victim.config.arch)
        )
        if pace is None:
            unknown.add(f"training {cell.victim.entry.label}")
        else:
            seconds += pace * scale / concurrent
    for name, count, pace in _materials(matrix, missing):
        if pace is None:
            unknown.add(name)
        else:
            seconds += pace * count
    return MatrixPlan(
        cells=len(matrix.grid.cells),
        done=sum(cell.key in done for cell in matrix.grid.cells),
        missing=[cell.title for cell in missing],
        seconds_left=round(seconds, 1),
        unknown=sorted(unknown),
        output=matrix.store.url,
    )


def _training_times(matrix: Matrix) -> dict[tuple[str, str], float]:
    """Return the mean seconds of an image and epoch by (defense, victim) and by ("", victim)."""
    found: dict[tuple[str, str], list[float]] = {}
    results = read_results(matrix)
    for cell in matrix.grid.cells:
        if cell.key in results:
            result, arch = results[cell.key], cell.victim.config.arch
            pace = result["seconds"] / (len(result["test_accuracy"]) * result["images"])
            for key in ((cell.row.entry.name, arch), ("", arch)):
                found.setdefault(key, []).append(pace)
    return {key: statistics.fmean(values) for key, values in found.items()}


def _materials(matrix: Matrix, missing: list[Cell]) -> Iterable[tuple[str, int, float | None]]:
    """Yield (what, images, seconds an image or None) for every poison and transformed set still to be made."""
    images, cache = len(matrix.sets.source.ids), matrix.cache
    paces = {kind: _paces(matrix, kind) for kind in ("poisons", "defended")}
    columns = {cell.column.key: cell.column for cell in missing if cell.column.config is not None}
    for key, column in columns.items():
        if cache.note("poisons", key) is None:
            yield f"poison {column.entry.label}", images, paces["poisons"].get(column.entry.name)
    sets = {cell.training: cell.row for cell in missing if cell.training != cell.column.key}
    for key, row in sets.items():
        if cache.note("defended", key) is None:
            yield f"images under {row.entry.label}", images, paces["defended"].get(row.entry.name)
    for key, row in {row.denoiser: row for row in matrix.grid.rows if row.denoiser}.items():
        if not row.config.purify.denoiser and cache.note("denoisers", key) is None:
            yield f"denoiser of {row.entry.label}", images, None


def _paces(matrix: Matrix, kind: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for entry in matrix.store.list(f"cache/{kind}"):
        if entry.key.endswith(".json") and entry.key.count("/") == 2:
            note = json.loads(matrix.store.read(entry.key))
            found.setdefault(note["name"], []).append(note["seconds"] / note["images"])
    return {name: statistics.fmean(values) for name, values in found.items()}


def _this_machine() -> Resources:
    cores = os.cpu_count() or 1
    return Resources(cpus=2 * cores, gpus=torch.cuda.device_count(), cores=cores, local=True)


def _tidy(matrix: Matrix, cell: Cell, result: Result) -> Result:
    accuracy = result["test_accuracy"]
    poison = cell.column.config.poison if cell.column.config else None
    sparse = _sparse_count(matrix, cell.row)
    images = result["images"]
    transformed = cell.training != cell.column.key
    made = matrix.cache.note("defended", cell.training) if transformed else None
    looks = made or matrix.cache.note("quality", cell.column.key) or {}
    fitted = matrix.cache.note("poisons", cell.column.key) or {}
    return {
        "poison": cell.column.entry.label,
        "variant": variant_of(poison) if poison else "",
        "budget": bound(matrix, cell.column),
        "cost": poison.cost if poison else "",
        "poison_seconds": fitted.get("seconds"),
        "defense": cell.row.entry.label,
        "victim": cell.victim.entry.label,
        "recipe": cell.victim.config.recipe,
        "epochs": cell.victim.config.epochs,
        "seed": cell.seed,
        "n": images,
        "sparse": sparse,
        "b_over_n": 100 * sparse / images,
        "test_images": len(matrix.sets.test.ids),
        "test_accuracy": accuracy[-1],
        "best_epoch_accuracy": max(accuracy),
        "best_epoch": 1 + accuracy.index(max(accuracy)),
        "seconds": result["seconds"],
        "defense_seconds": (made or {}).get("seconds"),
        "images_per_second": (made or {}).get("images_per_second"),
        "psnr": looks.get("psnr"),
        "ssim": looks.get("ssim"),
        "device": result["device"],
        "fingerprint": cell.key,
    }


def bound(matrix: Matrix, column: Column) -> str:
    """Return the norm bound of a column in words, such as "L-inf 8/255" or "L2 1.00"."""
    if column.config is None:
        return ""
    norm, limit = budget(column.config.poison, matrix.sets.source.images.shape[1:])
    if norm == "linf":
        return f"L-inf {255 * limit:g}/255"
    return f"L2 {limit:.3f}" if norm == "l2" else "no norm bound"


def _sparse_count(matrix: Matrix, row: Row | None) -> int:
    if matrix.sets.sparse is None:
        return 0
    config = row.config if row else matrix.config
    return config.matrix.sparse_limit or len(matrix.sets.sparse.ids)


def _sparse_words(matrix: Matrix, row: Row) -> str:
    own = _sparse_count(matrix, row)
    return "" if own == _sparse_count(matrix, None) else f"{own:,} sparse images"


def _training(victim: Victim) -> str:
    config = victim.config
    return f"Victim {config.arch}, recipe {config.recipe}, {config.epochs} epochs"


def _axis(entry: Entry, details: str) -> MatrixAxis:
    return MatrixAxis(entry.label, entry.published, details)
