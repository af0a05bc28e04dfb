"""Clean accuracy of victims on the whole of CIFAR-10, without Ray: does a recipe reach what is published for it?

    python benchmarks/victims.py --data ../shared/data/cifar10 [--recipe modern] [--arch resnet18] [--seeds 1]

DATA is a folder or fsspec URL with train-*.parquet and test-*.parquet. Prints a line an epoch on standard error
and a table row for each seed. A GPU is used if there is one. On a CPU, try `--limit 2000 --set victim.epochs=1`.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from common import machine, markdown

from eclipse_ray.config import VictimConfig, load_config, parse_assignment
from eclipse_ray.datasets.memory import ImageSet, load_images
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.victims.training import train_victim


def row(config: VictimConfig, train: ImageSet, test: ImageSet, seed: int) -> list[str]:
    """Train one victim; return its network, recipe, epochs, seed, last and best accuracy, seconds and images/s."""
    device = default_device()
    start = time.perf_counter()

    def on_epoch(epoch: int, accuracy: float, loss: float) -> None:
        seconds = time.perf_counter() - start
        text = f"seed {seed} epoch {epoch}: accuracy {accuracy:.2f} %, loss {loss:.4f}, {seconds:.1f} s"
        print(text, file=sys.stderr, flush=True)

    assert train.labels is not None
    assert test.labels is not None
    run = train_victim(train.images, train.labels, test.images, test.labels, config, None, seed, device, on_epoch)
    seconds = time.perf_counter() - start
    speed = config.epochs * len(train.ids) / seconds
    last, best = run.test_accuracy[-1], max(run.test_accuracy)
    cells = [config.arch, config.recipe, str(config.epochs), str(seed)]
    return [*cells, f"{last:.2f}", f"{best:.2f}", f"{seconds:.1f}", f"{speed:,.0f}"]


def main() -> None:
    """Train the victims and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="modern")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--seeds", default=1, type=int)
    parser.add_argument("--limit", type=int, help="use so many training and test images only")
    parser.add_argument("--set", action="append", default=[], metavar="victim.KEY=VALUE")
    options = parser.parse_args()
    settings = {"victim.recipe": options.recipe, "victim.arch": options.arch}
    config = load_config(None, {**settings, **dict(parse_assignment(text) for text in options.set)})
    train, test = (
        load_images(f"{options.data}/{part}-*.parquet", config.data, require_labels=True, limit=options.limit)
        for part in ("train", "test")
    )
    rows = [row(config.victim, train, test, seed) for seed in range(options.seeds)]
    images = f"{len(train.ids):,} training images, {len(test.ids):,} test images"
    print(f"{images}; {machine()}; {torch.get_num_threads()} CPU threads\n")
    head = ["victim", "recipe", "epochs", "seed", "last epoch %", "best epoch %", "seconds", "images/s"]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
