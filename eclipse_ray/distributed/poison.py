"""Write a poisoned copy of a dataset, chunk by chunk; draws are keyed by image id or class, so chunks are free."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from eclipse_ray.config import Config
from eclipse_ray.data.dataset import decode_resized, refuse_existing, write_dataset
from eclipse_ray.data.formats import Source, open_source, read_tables
from eclipse_ray.data.images import encode_image
from eclipse_ray.data.store import Store
from eclipse_ray.data.table import CANONICAL, canonical_table, image_bytes
from eclipse_ray.distributed.shards import same_size_batches
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.poisons import poison_images
from eclipse_ray.results import DatasetResult


def poison(config: Config) -> DatasetResult:
    """Poison data.source into data.output; images are stored losslessly, labels, ids and extra columns stay.

    Raises InputError for missing labels, an undecodable image, or an output that already holds data.
    """
    source_url, output = config.data.source, config.data.output
    if not source_url or not output:
        raise ConfigError("poison needs a source and an output: eclipse-ray poison NAME SRC DST")
    refuse_existing(Store(output))
    source = open_source(source_url, config.data)
    classes = _class_count(source, config)
    images = write_dataset(output, _poisoned(source, config, classes), classes=source.classes, source=source_url)
    return DatasetResult(images, output, {"poison": config.poison.name, "classes": classes})


def _poisoned(source: Source, config: Config, classes: int) -> Iterator[pa.Table]:
    for table in read_tables(source, config.data):
        ids: list[str] = table["id"].to_pylist()
        labels = table["label"].to_numpy()
        decoded = [
            decode_resized(source.url, name, data, config.data)
            for name, data in zip(ids, image_bytes(table), strict=True)
        ]
        encoded: dict[int, bytes] = {}
        for indices in same_size_batches(decoded, len(decoded)):
            poisoned = poison_images(
                torch.from_numpy(np.stack([decoded[index] for index in indices])),
                torch.from_numpy(labels[indices]),
                [ids[index] for index in indices],
                config.poison,
                config.run.seed,
                classes,
            )
            encoded.update(
                (index, encode_image(image, "png")) for index, image in zip(indices, poisoned.numpy(), strict=True)
            )
        extras = table.drop_columns([name for name in CANONICAL if name in table.column_names])
        ordered = [encoded[index] for index in range(len(ids))]
        yield canonical_table(ids, ordered, table["label"], extras, source.classes)


def _class_count(source: Source, config: Config) -> int:
    """Number of classes: the named ones, or one more than the largest label."""
    largest = -1
    for table in read_tables(source, config.data):
        if "label" not in table.column_names or table["label"].null_count:
            raise InputError(f"{source.url}: a poison needs a label for every image; add them or name the column")
        largest = max(largest, int(table["label"].to_numpy().max()))
    return max(largest + 1, len(source.classes or []))
