"""Verbs that read one dataset and write another: convert, split, poison."""

from __future__ import annotations

from eclipse_ray.api.settings import ConfigLike, resolve
from eclipse_ray.config import (
    Config,
    Layout,
    Settings,
    to_yaml,
)
from eclipse_ray.results import (
    DatasetResult,
)


def convert(
    source: str,
    output: str,
    *,
    layout: Layout = "parquet",
    resize: int | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> DatasetResult:
    """Rewrite a dataset as canonical Parquet or in another layout; only `resize` touches pixels."""
    from eclipse_ray.datasets import write as room

    named = {"data.source": source, "data.output": output, "data.resize": resize}
    resolved = resolve(config, settings, named)
    images = room.convert(source, output, resolved.data, layout)
    return _recorded(resolved, DatasetResult(images, output))


def split(
    source: str,
    *,
    clean: int,
    output: str,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> DatasetResult:
    """Divide a dataset into output/clean and output/rest, disjoint by content, stratified by label."""
    from eclipse_ray.datasets import write as room

    resolved = resolve(config, settings, {"data.source": source, "data.output": output})
    counts = room.split(source, output, clean, resolved.run.seed, resolved.data)
    sizes = {"clean": int(counts["clean"]), "rest": int(counts["rest"])}
    return _recorded(resolved, DatasetResult(sum(sizes.values()), output, dict(sizes)))


def poison(
    name: str,
    source: str,
    output: str,
    *,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> DatasetResult:
    """Write a copy of a labelled dataset poisoned by `name`, its norm checked; the same call resumes.

    urp, lsp, ar and cuda are closed forms; em, tap, rem, sep, efp and adp are optimised over the whole dataset, as
    published or with poison.cost "reduced" for a CPU (docs/poisons.md).
    """
    from eclipse_ray import poisoning as room
    from eclipse_ray.poisons import resolved_poison

    named = {"poison.name": name, "data.source": source, "data.output": output}
    resolved = resolve(config, settings, named)
    resolved = resolved.model_copy(update={"poison": resolved_poison(resolved.poison)})
    return _recorded(resolved, room.poison(resolved))


def _recorded(config: Config, result: DatasetResult) -> DatasetResult:
    """Leave the resolved settings beside a dataset."""
    from eclipse_ray.storage.store import Store

    Store(result.output).write("_eclipse/config.yaml", to_yaml(config).encode())
    return result
