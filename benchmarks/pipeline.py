"""Where the time of `eclipse-ray purify` goes, beside JPEG purification and a plain loop around the same network.

    python benchmarks/pipeline.py --data ../shared/data --out runs/pipeline [--precision int8]

Two sets: the 50,000 training images of CIFAR-10, and 2,000 photographs of their own size (100 files of 20 names).
The steps are measured alone on one core first, in the same run; `bound` is their sum, shared by all cores, and no
pipeline can take less. Each case is a process of its own, so its start counts. The network is the default one with
drawn weights, in the precision that is fast here unless one is named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from common import machine, markdown, write_untrained
from torch.utils.data import DataLoader, Dataset

from eclipse_ray.cluster.connect import open_denoiser
from eclipse_ray.config import Computed, DataConfig, PurifyConfig
from eclipse_ray.datasets.formats import open_source, read_tables
from eclipse_ray.datasets.images import decode_image, encode_image
from eclipse_ray.datasets.table import image_bytes
from eclipse_ray.diffusion.network import Denoiser, default_device
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.purification.stages import Pixels, purify_batch, same_size_batches

CORES = os.cpu_count() or 1
COPIES, JPEG = 20, "jpeg:10"
TIMED = {"cifar10": 2048, "photographs": 48}
CASES = ("eclipse-ray purify", "DataLoader loop", "JPEG loop")


def sources(data: Path, out: Path) -> dict[str, str]:
    """Return the location of each set; the photographs get more names below `out`."""
    folder = out / "photographs"
    if not folder.exists():
        for copy in range(COPIES):
            for file in sorted((data / "imagenet-samples").rglob("*.*")):
                place = folder / file.parent.name / f"{copy:02d}-{file.name}"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
    return {"cifar10": f"{data}/cifar10/train-*.parquet", "photographs": str(folder)}


def steps(name: str, url: str, denoiser_folder: str, precision: Computed | None) -> dict[str, float]:
    """Return seconds of one core for each image: decode, noise (a part of the next), denoise, encode, JPEG."""
    torch.set_num_threads(1)
    data, settings = spread_images(url, TIMED[name]), PurifyConfig()
    denoiser = open_denoiser(denoiser_folder, precision)
    images: list[Pixels] = []
    found: dict[str, float] = {}

    def timed(step: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        found[step] = (time.perf_counter() - began) / len(data)

    def drawn() -> None:
        for rows in same_size_batches(images, settings.batch_size, settings.batch_pixels):
            noise(0, [str(row) for row in rows], 400, (3, *images[rows[0]].shape[:2]), default_device())

    denoised(denoiser, [decode_image(each, 10**8) for each in data[:8]], settings)
    timed("decode", lambda: images.extend(decode_image(each, 10**8) for each in data))
    timed("noise", drawn)
    timed("denoise", lambda: denoised(denoiser, images, settings))
    timed("encode", lambda: [encode_image(image, "png") for image in images])
    timed("jpeg", lambda: [decode_image(encode_image(image, JPEG), 10**8) for image in images])
    found["megapixels"] = sum(image.shape[0] * image.shape[1] for image in images) / len(images) / 1e6
    return found


def spread_images(url: str, count: int) -> list[bytes]:
    """Return the stored bytes of `count` images that are spread over the set."""
    stored = [each for table in _tables(url) for each in image_bytes(table)]
    return stored[:: max(1, len(stored) // count)][:count]


def _tables(url: str) -> Iterator[pa.Table]:
    return read_tables(open_source(url, DataConfig()), max_images=512)


def denoised(denoiser: Denoiser, images: Sequence[Pixels], settings: PurifyConfig) -> list[Pixels]:
    """Return the purified images, in batches of one size as the actors make them."""
    done: dict[int, Pixels] = {}
    for rows in same_size_batches(list(images), settings.batch_size, settings.batch_pixels):
        batch = np.stack([images[row] for row in rows])
        result = purify_batch(denoiser, batch, [str(row) for row in rows], settings, 0)
        done |= zip(rows, result.numpy(), strict=True)
    return [done[row] for row in range(len(images))]


class Shard(Dataset[list[Pixels]]):
    """What a DataLoader hands its workers: the bytes of one table, decoded there."""

    def __init__(self, tables: list[list[bytes]]) -> None:
        self.tables = tables

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, index: int) -> list[Pixels]:
        return [decode_image(each, 10**8) for each in self.tables[index]]


def plain_loop(case: str, url: str, out: Path, denoiser_folder: str, precision: Computed | None) -> None:
    """Read, decode in a worker, denoise (or JPEG) and encode in this process; no ledger, no resume, no errors."""
    out.mkdir(parents=True)
    tables = [image_bytes(table) for table in _tables(url)]
    denoiser = open_denoiser(denoiser_folder, precision)
    loader: Any = DataLoader(Shard(tables), batch_size=None, collate_fn=list, num_workers=max(1, CORES - 1))
    for number, images in enumerate(loader):
        if case == "JPEG loop":
            images = [decode_image(encode_image(image, JPEG), 10**8) for image in images]
        else:
            images = denoised(denoiser, images, PurifyConfig())
        (out / f"{number}.bin").write_bytes(b"".join(encode_image(image, "png") for image in images))


def run(case: str, url: str, out: Path, denoiser_folder: str, precision: Computed | None) -> dict[str, float]:
    """Run one case in a process of its own; return its wall time, and of purify the start and the end."""
    shutil.rmtree(out, ignore_errors=True)
    if case == "eclipse-ray purify":
        command = ["-m", "eclipse_ray", "purify", url, str(out), "--denoiser", denoiser_folder]
        command += ["--set", "data.labels=none", "--set", "compensation.mode=none"]
        command += ["--set", f"purify.precision={precision or 'null'}"]
    else:
        command = [__file__, "--loop", case, "--source", url, "--out", str(out), "--denoiser", denoiser_folder]
        command += ["--precision", precision] if precision else []
    began = time.time()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    found = {"seconds": time.time() - began}
    commits = sorted(path.stat().st_mtime for path in (out / "_eclipse/status").glob("*/*.json"))
    if commits:
        found |= {"first_commit": commits[0] - began, "last_commit": commits[-1] - began}
    return found


def measure(name: str, url: str, out: Path, precision: Computed | None) -> dict[str, Any]:
    """Measure the steps and every case for one set."""
    denoiser = str(out / "denoiser")
    alone = steps(name, url, denoiser, precision)
    count = open_source(url, DataConfig()).images
    bound = count * (alone["decode"] + alone["denoise"] + alone["encode"]) / CORES
    cases = {case: run(case, url, out / f"{name}-{case.replace(' ', '-')}", denoiser, precision) for case in CASES}
    return {
        "set": name,
        "images": count,
        "steps": alone,
        "precision": precision,
        "bound": bound,
        "cases": cases,
        "load": os.getloadavg(),
    }


def tables(found: dict[str, Any]) -> str:
    """Return the two tables of a set."""
    count, alone, bound = found["images"], found["steps"], found["bound"]
    rows = [
        [
            step,
            f"{1000 * alone[step]:.3f}",
            f"{alone['megapixels'] / alone[step]:.2f}",
            f"{count * alone[step]:.0f}",
        ]
        for step in ("decode", "noise", "denoise", "encode", "jpeg")
    ]
    head = ["step, one core alone", "ms for an image", "Mpx/s", f"core-seconds for {count:,} images"]
    purify = found["cases"]["eclipse-ray purify"]
    wall, share = purify["seconds"], count * alone["denoise"] / CORES / purify["seconds"]
    ends = [
        ["bound: decode, denoise and encode on all cores", f"{bound:.0f}", "1.00"],
        *(
            [case, f"{each['seconds']:.0f}", f"{each['seconds'] / bound:.2f}"]
            for case, each in found["cases"].items()
        ),
    ]
    note = (
        f"Of purify's {wall:.0f} s, {100 * share:.0f} % are the network's; the first commit came after "
        f"{purify['first_commit']:.0f} s, the last {wall - purify['last_commit']:.0f} s before the end."
    )
    return "\n\n".join([markdown(head, rows), markdown(["case", "seconds", "to the bound"], ends), note])


def main() -> None:
    """Measure the chosen sets, print their tables, and keep the figures in OUT/pipeline.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/pipeline"))
    parser.add_argument("--sets", default="cifar10,photographs")
    parser.add_argument("--precision", choices=get_args(Computed), help="of the network; not given: the fast one")
    parser.add_argument("--loop", choices=CASES[1:], help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--denoiser", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        torch.set_num_threads(1)
        plain_loop(options.loop, options.source, options.out, options.denoiser, options.precision)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    write_untrained(str(options.out / "denoiser"), {})
    urls = sources(options.data, options.out)
    rows = []
    for name in options.sets.split(","):
        rows.append(measure(name, urls[name], options.out, options.precision))
        (options.out / "pipeline.json").write_text(json.dumps({"machine": machine(), "sets": rows}, indent=1))
        print(f"\n## {name} ({machine()}; load {rows[-1]['load'][0]:.1f})\n\n{tables(rows[-1])}\n", flush=True)


if __name__ == "__main__":
    main()
