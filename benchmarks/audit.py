"""True and false positive rates of `audit` on CIFAR-10, synthetic images and photographs, without Ray.

    python benchmarks/audit.py --data ../shared/data --work runs/cifar10 --poisoned runs/poisoned

WORK is what `benchmarks/cifar10.py --steps prepare` wrote; --clean-images of its sparse set of 2,000 labelled
images are the clean set. Clean samples are disjoint parts of the other CIFAR-10 training images, on some of which
the tolerances were chosen, and of its test images, on which nothing was. Closed-form poisons are drawn anew for
every sample; optimised ones are sub-folders of POISONED, datasets made by `eclipse-ray poison`. Every sample is
one line of --out, so that an interrupted run goes on; another clean set needs another --out. `--table` only prints
the tables.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import load, machine, markdown
from numpy.typing import NDArray

from eclipse_ray.config import content_hash, load_config
from eclipse_ray.datasets.images import decode_stored, encode_image
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.synthetic import draw_synthetic
from eclipse_ray.detection import SAME, Images, Score, judge, score_images
from eclipse_ray.poisons import POISONS, poison_images

ALPHA = 0.01
CLASSES = 10
PHOTOGRAPHS = 100
CLEAN_KINDS = {"none": "no clean set", "labelled": "a labelled clean set"}
CLEAN = ("cifar10", "cifar10-test", "synthetic", "photographs")
Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Case(NamedTuple):
    """One sample to audit: its source, the change to it, its number of images, its draw."""

    source: str
    change: str
    images: int
    seed: int


class Sets(NamedTuple):
    """Images to draw samples from, by source; the clean set belongs to CIFAR-10."""

    pools: dict[str, tuple[Pixels, Labels]]
    clean: Images


def cases(sizes: list[int], most: int, draws: int, poisoned: list[str]) -> Iterator[Case]:
    """Yield every sample: as many clean samples as fit (at most `most`), and `draws` of each change."""
    for images in sizes:
        for seed in range(min(most, 46_000 // images)):
            yield Case("cifar10", "", images, seed)
        for seed in range(min(most, 10_000 // images)):
            yield Case("cifar10-test", "", images, seed)
            yield Case("synthetic", "", images, seed)
        for change in ("noise", "jpeg", *POISONS):
            for seed in range(draws):
                yield Case("cifar10", change, images, seed)
        for change in POISONS:
            yield Case("synthetic", change, images, 0)
        for name in poisoned:
            for seed in range(draws):
                yield Case(name, "", images, seed)
    for change in ("", *POISONS):
        yield Case("photographs", change, PHOTOGRAPHS, 0)


def draw(case: Case, sets: Sets) -> Images:
    """Return the sample of a case: clean draws with different seeds are disjoint, as far as there are images."""
    pixels, labels = sets.pools[case.source]
    # Poisoned sets hold too few images for disjoint draws: those are of different images at random.
    disjoint = case.source in CLEAN and not case.change
    order = np.random.default_rng(0 if disjoint else case.seed + 1).permutation(len(labels))
    start = case.seed * case.images if disjoint else 0
    chosen = order[start : start + case.images]
    images, known = torch.from_numpy(pixels[chosen]), torch.from_numpy(labels[chosen])
    if case.change in POISONS:
        config = load_config(None, {"poison.name": case.change}).poison
        ids = [f"image-{row}" for row in chosen]
        images = poison_images(images, known, ids, config, case.seed, CLASSES)
    elif case.change == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(case.seed))
        images = (images + 4 * noise).round().clamp(0, 255).to(torch.uint8)
    elif case.change == "jpeg":
        images = torch.from_numpy(np.stack([recompressed(image) for image in images.numpy()]))
    return Images(images.permute(0, 3, 1, 2).contiguous(), known)


def recompressed(image: Pixels) -> Pixels:
    """Return an image stored as JPEG again, at quality 50: not poisoned, but unlike the clean set."""
    return decode_stored(encode_image(image, "jpeg:50"), load_config().data)


def measure(case: Case, sets: Sets) -> dict[str, Any]:
    """Return the verdicts of one sample with each kind of clean set, and its scores."""
    sample = draw(case, sets)
    ours = case.source not in ("synthetic", "photographs")
    scores = score_images(sample, sets.clean if ours else None, case.seed)
    alone = [score for score in scores if score.null != SAME]
    kinds: dict[str, list[Score]] = {"none": alone}
    if ours:
        kinds["labelled"] = scores
    found = {kind: asdict(judge(sample, each, ALPHA)) for kind, each in kinds.items()}
    effects = {score.name: [round(score.effect, 4), score.p_value] for score in scores}
    return {**case._asdict(), "verdicts": found, "scores": effects}


def read_sets(options: argparse.Namespace) -> Sets:
    """Return the pools and the clean set; of CIFAR-10, without the images of the clean set."""
    sparse = load(options.work, "sets/clean")
    taken = set(sparse.hashes())
    train = load_images(f"{options.data}/cifar10/train-*.parquet", load_config().data)
    free = np.array([content_hash(image) not in taken for image in train.images])
    assert train.labels is not None
    assert sparse.labels is not None
    test = load_images(f"{options.data}/cifar10/test-*.parquet", load_config().data)
    assert test.labels is not None
    pools = {
        "cifar10": (train.images[free], train.labels[free]),
        "cifar10-test": (test.images, test.labels),
        "synthetic": draw_synthetic(10_000, 32, 0),
    }
    for folder in options.poisoned_folders:
        found = load_images(str(folder), load_config().data)
        assert found.labels is not None
        pools[folder.name] = (found.images, found.labels)
    photographs = load_images(f"{options.data}/imagenet-samples", load_config(None, {"data.resize": 64}).data)
    # One photograph a class, sorted by kind of thing: ten neighbours make a class.
    pools["photographs"] = (photographs.images, np.arange(len(photographs.ids)) // 10)
    chosen = np.sort(np.random.default_rng(0).permutation(len(sparse.labels))[: options.clean_images])
    clean = torch.from_numpy(sparse.images[chosen]).permute(0, 3, 1, 2).contiguous()
    return Sets(pools, Images(clean, torch.from_numpy(sparse.labels[chosen])))


def table(rows: list[dict[str, Any]], kind: str) -> str:
    """Return the counts of samples called poisoned, by source, change and size, with one kind of clean set."""
    found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if kind in row["verdicts"]:
            found[row["source"], row["change"]][row["images"]].append(row["verdicts"][kind])
    sizes = sorted({size for by_size in found.values() for size in by_size})
    lines = []
    for (source, change), by_size in sorted(found.items()):
        hits = [one for members in by_size.values() for one in members if one["verdict"] == "poisoned"]
        said = Counter(f"{one['frequency']}, {one['scope']}" for one in hits)
        cells = [
            f"{sum(one['verdict'] == 'poisoned' for one in by_size[size])} / {len(by_size[size])}"
            if size in by_size
            else ""
            for size in sizes
        ]
        words = "; ".join(f"{word} ({count})" if len(said) > 1 else word for word, count in said.most_common())
        lines.append([source, change or "-", *cells, words])
    return markdown(["images of", "change", *(f"{size:,}" for size in sizes), "said to be"], lines)


def largest_effects(rows: list[dict[str, Any]]) -> str:
    """Return the largest effect and smallest p-value of each score over all clean samples."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        if row["source"] in CLEAN and not row["change"]:
            for name, value in row["scores"].items():
                found[name].append(value)
    lines = [
        [name, str(len(values)), f"{max(v[0] for v in values):.3f}", f"{min(v[1] for v in values):.4f}"]
        for name, values in found.items()
    ]
    return markdown(["score", "clean samples", "largest effect", "smallest p-value"], lines)


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--work", default="runs/cifar10", type=Path)
    parser.add_argument("--poisoned", type=Path)
    parser.add_argument("--sizes", default="300,500,1000,3000,10000")
    parser.add_argument("--most", default=200, type=int, help="clean samples of a size")
    parser.add_argument("--draws", default=2, type=int, help="samples of a size under each change")
    parser.add_argument("--only", help="comma-separated sources and changes: no other sample")
    parser.add_argument("--clean-images", default=2000, type=int, help="size of the labelled clean set")
    parser.add_argument(
        "--part", default="0/1", help="I/N: only every N-th sample, from the I-th, for N processes"
    )
    parser.add_argument("--out", default="audit.jsonl", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        options.poisoned_folders = sorted(options.poisoned.iterdir()) if options.poisoned else []
        measure_missing(options)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    print(machine())
    for kind, words in CLEAN_KINDS.items():
        print(f"\nSamples called poisoned of all, by number of images; {words}:\n\n{table(rows, kind)}")
    print(f"\n{largest_effects(rows)}")


def measure_missing(options: argparse.Namespace) -> None:
    """Append a line to OUT for every sample that has none."""
    part, parts = (int(number) for number in options.part.split("/"))
    done = set()
    if options.out.exists():
        for line in options.out.read_text().splitlines():
            row = json.loads(line)
            done.add(Case(row["source"], row["change"], row["images"], row["seed"]))
    names = [folder.name for folder in options.poisoned_folders]
    sizes = [int(size) for size in options.sizes.split(",")]
    only = options.only.split(",") if options.only else []
    wanted = [
        case
        for case in cases(sizes, options.most, options.draws, names)
        if not only or (case.change or case.source) in only
    ]
    mine = [case for case in wanted if case not in done and zlib.crc32(repr(case).encode()) % parts == part]
    sets = read_sets(options)
    for case in mine:
        if case.images <= len(sets.pools[case.source][1]):
            row = measure(case, sets)
            with options.out.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
