"""What the cells of a matrix are made of, each made once: sets, denoisers, poisoned and transformed images."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from eclipse_ray.config import Config, DataConfig, DefenseConfig, PrivacyConfig, Settings, digest, with_overrides
from eclipse_ray.data.dataset import ImageSet, load_images, write_dataset
from eclipse_ray.data.formats import UNFINISHED, Source, open_source, read_tables
from eclipse_ray.data.images import jpeg_roundtrip
from eclipse_ray.data.note import NOTE
from eclipse_ray.data.store import Store
from eclipse_ray.data.table import CANONICAL
from eclipse_ray.defenses import Material, combine
from eclipse_ray.diffusion.checkpoint import CARD_FILE, load_denoiser, read_card, weights_digest
from eclipse_ray.diffusion.model import default_device
from eclipse_ray.distributed import grid
from eclipse_ray.distributed.evaluate import refuse_shared_images
from eclipse_ray.distributed.fetch import local_denoiser
from eclipse_ray.distributed.progress import say
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.poisons import POISONS
from eclipse_ray.quality import WINDOW, psnr, ssim

Pixels = NDArray[np.uint8]
CANONICAL_COLUMNS: Settings = {"data.image_column": "image", "data.label_column": "label"}


@dataclass(frozen=True)
class Sets:
    """The three sets of a matrix, disjoint by content: training images, test images, sparse clean set or None."""

    source: ImageSet
    test: ImageSet
    sparse: ImageSet | None

    @property
    def num_classes(self) -> int:
        """Classes of training and test images."""
        assert self.source.labels is not None
        assert self.test.labels is not None
        return int(max(self.source.labels.max(), self.test.labels.max())) + 1


def load_sets(config: Config) -> Sets:
    """Return the sets of data.source, data.test and data.clean, each at most as large as the matrix limits say.

    The *clean* training images are compared with the sparse and the test set, because a poison changes the content
    of every image. Raises ConfigError for a location that is not set, InputError for sets that share images,
    missing labels or two sizes.
    """
    data, matrix = config.data, config.matrix
    for name, value in (("data.source", data.source), ("data.test", data.test), ("data.output", data.output)):
        if not value:
            raise ConfigError(f"{name} is not set: a matrix needs data.source, data.test and data.output")
    source = load_images(str(data.source), data, require_labels=True, limit=matrix.limit)
    test = load_images(str(data.test), data, require_labels=True, limit=matrix.test_limit)
    sparse = load_images(data.clean, data) if data.clean else None
    _check_classes(config, source)
    named = {"training set": source, "test set": test}
    if sparse is not None:
        named["sparse clean set"] = sparse
        if sparse.labels is not None and int(sparse.labels.min()) < 0:
            sparse = replace(sparse, labels=None)
    sizes = {name: images.images.shape[1:3] for name, images in named.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"a matrix needs images of one size, found {sizes}; set data.resize")
    shared = set() if sparse is None else set(sparse.hashes())
    if config.purify.denoiser:
        shared |= set(read_card(local_denoiser(config.purify.denoiser)).sparse_hashes)
    refuse_shared_images(f"{data.source}, {data.test}", set(source.hashes()), set(test.hashes()), shared)
    return Sets(source, test, sparse)


def _check_classes(config: Config, source: ImageSet) -> None:
    found = set() if source.labels is None else set(source.labels.tolist())
    if config.matrix.limit and source.classes and len(found) < len(source.classes):
        raise InputError(
            f"{config.data.source}: its first {config.matrix.limit} images are of {len(found)} of "
            f"{len(source.classes)} classes; take part of it with `eclipse-ray split`, which keeps all classes"
        )


def facts(config: Config, sets: Sets) -> grid.Facts:
    """Return the digests that keys are made of."""
    sparse = {}
    if sets.sparse is not None:
        sparse = {count: _identity(first_images(sets.sparse, count)) for count in grid.sparse_counts(config)}
    weights = ""
    if config.purify.denoiser:
        folder = local_denoiser(config.purify.denoiser)
        weights = digest([weights_digest(folder), (Path(folder) / CARD_FILE).read_text(encoding="utf-8")])
    return grid.Facts(_identity(sets.source), _identity(sets.test), sparse, weights)


def _identity(images: ImageSet) -> str:
    labels = None if images.labels is None else images.labels.tolist()
    return digest([images.ids, images.hashes(), labels])


def first_images(images: ImageSet, count: int) -> ImageSet:
    """Return the first `count` images, or all for 0. Raises InputError if there are fewer."""
    if not count:
        return images
    if count > len(images.ids):
        raise InputError(f"matrix.sparse_limit {count}: the sparse set has {len(images.ids)} images")
    labels = None if images.labels is None else images.labels[:count]
    return ImageSet(images.ids[:count], images.images[:count], labels, images.classes)


def sparse_set(sets: Sets, config: Config) -> ImageSet | None:
    """Return the sparse images that a row may use."""
    return None if sets.sparse is None else first_images(sets.sparse, config.matrix.sparse_limit or 0)


def check_labels(sets: Sets, clean: str | None) -> None:
    """Raise InputError if the sparse set cannot be added to a training set, for want of labels."""
    if sets.sparse is None or sets.sparse.labels is None:
        raise InputError(f"{clean}: the defense dilution needs labels of every sparse clean image; leave it out")


class Cache:
    """What was made before, below data.output/cache, by key; nothing in it is ever changed."""

    def __init__(self, output: str) -> None:
        self.store = Store(output)

    def __reduce__(self) -> tuple[type[Cache], tuple[str]]:
        # Workers open the folder anew.
        return Cache, (self.store.url,)

    def url(self, kind: str, key: str) -> str:
        """Return the location of something that has a folder of its own."""
        return f"{self.store.url}/cache/{kind}/{key}"

    def note(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return what is known of something that is finished, else None."""
        name = f"cache/{kind}/{key}.json"
        return json.loads(self.store.read(name)) if self.store.exists(name) else None

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
        if self.store.local:
            return np.load(self.store.path(f"cache/defended/{key}.npy"), mmap_mode="r", allow_pickle=False)
        return np.load(io.BytesIO(self.store.read(f"cache/defended/{key}.npy")), allow_pickle=False)


def part_of(config: Config, cache: Cache, url: str, limit: int | None, key: str) -> Settings:
    """Return the settings that read the first `limit` images of `url`, whose identity is `key`.

    They are written once, with the bytes they have, because the verbs that read them know no limit.
    """
    if limit is None:
        return {"data.source": url, "data.clean": url}
    target = cache.url("parts", key)
    if not _complete(target):
        _clear(target)
        source = open_source(url, config.data)
        write_dataset(target, _head(source, config, limit), classes=source.classes, source=source.url)
    return {"data.source": target, "data.clean": target, **CANONICAL_COLUMNS}


def _head(source: Source, config: Config, limit: int) -> Iterator[pa.Table]:
    left = limit
    for table in read_tables(source, config.data, max_images=min(limit, 2048)):
        wanted = table.slice(0, left)
        yield wanted.drop_columns([name for name in wanted.column_names if name not in CANONICAL])
        left -= wanted.num_rows
        if left <= 0:
            return


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
    from eclipse_ray.distributed.train import train

    folder = cache.url("denoisers", key)
    if cache.note("denoisers", key) is None:
        say(f"matrix: fitting a denoiser, {config.denoiser.iterations:,} iterations")
        part = part_of(config, cache, str(config.data.clean), config.matrix.sparse_limit, sparse)
        began = time.monotonic()
        result = train(with_overrides(config, {**part, "denoiser.output": folder}))
        cache.finish("denoisers", key, {**vars(result), "seconds": time.monotonic() - began})
    return folder


def ensure_poison(column: grid.Column, cache: Cache, denoiser: str | None, images: int, source: str) -> None:
    """Poison the training images of a column once, into cache/poisons/<key>; an interrupted run is gone on with.

    `source` is the identity of the training images, `denoiser` the one a poison attacks.
    """
    from eclipse_ray.distributed.poison import poison

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
    sparse: tuple[Pixels, NDArray[np.int64] | None] | None,
) -> Pixels:
    """Return the training images under a defense's transform, made and kept if they were not before."""
    if work.cache.note("defended", work.key) is not None:
        return work.cache.load(work.key)
    torch.set_num_threads(work.threads)
    config = Config.model_validate(work.config)
    device = default_device()
    denoiser = None
    if work.denoiser:
        denoiser = load_denoiser(local_denoiser(work.denoiser), device)
        denoiser.precision = config.purify.precision
    material = Material(
        images=torch.from_numpy(np.array(images)),
        labels=torch.from_numpy(np.array(labels)),
        ids=ids,
        num_classes=work.num_classes,
        clean_images=None if sparse is None else torch.from_numpy(np.array(sparse[0])),
        clean_labels=None if sparse is None or sparse[1] is None else torch.from_numpy(np.array(sparse[1])),
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


def privacy_of(config: DefenseConfig) -> PrivacyConfig:
    """Return how dp-sgd trains."""
    return PrivacyConfig(max_grad_norm=config.dp_max_grad_norm, noise_multiplier=config.dp_noise_multiplier)


def _jpeg(images: torch.Tensor, level: int) -> torch.Tensor:
    return torch.from_numpy(jpeg_roundtrip(images.numpy(), level))
