"""The three sets of a matrix: read, found disjoint, and identified by their content."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from eclipse_ray.cluster.connect import local_denoiser
from eclipse_ray.config import Config, digest
from eclipse_ray.datasets.memory import ImageSet, load_images
from eclipse_ray.diffusion.checkpoint import CARD_FILE, read_card, weights_digest
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.experiments import grid
from eclipse_ray.experiments.evaluate import refuse_shared_images


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
        sparse = {count: identity(first_images(sets.sparse, count)) for count in grid.sparse_counts(config)}
    weights = given_weights(config.purify.denoiser) if config.purify.denoiser else ""
    return grid.Facts(identity(sets.source), identity(sets.test), sparse, weights)


def given_weights(denoiser: str) -> str:
    """Return a digest of a denoiser's weights and card."""
    folder = local_denoiser(denoiser)
    return digest([weights_digest(folder), (Path(folder) / CARD_FILE).read_text(encoding="utf-8")])


def identity(images: ImageSet) -> str:
    """Return a digest of ids, contents and labels."""
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


def check_labels(sets: Sets, clean: str | None) -> None:
    """Raise InputError if the sparse set cannot be added to a training set, for want of labels."""
    if sets.sparse is None or sets.sparse.labels is None:
        raise InputError(f"{clean}: the defense dilution needs labels of every sparse clean image; leave it out")
