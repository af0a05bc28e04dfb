"""What workers count while they purify. Ray exports it on every node's metrics port, each name after `ray_`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import ray
from ray.util.metrics import Counter, Histogram

COUNTERS = {
    "images": "Images purified and committed.",
    "failures": "Images that became error rows, by kind.",
    "shards": "Shards committed.",
    "read_bytes": "Encoded bytes of images read.",
    "written_bytes": "Bytes of data objects written.",
}
SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
HISTOGRAMS = {
    "denoise_seconds": "Seconds that an actor, hence its GPU, was busy with a shard.",
    "input_wait_seconds": "Seconds that an actor waited for its next shard.",
}
PREFIX = "eclipse_ray_"

# Words in an error row's reason, and the kind that dashboards show; anything else could not be decoded.
KINDS = (
    ("kills", "killed"),
    ("too little memory", "memory"),
    ("purification needs at least", "small"),
    ("more than data.max_pixels", "large"),
)


def kind_of(reason: str) -> str:
    """Return the kind of a failure: killed, memory, small, large or undecodable."""
    return next((kind for words, kind in KINDS if words in reason), "undecodable")


def count(name: str, value: float, run: str, kind: str | None = None) -> None:
    """Add to a counter of this process; nothing off a cluster."""
    if value and ray.is_initialized():
        _counter(name).inc(value, {"run": run, **({"kind": kind} if kind else {})})


def count_failures(reasons: Sequence[str], run: str) -> None:
    """Count failed images by kind."""
    kinds = [kind_of(reason) for reason in reasons]
    for kind in set(kinds):
        count("failures", kinds.count(kind), run, kind)


def observe(values: Mapping[str, float], run: str) -> None:
    """Record one value for each named histogram; nothing off a cluster."""
    if ray.is_initialized():
        for name, value in values.items():
            _histogram(name).observe(value, {"run": run})


# Made once a process, for Ray knows each by its name.
@cache
def _counter(name: str) -> Counter:
    tags = ("run", "kind") if name == "failures" else ("run",)
    return Counter(PREFIX + name, COUNTERS[name], tag_keys=tags)


@cache
def _histogram(name: str) -> Histogram:
    return Histogram(PREFIX + name, HISTOGRAMS[name], boundaries=list(SECONDS), tag_keys=("run",))
