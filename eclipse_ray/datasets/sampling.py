"""Part of a labelled dataset, every class in its share, without decoding the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import Source, chunk_spans, open_source, read_parts
from eclipse_ray.datasets.images import ImageError, content_hash, decode_stored, resize_image
from eclipse_ray.datasets.memory import ImageSet
from eclipse_ray.datasets.table import Part, Span, image_bytes
from eclipse_ray.datasets.transform import choose_clean
from eclipse_ray.errors import InputError

CHUNK_IMAGES, CHUNK_BYTES = 1024, 64 * 2**20
CANDIDATES = 20
"""What is read holds so many times the sample: more classes are met, at a bounded cost for a set of any size."""


def random_chunks(parts: Sequence[Part], count: int, seed: int) -> list[list[Span]]:
    """Return chunks of rows in stored order, chosen by `seed`, that hold CANDIDATES times `count` rows, or all."""
    chunks = list(chunk_spans(parts, CHUNK_IMAGES, CHUNK_BYTES))
    found, chosen = 0, []
    for number in np.random.default_rng(seed).permutation(len(chunks)).tolist():
        if found >= CANDIDATES * count:
            break
        chosen.append(number)
        found += rows_in(chunks[number])
    return [chunks[number] for number in sorted(chosen)]


def rows_in(spans: Iterable[Span]) -> int:
    """Return the number of rows of some spans."""
    return sum(stop - start for _, start, stop in spans)


def load_sample(url: str, data_config: DataConfig, count: int, seed: int) -> ImageSet:
    """Return at most `count` images of `url`, stratified by label, chosen by `seed` and id, in stored order.

    They come from `random_chunks`: of a large dataset sorted by label, not from every class. What cannot be
    decoded is left out. Raises InputError for a missing label, an id that occurs twice, two sizes, or no readable
    image.
    """
    source = open_source(url, data_config)
    chunks = random_chunks(source.parts, count, seed)
    ids, labels = _read_names(source, _tables(source, chunks, data_config))
    chosen = np.ones(len(ids), np.bool_)
    if count < len(ids):
        chosen = choose_clean(list(ids), list(labels), count, seed)
    wanted = {name: label for name, label, take in zip(ids, labels, chosen, strict=True) if take}
    found: dict[str, np.ndarray] = {}
    hashes: list[str] = []
    for table in _tables(source, chunks, data_config):
        for name, data in zip(table["id"].to_pylist(), image_bytes(table), strict=True):
            if name not in wanted:
                continue
            try:
                stored = decode_stored(data, data_config)
            except ImageError:
                continue
            found[name] = resize_image(stored, data_config.resize)
            hashes.append(content_hash(stored))
    sizes = sorted({image.shape[:2] for image in found.values()})
    if len(sizes) != 1:
        raise InputError(f"{url}: expected readable images of one size, found {sizes}; set data.resize")
    kept = list(found)
    return ImageSet(
        kept,
        np.stack(list(found.values())),
        np.array([wanted[name] for name in kept], np.int64),
        source.classes,
        hashes,
    )


def _tables(source: Source, chunks: list[list[Span]], data_config: DataConfig) -> Iterator[pa.Table]:
    for spans in chunks:
        yield read_parts(source.url, source.format, source.classes, spans, data_config)


def _read_names(source: Source, tables: Iterable[pa.Table]) -> tuple[list[str], list[int]]:
    ids: list[str] = []
    labels: list[int] = []
    for table in tables:
        known = table["label"].fill_null(-1).to_pylist() if "label" in table.column_names else [-1] * len(table)
        ids += table["id"].to_pylist()
        labels += known
    if not ids or min(labels) < 0:
        raise InputError(f"{source.url}: an image without a label; a sweep needs all labels of its dataset")
    if len(set(ids)) < len(ids):
        raise InputError(f"{source.url}: an id occurs more than once; give every image its own id")
    return ids, labels
