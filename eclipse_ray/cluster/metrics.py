"""Numbers for other programs: what workers count, for Prometheus, and curves, for TensorBoard, MLflow and W&B.

Ray exports the counters on the metrics port of every node, each name after `ray_`. Curves are of training, of
victims and of trials.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

import ray
from ray.util.metrics import Counter, Histogram

from eclipse_ray.config import LoggerName, digest
from eclipse_ray.contact import first_contact
from eclipse_ray.errors import ConfigError
from eclipse_ray.log import say
from eclipse_ray.storage.store import Store

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


def count(name: str, value: float, run: str, kind: str | None = None) -> None:
    """Add to a counter of this process; nothing off a cluster."""
    if value and ray.is_initialized():
        _counter(name).inc(value, {"run": run, **({"kind": kind} if kind else {})})


def observe(values: Mapping[str, float], run: str) -> None:
    """Record one value for each named histogram; nothing off a cluster."""
    if ray.is_initialized():
        for name, value in values.items():
            _histogram(name).observe(value, {"run": run})


# Made once per process, because Ray knows each by its name.
@cache
def _counter(name: str) -> Counter:
    tags = ("run", "kind") if name == "failures" else ("run",)
    return Counter(PREFIX + name, COUNTERS[name], tag_keys=tags)


@cache
def _histogram(name: str) -> Histogram:
    return Histogram(PREFIX + name, HISTOGRAMS[name], boundaries=list(SECONDS), tag_keys=("run",))


PROJECT = "eclipse_ray"
# The module that must be there, by the name in run.loggers.
MODULES: dict[LoggerName, str] = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}

Log = Callable[[Mapping[str, float], int], None]
"""Takes values by name, and the iteration or epoch that they are of."""


class Curves:
    """Hands values to every logger that was asked for; one that fails is given up, and the work goes on."""

    def __init__(self, names: Sequence[LoggerName], folder: str, run: str) -> None:
        self.names, self.folder, self.run = list(names), folder, run
        # Opened by the first value: this object travels to the process that uses it, and open files do not.
        self.logs: dict[LoggerName, Log] = {}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values of one iteration or epoch; names are made of letters, digits, spaces and `_-./`."""
        plain = {re.sub(r"[^\w\-./ ]", "_", key.replace(", ", "/")): float(value) for key, value in values.items()}
        for name in list(self.names):
            try:
                if name not in self.logs:
                    opened = partial(OPEN[name], self.folder, self.run)
                    self.logs[name] = first_contact(f"{name} of run.loggers to answer", opened)
                self.logs[name](plain, step)
            except Exception as error:  # noqa: BLE001 - a server of curves that is away must not end days of work
                say(f"note: {name} gets no more curves: {type(error).__name__}: {error}")
                self.names.remove(name)


def open_curves(names: Sequence[LoggerName], output: str | None, run: str = "") -> Curves:
    """Return the curves for run.loggers. They bear the name `run`, or a hash of `output` if it is empty.

    Raises ConfigError if a library is missing here, or TensorBoard would have to write to no folder.
    """
    for name in names:
        if find_spec(MODULES[name]) is None:
            raise ConfigError(
                f"run.loggers: {name} needs {MODULES[name]}, which is not installed: pip install {MODULES[name]}"
            )
    store = Store(output) if output else None
    folder = store.path("_eclipse/tensorboard") if store is not None and store.local else ""
    if "tensorboard" in names and not folder:
        raise ConfigError(
            f"run.loggers: tensorboard writes to a folder, and {output} is none; use mlflow or wandb"
            if output
            else "run.loggers: tensorboard writes to a folder; give one with --out"
        )
    return Curves(names, folder, run or digest([output])[:16])


def _tensorboard(folder: str, run: str) -> Log:
    writer = import_module("tensorboardX").SummaryWriter(f"{folder}/{run}", flush_secs=1)

    def log(values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log


def _mlflow(_folder: str, run: str) -> Log:
    mlflow = import_module("mlflow")
    mlflow.set_experiment(PROJECT)
    # By its id: which run is active is a matter of threads.
    started = mlflow.start_run(run_name=run).info.run_id

    def log(values: Mapping[str, float], step: int) -> None:
        mlflow.log_metrics(dict(values), step=step, run_id=started)

    return log


def _wandb(_folder: str, run: str) -> Log:
    started = import_module("wandb").init(project=PROJECT, id=run, resume="allow")
    # Its own steps must not go back, and the epochs of several victims do.
    started.define_metric("*", step_metric="step")

    def log(values: Mapping[str, float], step: int) -> None:
        started.log({**values, "step": step})

    return log


OPEN: dict[LoggerName, Callable[[str, str], Log]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
