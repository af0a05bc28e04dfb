"""What the cells of a matrix are made of, each made once: sets, denoisers, poisoned and transformed images."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from eclipse_ray.cluster.connect import local_denoiser, open_denoiser
from eclipse_ray.config import Config, DataConfig, Settings, with_overrides
from eclipse_ray.datasets.formats import UNFINISHED, Source, open_source, read_tables
from eclipse_ray.datasets.images import jpeg_roundtrip
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.table import CANONICAL, NOTE
from eclipse_ray.datasets.write import write_dataset
from eclipse_ray.defenses import Material, combine
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.errors import InputError
from eclipse_ray.experiments import grid
from eclipse_ray.log import say
from eclipse_ray.poisons import POISONS
from eclipse_ray.quality import WINDOW, psnr, ssim
from eclipse_ray.storage.store import Store

Pixels = NDArray[np.uint8]
CANONICAL_COLUMNS: Settings = {"data.image_column": "image", "data.label_column": "label"}


class Cache:
    """What was made before, below data.output/cache, by key; nothing in it is ever changed."""

    def __init__(self, output: str) -> None:
        self.store = Store(output)
        self.notes: dict[tuple[str, str], dict[str, Any]] = {}
        # Poisons are made on several threads, and may need the same images and the same denoiser.
        self.writing, self.fitting = Lock(), Lock()

    def __reduce__(self) -> tuple[type[Cache], tuple[str]]:
        # Workers open the folder anew.
        return Cache, (self.store.url,)

    def url(self, kind: str, key: str) -> str:
        """Return the location of something that has a folder of its own."""
        return f"{self.store.url}/cache/{kind}/{key}"

    def note(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return what is known of something that is finished, else None."""
        if (kind, key) not in self.notes:
            name = f"cache/{kind}/{key}.json"
            if not self.store.exists(name):
                return None
            self.notes[kind, key] = json.loads(self.store.read(name))
        return self.notes[kind, key]

    def finish(self, kind: str, key: str, note: dict[str, Any]) -> None:
        """Declare something finished."""
        self.store.write(f"cache/{kind}/{key}.json", json.dumps(note, indent=1).encode())

    def save(self, key: str, images: Pixels) -> None:
        """Keep transformed images, uint8 (N, H, W, 3) or (D, N, H, W, 3), whole or not at all."""
        stream = io.BytesIO()
        np.save(stream, images, allow_pickle=False)
        self.store.write(f"cache/defended/{key}.npy", stream.getvalue())

    def load(self, key: str) -> Pixels:
        """Return transformed images."""
        # Not memory-mapped: Ray shares plain arrays between processes, but copies a mapped one.
        return np.load(io.BytesIO(self.store.read(f"cache/defended/{key}.npy")), allow_pickle=False)


def part_of(config: Config, cache: Cache, url: str, limit: int | None, key: str) -> Settings:
    """Return the settings that read the first `limit` images of `url`, whose identity is `key`.

    They are written once, with the bytes they have, because the verbs that read them know no limit.
    """
    if limit is None:
        return {"data.source": url, "data.clean": url}
    return _written_part(config, cache, url, key, partial(_head, limit=limit))


def chosen_part(config: Config, cache: Cache, url: str, ids: Collection[str], key: str) -> Settings:
    """Return the settings that read the images `ids` of `url`, whose identity is `key`; they are written once."""
    return _written_part(config, cache, url, key, partial(_chosen, ids=frozenset(ids)))


def _written_part(
    config: Config, cache: Cache, url: str, key: str, rows: Callable[[Source, Config], Iterator[pa.Table]]
) -> Settings:
    target = cache.url("parts", key)
    with cache.writing:
        if not _complete(target):
            _clear(target)
            source = open_source(url, config.data)
            write_dataset(target, rows(source, config), classes=source.classes, source=source.url)
    return {"data.source": target, "data.clean": target, **CANONICAL_COLUMNS}


def _head(source: Source, config: Config, limit: int) -> Iterator[pa.Table]:
    left = limit
    for table in read_tables(source, config.data, max_images=min(limit, 2048)):
        wanted = table.slice(0, left)
        yield wanted.drop_columns([name for name in wanted.column_names if name not in CANONICAL])
        left -= wanted.num_rows
        if left <= 0:
            return


def _chosen(source: Source, config: Config, ids: frozenset[str]) -> Iterator[pa.Table]:
    for table in read_tables(source, config.data):
        wanted = table.filter(pa.array([name in ids for name in table["id"].to_pylist()], pa.bool_()))
        yield wanted.drop_columns([name for name in wanted.column_names if name not in CANONICAL])


def _complete(url: str) -> bool:
    store = Store(url)
    return store.exists(NOTE) and not store.exists(UNFINISHED)


def _clear(url: str) -> None:
    """Remove what an interrupted write left in a folder of the cache, which is nobody else's."""
    store = Store(url)
    for entry in list(store.list(hidden=True)):
        store.delete(entry.key)


def ensure_denoiser(config: Config, cache: Cache, key: str, sparse: str) -> str:
    """Return the folder of the denoiser that `key` names: the given one, else one trained on the sparse set.

    `sparse` is the identity of that set.
    """
    if config.purify.denoiser:
        return config.purify.denoiser
    folder = cache.url("denoisers", key)
    if cache.note("denoisers", key) is None:
        fit_denoiser(
            config, cache, key, part_of(config, cache, str(config.data.clean), config.matrix.sparse_limit, sparse)
        )
    return folder


def fit_denoiser(config: Config, cache: Cache, key: str, part: Settings) -> str:
    """Return the folder of the denoiser `key`, fitted if it was not before on the images that `part` reads."""
    from eclipse_ray.training import train

    folder = cache.url("denoisers", key)
    with cache.fitting:
        if cache.note("denoisers", key) is None:
            say(f"fitting a denoiser, {config.denoiser.iterations:,} iterations")
            began = time.monotonic()
            result = train(with_overrides(config, {**part, "denoiser.output": folder}))
            cache.finish("denoisers", key, {**vars(result), "seconds": time.monotonic() - began})
    return folder


def ensure_poison(column: grid.Column, cache: Cache, denoiser: str | None, images: int, source: str) -> None:
    """Poison the training images of a column once, into cache/poisons/<key>; an interrupted run is gone on with.

    `source` is the identity of the training images, `denoiser` the one a poison attacks.
    """
    from eclipse_ray.poisoning import poison

    assert column.config is not None
    if cache.note("poisons", column.key) is not None:
        return
    config, folder = column.config, cache.url("poisons", column.key)
    say(f"matrix: making the poison {column.entry.label}")
    began = time.monotonic()
    if not _complete(folder):
        part = part_of(config, cache, str(config.data.source), config.matrix.limit, source)
        if config.poison.name in POISONS:
            # Those begin anew; optimised ones go on with what is there.
            _clear(folder)
        own = {"poison.denoiser": local_denoiser(denoiser)} if denoiser and not config.poison.denoiser else {}
        poison(with_overrides(config, {**part, **own, "data.output": folder}))
    seconds = time.monotonic() - began
    cache.finish("poisons", column.key, {"name": config.poison.name, "images": images, "seconds": seconds})


def load_column(url: str, ids: list[str], max_pixels: int) -> Pixels:
    """Return the images of a poisoned set, uint8 (N, H, W, 3), in the order of `ids`."""
    # What a poison wrote is canonical and has its size already, however its source was read.
    data = DataConfig(max_pixels=max_pixels)
    found = load_images(url, data)
    place = {name: index for index, name in enumerate(found.ids)}
    if place.keys() != set(ids):
        raise InputError(f"{url}: does not hold the images of the training set; delete it and run again")
    return found.images[[place[name] for name in ids]]


@dataclass(frozen=True)
class Work:
    """The transformed set `key` to make: a defense of some name and settings, with a local or remote denoiser."""

    cache: Cache
    key: str
    name: str
    config: dict[str, Any]
    denoiser: str | None
    seed: int
    num_classes: int
    threads: int


def make_defended(
    work: Work,
    images: Pixels,
    reference: Pixels,
    labels: NDArray[np.int64],
    ids: list[str],
) -> Pixels:
    """Return the training images under a defense's transform, made and kept if they were not before."""
    if work.cache.note("defended", work.key) is not None:
        return work.cache.load(work.key)
    torch.set_num_threads(work.threads)
    config = Config.model_validate(work.config)
    device = default_device()
    denoiser = open_denoiser(work.denoiser, config.purify.precision) if work.denoiser else None
    material = Material(
        images=torch.from_numpy(np.array(images)),
        labels=torch.from_numpy(np.array(labels)),
        ids=ids,
        num_classes=work.num_classes,
        denoiser=denoiser,
        purify=config.purify,
        compensation=config.compensation,
        seed=work.seed,
        device=device,
        jpeg=_jpeg,
    )
    transform = combine(work.name).transform
    assert transform is not None
    began = time.monotonic()
    result = transform(material, config.defense).cpu()
    seconds = time.monotonic() - began
    stored: Pixels = result.numpy()
    work.cache.save(work.key, stored)
    note = {
        "name": work.name,
        "images": len(images),
        "seconds": seconds,
        "images_per_second": len(images) / seconds,
    }
    work.cache.finish("defended", work.key, {**note, **quality(stored, reference), "device": str(device)})
    return stored


def quality(images: Pixels, reference: Pixels) -> dict[str, float | None]:
    """Return PSNR and SSIM of images, or the means over several draws of them, to the clean ones; None: equal."""
    draws = torch.from_numpy(np.array(images if images.ndim == 5 else images[None]))
    clean = torch.from_numpy(np.array(reference))
    decibel = [psnr(draw, clean) for draw in draws]
    if any(np.isinf(decibel)):
        return {"psnr": None, "ssim": 1.0}
    similar = min(clean.shape[1:3]) >= WINDOW
    return {
        "psnr": float(np.mean(decibel)),
        "ssim": float(np.mean([ssim(draw, clean) for draw in draws])) if similar else None,
    }


def keep_quality(cache: Cache, key: str, images: Pixels, reference: Pixels) -> None:
    """Measure what a poison itself does to the images, once."""
    if cache.note("quality", key) is None:
        cache.finish("quality", key, quality(images, reference))


def _jpeg(images: torch.Tensor, level: int) -> torch.Tensor:
    return torch.from_numpy(jpeg_roundtrip(images.numpy(), level))
