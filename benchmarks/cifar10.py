"""Real CIFAR-10, end to end: 10,000 poisoned images, a sparse set of 2,000 and one of 500, 5,000 test images.

    python benchmarks/cifar10.py --data ../shared/data/cifar10 --work runs/cifar10

Everything goes through the public API, so each step resumes. Prints the table of docs/results.md and writes
results.json with every accuracy. About two hours on 2 cores. `--steps prepare,train,purify,evaluate` runs a part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from common import SHALLOW

from eclipse_ray import verbs
from eclipse_ray.cluster.connect import connect
from eclipse_ray.config import Settings, load_config
from eclipse_ray.diffusion.checkpoint import read_card
from eclipse_ray.results import EvaluateResult

STEPS = ("prepare", "train", "purify", "evaluate")
TRAIN_IMAGES, TEST_IMAGES = 10_000, 5_000
SPARSE = (2000, 500)
POISONS = ("ar", "lsp", "urp")
SEEDS = 3
NO_COMPENSATION: Settings = {"evaluate.compensation": "none"}
COMPENSATION: Settings = {"evaluate.compensation": "augment"}
PUBLISHED: Settings = {"evaluate.compensation": "augment", "compensation.coarse_sigma": 0}


def rows(work: Path) -> list[tuple[str, str, str, Settings]]:
    """Return (defense, column, training set, settings) of every cell of the table."""
    train = {"clean": work / "sets/rest", **{name: work / name for name in POISONS}}
    cells = [("none", column, str(train[column]), NO_COMPENSATION) for column in ("clean", "ar", "lsp")]
    for sparse, column in product(SPARSE, ("ar", "lsp", "clean")):
        purified = str(work / f"purified-{sparse}-{column}")
        cells.append((f"ECLIPSE, {sparse:,} sparse", column, purified, COMPENSATION))
    for column in ("ar", "lsp"):
        purified = str(work / f"purified-{SPARSE[0]}-{column}")
        cells.append((f"published compensation, {SPARSE[0]:,} sparse", column, purified, PUBLISHED))
        cells.append((f"diffusion alone, {SPARSE[0]:,} sparse", column, purified, NO_COMPENSATION))
        cells.append(("compensation alone", column, str(train[column]), COMPENSATION))
    cells.append(("none", "urp", str(train["urp"]), NO_COMPENSATION))
    return cells


def prepare(data: str, work: Path) -> None:
    """Choose disjoint sparse, training and test sets, stratified by label, and poison the training set."""
    if not (work / "pool").exists():
        verbs.split(f"{data}/train-*.parquet", clean=TRAIN_IMAGES + SPARSE[0], out=str(work / "pool"))
    if not (work / "sets").exists():
        verbs.split(str(work / "pool/clean"), clean=SPARSE[0], out=str(work / "sets"))
    if not (work / "fewer").exists():
        verbs.split(str(work / "sets/clean"), clean=SPARSE[1], out=str(work / "fewer"))
    if not (work / "test").exists():
        verbs.split(f"{data}/test-*.parquet", clean=TEST_IMAGES, out=str(work / "test"))
    for name in POISONS:
        if not (work / name).exists():
            verbs.poison(name, str(work / "sets/rest"), str(work / name))


def train(work: Path) -> None:
    """Fit one denoiser on each sparse set."""
    for sparse, clean in zip(SPARSE, ("sets/clean", "fewer/clean"), strict=True):
        found = verbs.train(clean=str(work / clean), out=str(work / f"denoiser-{sparse}"), settings=SHALLOW)
        print(found, flush=True)


def purify(work: Path) -> None:
    """Purify the poisoned sets and the clean one with each denoiser."""
    sources = {"clean": work / "sets/rest", "ar": work / "ar", "lsp": work / "lsp"}
    for sparse in SPARSE:
        for column, source in sources.items():
            output = str(work / f"purified-{sparse}-{column}")
            print(verbs.purify(str(source), output, denoiser=str(work / f"denoiser-{sparse}")), flush=True)


def evaluate(work: Path) -> list[dict[str, object]]:
    """Train SEEDS victims for every cell; finished cells are kept in results.json."""
    file = work / "results.json"
    cells: list[dict[str, object]] = json.loads(file.read_text()) if file.exists() else []
    known = {(cell["defense"], cell["column"]) for cell in cells}
    connect(load_config())

    def one(row: tuple[str, str, str, Settings]) -> dict[str, object]:
        defense, column, source, compensation = row
        settings = {**compensation, "evaluate.seeds": SEEDS}
        result = verbs.evaluate(
            source, test=str(work / "test/clean"), clean=str(work / "sets/clean"), settings=settings
        )
        assert isinstance(result, EvaluateResult)
        print(f"{defense}, {column}: {result.test_accuracy} ± {result.test_accuracy_std}", flush=True)
        return {"defense": defense, "column": column, **vars(result)}

    # Two cells at a time, so that no core idles while the odd seed of a cell is trained.
    with ThreadPoolExecutor(2) as pool:
        for cell in pool.map(one, [row for row in rows(work) if row[:2] not in known]):
            cells.append(cell)
            file.write_text(json.dumps(cells, indent=1))
    return cells


def table(work: Path, cells: list[dict[str, object]]) -> str:
    """Return the results as Markdown: mean ± standard deviation of test accuracy over seeds, last epoch."""
    columns = ("clean", "ar", "lsp", "urp")
    found = {(cell["defense"], cell["column"]): cell for cell in cells}
    first = cells[0]
    lines = [
        f"{TRAIN_IMAGES:,} training images, {TEST_IMAGES:,} test images; victim {first['victim']}, "
        f"{first['epochs']} epochs, last epoch, n = {first['seeds']} seeds; CPU: {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "| defense | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for defense in dict.fromkeys(cell["defense"] for cell in cells):
        values = [found.get((defense, column)) for column in columns]
        texts = [f"{v['test_accuracy']:.1f} ± {v['test_accuracy_std']:.1f}" if v else "" for v in values]
        lines.append(f"| {defense} | " + " | ".join(texts) + " |")
    lines.append("")
    for sparse in SPARSE:
        card = read_card(work / f"denoiser-{sparse}")
        lines.append(
            f"Denoiser on {sparse:,} images (B/N = {100 * sparse / TRAIN_IMAGES:.0f} %): {card.iterations:,} "
            f"iterations, held-out {card.denoise_psnr:.2f} dB at t_star = {card.t_star} "
            f"(noised {card.noisy_psnr:.2f} dB), {card.num_inference_steps} step(s)."
        )
    return "\n".join(lines)


def main() -> None:
    """Run the chosen steps and print the table when all cells are measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("ECLIPSE_RAY_DATA", "../shared/data") + "/cifar10")
    parser.add_argument("--work", default="runs/cifar10", type=Path)
    parser.add_argument("--steps", default=",".join(STEPS))
    options = parser.parse_args()
    steps = options.steps.split(",")
    if "prepare" in steps:
        prepare(options.data, options.work)
    if "train" in steps:
        train(options.work)
    if "purify" in steps:
        purify(options.work)
    if "evaluate" in steps:
        print(table(options.work, evaluate(options.work)))


if __name__ == "__main__":
    main()
