"""The picture of the README, from the folders that benchmarks/cifar10.py writes: CIFAR-10, AR and LSP poisons.

python tools/picture.py --work runs/cifar10 --out docs/images/purified.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from eclipse_ray.datasets.images import decode_image
from eclipse_ray.reports.charts import amplified, image_grid

CLASSES = 8
MAX_PIXELS = 10**6


def read(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return label and encoded image of every row of a dataset by id."""
    rows: dict[str, tuple[int, bytes]] = {}
    for file in sorted((folder / "data").glob("*.parquet")):
        table = pq.read_table(file, columns=["id", "label", "image"])
        for name, label, image in zip(*(table[key].to_pylist() for key in table.column_names), strict=True):
            rows[name] = (label, image["bytes"])
    return rows


def main() -> None:
    """Write the picture: one image of each of eight classes, clean, poisoned, purified, and what was changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sets = {
        "clean": read(arguments.work / "sets" / "rest"),
        "poisoned": read(arguments.work / "ar"),
        "purified": read(arguments.work / "purified-500-ar"),
    }
    by_class: dict[int, str] = {}
    for name, (label, _) in sets["clean"].items():
        if all(name in images for images in sets.values()):
            by_class.setdefault(label, name)
    names = [by_class[label] for label in sorted(by_class)][:CLASSES]
    rows = {
        title: np.stack([decode_image(images[name][1], MAX_PIXELS) for name in names])
        for title, images in sets.items()
    }
    rows["poison x10"] = amplified(rows["poisoned"], rows["clean"])
    rows["left x10"] = amplified(rows["purified"], rows["clean"])
    data = image_grid(rows, [""] * len(names), "CIFAR-10: AR poison, and what purification leaves of it")
    arguments.out.write_bytes(data)
    print(f"{arguments.out}: {len(data) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
