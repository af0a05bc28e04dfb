"""Curves for TensorBoard, MLflow and Weights & Biases, of training, of victims and of a sweep's trials."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ray.train import Checkpoint, UserCallback

from eclipse_ray.config import LoggerName, digest
from eclipse_ray.errors import ConfigError
from eclipse_ray.log import say
from eclipse_ray.storage.store import Store

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
                    self.logs[name] = OPEN[name](self.folder, self.run)
                self.logs[name](plain, step)
            except Exception as error:  # noqa: BLE001 - a server of curves that is away must not end days of work
                say(f"note: {name} gets no more curves: {type(error).__name__}: {error}")
                self.names.remove(name)


def open_curves(names: Sequence[LoggerName], output: str | None, run: str = "") -> Curves:
    """Return what logs to run.loggers; `run` names the run there, as does `output` without one.

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


class TrainLogger(UserCallback):
    """Hands what the first worker reports to the curves, in the process that controls the training."""

    def __init__(self, curves: Curves) -> None:
        self.curves = curves

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Log one report; called by Ray Train when all workers have made it."""
        values = {key: value for key, value in metrics[0].items() if key != "iteration"}
        self.curves.log(values, int(metrics[0]["iteration"]))


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
