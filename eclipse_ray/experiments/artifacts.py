"""What recipes need, each made once and kept by key: parts, denoisers, poisoned and transformed sets."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from eclipse_ray.datasets.matching import partners
from eclipse_ray.datasets.memory import ImageSet, load_images
from eclipse_ray.datasets.table import CANONICAL, NOTE, canonical_table, image_bytes
from eclipse_ray.datasets.write import write_dataset
from eclipse_ray.defenses.interface import Material
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.errors import InputError
from eclipse_ray.experiments.recipe import Column, Facts, Row, transforms
from eclipse_ray.log import counted, say
from eclipse_ray.poisons import POISONS
from eclipse_ray.quality import WINDOW, psnr, ssim, survival
from eclipse_ray.storage.store import Store

Pixels = NDArray[np.uint8]
PROBED = 256
"""Images that tell how much of a poison survives a defense."""
CANONICAL_COLUMNS: Settings = {"data.image_column": "image", "data.label_column": "label", "data.labels": None}


class Cache:
    """What was made before, below OUTPUT/cache, by key; nothing in it is ever changed.

    An experiment without an output folder has an empty one.
    """

    def __init__(self, output: str | None) -> None:
        self.folder = Store(output) if output else None
        self.notes: dict[tuple[str, str], dict[str, Any]] = {}
        # Poisons are made on several threads, and may need the same images and the same denoiser.
        self.writing, self.fitting = Lock(), Lock()

    def __reduce__(self) -> tuple[type[Cache], tuple[str | None]]:
        # Workers open the folder anew.
        return Cache, (self.folder.url if self.folder else None,)

    @property
    def store(self) -> Store:
        """The folder of the experiment."""
        assert self.folder is not None, "only an experiment with an output folder keeps anything"
        return self.folder

    def url(self, kind: str, key: str) -> str:
        """Return the location of something that has a folder of its own."""
        return f"{self.store.url}/cache/{kind}/{key}"

    def note(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the note on something that is finished, else None."""
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
        """Keep transformed images, uint8 (N, H, W, 3) or (D, N, H, W, 3), in one atomic write."""
        stream = io.BytesIO()
        np.save(stream, images, allow_pickle=False)
        self.store.write(f"cache/defended/{key}.npy", stream.getvalue())

    def load(self, key: str) -> Pixels:
        """Return transformed images."""
        return np.load(io.BytesIO(self.store.read(f"cache/defended/{key}.npy")), allow_pickle=False)


def part_of(
    config: Config, cache: Cache, url: str, ids: Sequence[str] | None, key: str, labelled: ImageSet | None = None
) -> Settings:
    """Return the settings that read the images `ids` of `url` (None: all of them), whose identity is `key`.

    A part is written once, with the bytes it has, because the verbs that read it know no limit. Its labels are
    those of `labelled`, which has them in the order of `ids`, else those at `url`.
    """
    if ids is None:
        # Other labels than its own belong to data.source only.
        own = {} if url == config.data.source or not config.data.label_file else {"data.labels": None}
        return {"data.source": url, "data.clean": url, **own}
    target = cache.url("parts", key)
    with cache.writing:
        if not _complete(target):
            _clear(target)
            source, classes = open_source(url, config.data), (labelled.classes if labelled else None)
            rows = _rows(source, frozenset(ids))
            if labelled is not None and labelled.labels is not None:
                rows = _with_labels(rows, dict(zip(ids, labelled.labels.tolist(), strict=True)))
            write_dataset(target, rows, classes=classes or source.classes, source=source.url)
    return {"data.source": target, "data.clean": target, **CANONICAL_COLUMNS}


def _rows(source: Source, ids: frozenset[str]) -> Iterator[pa.Table]:
    left = len(ids)
    for table in read_tables(source):
        wanted = table.filter(pa.array([name in ids for name in table["id"].to_pylist()], pa.bool_()))
        if wanted.num_rows:
            yield wanted.drop_columns([name for name in wanted.column_names if name not in CANONICAL])
        left -= wanted.num_rows
        if left <= 0:
            return


def _with_labels(tables: Iterator[pa.Table], labels: dict[str, int]) -> Iterator[pa.Table]:
    for table in tables:
        names = table["id"].to_pylist()
        yield canonical_table(names, image_bytes(table), [labels[name] for name in names])


def _complete(url: str) -> bool:
    store = Store(url)
    return store.exists(NOTE) and not store.exists(UNFINISHED)


def _clear(url: str) -> None:
    """Remove what an interrupted write left in a folder of the cache, which belongs to nobody else."""
    store = Store(url)
    for entry in list(store.list(hidden=True)):
        store.delete(entry.key)


def denoiser_folder(row: Row, cache: Cache) -> str:
    """Return the folder of the denoiser that a row needs: the given one, or its place in the cache."""
    return row.config.purify.denoiser or cache.url("denoisers", row.denoiser)


def fit_denoiser(
    config: Config, cache: Cache, key: str, ids: Sequence[str] | None, sparse: str, against: str | None = None
) -> str:
    """Return the folder of the denoiser `key`: the given one, or one that is trained once on images of data.clean.

    `ids` and `sparse` are their names (None: all) and their identity. `against` is the suspicious set, if it is
    trained against one; then both sets are canonical, because they are read with the same settings.
    """
    from eclipse_ray.training import train

    if config.purify.denoiser:
        return config.purify.denoiser
    folder = cache.url("denoisers", key)
    if cache.note("denoisers", key) is not None:
        return folder
    part = part_of(config, cache, str(config.data.clean), ids, sparse)
    with cache.fitting:
        if cache.note("denoisers", key) is None:
            say(f"fitting a denoiser, {config.denoiser.iterations:,} iterations")
            began = time.monotonic()
            places = {"denoiser.output": folder, "denoiser.against": against}
            result = train(with_overrides(config, {**part, **places}))
            cache.finish("denoisers", key, {**vars(result), "seconds": time.monotonic() - began})
    return folder


def ensure_poison(
    column: Column, cache: Cache, denoiser: str | None, ids: Sequence[str] | None, facts: Facts
) -> None:
    """Poison the training images of a column once, into cache/poisons/<key>; an interrupted run is continued.

    `ids` are the names of the training images (None: all of data.source), `denoiser` is one that a poison attacks.
    """
    from eclipse_ray.poisoning import poison

    assert column.config is not None
    if cache.note("poisons", column.key) is not None:
        return
    config, folder = column.config, cache.url("poisons", column.key)
    say(f"matrix: making the poison {column.entry.label}")
    began = time.monotonic()
    if not _complete(folder):
        part = part_of(config, cache, str(config.data.source), ids, facts.source)
        if config.poison.name in POISONS:
            # These begin anew; optimised ones continue with what is there.
            _clear(folder)
        own = {"poison.denoiser": local_denoiser(denoiser)} if denoiser else {}
        poison(with_overrides(config, {**part, **own, "data.output": folder}), show_classes=False)
    seconds = time.monotonic() - began
    images = open_source(folder, DataConfig()).images
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


def load_published(
    url: str, source: ImageSet, config: Config, names: Sequence[str] | None = None
) -> tuple[ImageSet, Sequence[str]]:
    """Return the images of `source` as someone else has poisoned them, in the same order, and their ids at `url`.

    Other images are left out. If `names`, these ids, are None, they are those of `source`; without labels at
    `url`, or if no id agrees, they are found by the content of the images, of which those of the sparse clean set
    are left out. Raises InputError for an image that is
    missing at `url`, or that has another label or size there, and for a doubtful match.
    """
    found, clean = load_images(url, config.data), str(config.data.source)
    place = {name: index for index, name in enumerate(found.ids)}
    labelled = found.labels is not None and bool((found.labels >= 0).any())
    if names is None:
        names = source.ids
        if not labelled or place.keys().isdisjoint(names):
            made_of = partners(url, clean, config.data, config.data.clean)
            names = [made_of.get(name, "") for name in source.ids]
    missing = [name for name, there in zip(source.ids, names, strict=True) if there not in place]
    if missing:
        raise InputError(
            f"{url}: {len(missing):,} of the {len(source.ids):,} images of {clean} are missing, such as "
            f"{missing[0]}; a published poison has one image, by id or by content, for each that it replaces"
        )
    images = found.take([place[name] for name in names])
    if labelled and len(other := np.flatnonzero(images.labels != source.labels)):
        raise InputError(
            f"{url}: {counted(len(other), 'image')} with another label than in {clean}, such as "
            f"{source.ids[other[0]]}; give both the same labels"
        )
    require_one_size(url, images, clean, source)
    return replace(images, ids=source.ids, labels=source.labels, classes=source.classes), names


def require_one_size(
    url: str, images: ImageSet, other_url: str, other: ImageSet, advice: str = "; set data.resize"
) -> None:
    """Raise InputError, which ends with `advice`, unless the images of two sets have the same size."""
    size, other_size = images.images.shape[1:3], other.images.shape[1:3]
    if size != other_size:
        raise InputError(f"{url} has {size} images, {other_url} has {other_size}{advice}")


def make_defended(key: str, row: Row, cache: Cache, images: Pixels, original: ImageSet, num_classes: int) -> None:
    """Make and keep the set `key`, the images under a row's transform, if it was not made before.

    `original` has their labels and ids, and the clean images that its quality is measured against.
    """
    if cache.note("defended", key) is not None:
        return
    config, name, device = row.config, row.entry.name, default_device()
    denoiser = open_denoiser(denoiser_folder(row, cache), config.purify.precision) if row.denoiser else None
    material = Material(
        images=torch.from_numpy(np.array(images)),
        labels=torch.from_numpy(np.array(original.labels)),
        ids=original.ids,
        num_classes=num_classes,
        denoiser=denoiser,
        purify=config.purify,
        compensation=config.compensation,
        seed=config.run.seed,
        device=device,
        jpeg=lambda pixels, level: torch.from_numpy(jpeg_roundtrip(pixels.numpy(), level)),
    )
    transform = row.defense.transform
    assert transform is not None
    began = time.monotonic()
    stored: Pixels = transform(material, config.defense).cpu().numpy()
    seconds = time.monotonic() - began
    rho = _survival(row, material, stored, original)
    cache.save(key, stored)
    pace = {"seconds": seconds, "images_per_second": len(images) / seconds, "device": str(device)}
    cache.finish(
        "defended",
        key,
        {"name": name, "images": len(images), **pace, **quality(stored, original.images), "rho": rho},
    )


def _survival(row: Row, material: Material, stored: Pixels, original: ImageSet) -> float | None:
    """Return rho (see `survival`) of the first PROBED images, None if none is poisoned.

    None also for a transform that depends on the whole set.
    """
    transform, count = row.defense.transform, PROBED
    clean = torch.from_numpy(np.array(original.images[:count]))
    if transform is None or "op" in transforms(row.entry.name) or torch.equal(material.images[:count], clean):
        return None
    part = replace(material, images=clean, labels=material.labels[:count], ids=material.ids[:count])
    defended = torch.from_numpy(stored[:, :count] if stored.ndim == 5 else stored[:count])
    return survival(defended, transform(part, row.config.defense).cpu(), material.images[:count], clean)


def quality(images: Pixels, reference: Pixels) -> dict[str, float | None]:
    """Return PSNR and SSIM of images to the clean ones, the means over draws if there are several.

    A PSNR of None means that the images are equal.
    """
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
