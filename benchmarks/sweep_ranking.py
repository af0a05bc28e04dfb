"""Does the score of `eclipse-ray sweep`, which sees no test label, rank settings as test accuracy does?

    python benchmarks/cifar10.py --data ../shared/data/cifar10 --work runs/cifar10 --steps prepare
    python benchmarks/sweep_ranking.py --work runs/cifar10 --out runs/sweep-ranking

For each poison the same settings are swept (proxy_accuracy, PSNR) and measured by the matrix: true test accuracy,
`--seeds` victims of all `--limit` images. Prints Spearman's rank correlation of each number with the truth, and
what choosing by it costs. Half of the 500 sparse images train the denoiser, the other half score:
B/N is 5 % of 10,000, both halves counted. Both parts resume: run the same command again. A tiny form for a look:

    python benchmarks/sweep_ranking.py --work runs/cifar10 --out runs/tiny --poisons ar --settings 3 --limit 500 \
        --epochs 2 --iterations 100
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import SHALLOW, machine, markdown

from eclipse_ray import verbs
from eclipse_ray.config import Settings, load_config
from eclipse_ray.experiments.experiment import open_matrix
from eclipse_ray.experiments.recipe import Facts
from eclipse_ray.experiments.search import Point, choose_trials

T_MAX = 500
SPACE: dict[str, list[Any]] = {
    "purify.t_star": [25, 100, 400],
    "purify.num_inference_steps": [1, 4],
    "compensation.p": [0.0, 0.4],
    "compensation.sigma": [0.0, 0.1],
}
OBJECTIVES = ("proxy_accuracy", "score", "psnr", "removed")
"""`score` is proxy_accuracy with its bonus for fidelity; `psnr` is what fidelity alone would choose.

`removed` is 1 - rho, the part of the poison's perturbation that purification removes. It needs no victim, and the
clean images, so it orders settings for research and not for a user.
"""
SIGNIFICANT = 1.645
"""One-sided 5 % of a normal deviate: rank correlations below this over sqrt(n - 1) may be chance."""


def chosen_points(settings: int) -> list[Point]:
    """Return the settings to compare, the same for every poison: all of SPACE, or a sample of it."""
    config = load_config(None, {"sweep.space": SPACE, "sweep.trials": settings, "denoiser.t_max": T_MAX})
    return [trial.point for trial in choose_trials(config, dict(SPACE), Facts("", "", {None: ""}))]


def prepare(options: argparse.Namespace) -> str:
    """Divide the sparse set and train the denoiser on one half; return its folder."""
    parts, denoiser = options.out / "sparse", str(options.out / "denoiser")
    sparse = options.work / "fewer/clean"
    if not parts.exists():
        count = load_count(str(sparse))
        verbs.split(str(sparse), clean=count // 2, out=str(parts))
    settings: dict[str, Any] = {**SHALLOW, "denoiser.t_max": T_MAX}
    if options.iterations:
        settings["denoiser.iterations"] = options.iterations
    print(verbs.train(clean=str(parts / "clean"), out=denoiser, settings=settings), flush=True)
    return denoiser


def load_count(url: str) -> int:
    """Return the number of images of a dataset."""
    from eclipse_ray.datasets.formats import open_source

    return int(open_source(url, load_config().data).images)


def matrix_settings(options: argparse.Namespace, denoiser: str, points: list[Point]) -> Settings:
    """Return the settings that measure the truth: every poison under every setting."""
    return {
        "data.source": str(options.work / "sets/rest"),
        "data.test": str(options.work / "test/clean"),
        "data.output": str(options.out / "truth"),
        "purify.denoiser": denoiser,
        "poison.cost": "reduced",
        "evaluate.seeds": options.seeds,
        "victim.epochs": options.epochs,
        "matrix.limit": options.limit,
        "matrix.test_limit": options.test_limit,
        "matrix.poisons": options.poisons.split(","),
        "matrix.defenses": [{"name": "eclipse", "label": json.dumps(point), **point} for point in points],
    }


def truth(options: argparse.Namespace, settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Return {poison: {point: mean test accuracy and the part removed}}, measured by the matrix."""
    print(verbs.evaluate(settings=settings), flush=True)
    rows = pq.read_table(options.out / "truth/results.parquet").to_pylist()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["poison"], {}).setdefault(row["defense"], []).append(row)
    return {
        poison: {
            label: {
                "test_accuracy": statistics.fmean(row["test_accuracy"] for row in seeds),
                "removed": 1 - seeds[0]["rho"],
            }
            for label, seeds in labels.items()
        }
        for poison, labels in found.items()
    }


def swept(options: argparse.Namespace, poison: str, source: str, denoiser: str) -> list[dict[str, Any]]:
    """Return the rows of the sweep over one poisoned set."""
    out = options.out / f"sweep-{poison}"
    result = verbs.sweep(
        source,
        clean=str(options.work / "fewer/clean"),
        denoiser=denoiser,
        out=str(out),
        settings={
            "sweep.space": SPACE,
            "sweep.trials": options.settings,
            "sweep.images": options.images,
            "sweep.seeds": options.proxy_seeds,
            "victim.epochs": options.epochs,
        },
    )
    print(result, flush=True)
    rows: list[dict[str, Any]] = pq.read_table(out / "results.parquet").to_pylist()
    return rows


def ranking(poison: str, rows: list[dict[str, Any]], known: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return, for each objective, its rank correlation with the truth and what choosing by it gives."""
    both = [(row, known[row["point"]]) for row in rows if row["point"] in known]
    pairs = [({**row, **true}, true["test_accuracy"]) for row, true in both]
    best = max(value for _, value in pairs)
    found = []
    for objective in OBJECTIVES:
        values = [row[objective] for row, _ in pairs]
        top = max(values)
        # Of equal values a user gets any: their mean.
        got = statistics.fmean([value for one, (_, value) in zip(values, pairs, strict=True) if one == top])
        rho = spearman(values, [value for _, value in pairs])
        ranks = rho is not None and len(pairs) > 2 and rho > SIGNIFICANT / math.sqrt(len(pairs) - 1)
        found.append(
            {
                "poison": poison,
                "objective": objective,
                "settings": len(pairs),
                "spearman": rho,
                "ranks": ranks,
                "chosen": got,
                "best": best,
                "mean": statistics.fmean([value for _, value in pairs]),
            }
        )
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, equal values sharing their mean rank; None if a side is constant."""
    ranks = [[np.mean(np.flatnonzero(np.sort(side) == value)) for value in side] for side in (first, second)]
    if min(map(np.ptp, ranks)) == 0:
        return None
    return float(np.corrcoef(ranks)[0, 1])


def table(rankings: list[dict[str, Any]]) -> str:
    """Return the rankings as Markdown; an objective that does not rank is said not to."""
    head = ["poison", "objective", "n", "Spearman", "ranks", "chosen by it", "best", "mean of all"]
    return markdown(
        head,
        [
            [
                one["poison"],
                one["objective"],
                str(one["settings"]),
                "constant" if one["spearman"] is None else f"{one['spearman']:.2f}",
                "yes" if one["ranks"] else "no",
                *(f"{one[key]:.1f}" for key in ("chosen", "best", "mean")),
            ]
            for one in rankings
        ],
    )


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="runs/cifar10", type=Path, help="what cifar10.py --steps prepare wrote")
    parser.add_argument("--out", default="runs/sweep-ranking", type=Path)
    parser.add_argument("--poisons", default="ar,lsp,urp,em")
    parser.add_argument("--settings", default=24, type=int, help="settings compared, of 24 in all")
    parser.add_argument("--limit", default=10_000, type=int, help="training images of the truth")
    parser.add_argument("--test-limit", type=int, help="test images of the truth; default: all")
    parser.add_argument("--images", default=2000, type=int, help="images of a trial of the sweep")
    parser.add_argument("--seeds", default=2, type=int, help="victims for each true accuracy")
    parser.add_argument("--proxy-seeds", default=1, type=int)
    parser.add_argument("--epochs", default=12, type=int)
    parser.add_argument("--iterations", type=int, help="of the denoiser; default: as configured")
    options = parser.parse_args()
    denoiser = prepare(options)
    settings = matrix_settings(options, denoiser, chosen_points(options.settings))
    accuracy = truth(options, settings)
    matrix = open_matrix(load_config(None, settings))
    rankings = []
    for column in matrix.grid.columns:
        source, poison = matrix.cache.url("poisons", column.key), column.entry.label
        rankings += ranking(poison, swept(options, poison, source, denoiser), accuracy[poison])
        (options.out / "ranking.json").write_text(json.dumps(rankings, indent=1))
    print(
        f"\n{options.limit:,} training images, {options.epochs} epochs, n = {options.seeds} victims for each true "
        f"accuracy; {options.images:,} images and {options.proxy_seeds} victim for each proxy. {machine()}\n"
    )
    print(table(rankings))


if __name__ == "__main__":
    main()
