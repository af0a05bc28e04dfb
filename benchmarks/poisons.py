"""Does an undefended victim fall to a poison? Without Ray: fit, perturb, train one victim a poison, test it.

    python benchmarks/poisons.py --work runs/cifar10 [--poisons clean em tap] [--limit 3000] [--set poison.steps=8]

WORK is what `benchmarks/cifar10.py --steps prepare` wrote. Prints a row a poison as soon as it is measured: what
the poison cost, how far it moved a pixel, and test accuracy after the last and the best epoch.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from common import load, machine, markdown

from eclipse_ray.config import Config, load_config, parse_assignment
from eclipse_ray.datasets.memory import ImageSet
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.poisons import LabelledImages, Session, poison_together
from eclipse_ray.victims.training import train_victim

HEAD = ["poison", "poison, s", "mean change, /255", "victim, s", "last epoch, %", "best epoch, %"]


def poisoned(name: str, images: LabelledImages, config: Config) -> torch.Tensor:
    """Return the images under a poison, uint8 (N, H, W, 3); "clean" changes nothing."""
    if name == "clean":
        return images.images

    def report(done: int, total: int, note: str) -> None:
        print(f"{name}: {done}/{total} {note}", file=sys.stderr, flush=True)

    session = Session(default_device(), report, lambda: None, lambda _state: None)
    return poison_together(images, config.poison, config.run.seed, session)


def row(name: str, train: ImageSet, test: ImageSet, config: Config) -> list[str]:
    """Poison, train, test; return the cells of HEAD."""
    assert train.labels is not None
    assert test.labels is not None
    clean, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    began = time.perf_counter()
    stored = poisoned(name, LabelledImages(clean, labels, train.ids, int(labels.max()) + 1), config)
    made = time.perf_counter()
    run = train_victim(
        stored, labels, test.images, test.labels, config.victim, None, config.run.seed, default_device()
    )
    moved = (stored.int() - clean.int()).abs().float().mean()
    accuracy, seconds = run.test_accuracy, (made - began, time.perf_counter() - made)
    cells = [
        f"{seconds[0]:.0f}",
        f"{moved:.2f}",
        f"{seconds[1]:.0f}",
        f"{accuracy[-1]:.1f}",
        f"{max(accuracy):.1f}",
    ]
    return [name, *cells]


def main() -> None:
    """Measure the poisons asked for and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--poisons", nargs="+", default=["clean", "em", "tap", "rem", "sep", "efp"])
    parser.add_argument("--limit", default=3000, type=int, help="training images")
    parser.add_argument("--test-limit", default=1000, type=int)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    chosen = dict(parse_assignment(text) for text in options.set)
    settings = {"poison.cost": "reduced", "victim.epochs": 20, **chosen}
    train, test = (
        load(options.work, "sets/rest", options.limit),
        load(options.work, "test/clean", options.test_limit),
    )
    print(f"{options.limit:,} training images, {options.test_limit:,} test images, n = 1; {machine()}\n")
    print(markdown(HEAD, []), flush=True)
    for name in options.poisons:
        own = {} if name == "clean" else {"poison.name": name}
        print(f"| {' | '.join(row(name, train, test, load_config(None, settings | own)))} |", flush=True)


if __name__ == "__main__":
    main()
