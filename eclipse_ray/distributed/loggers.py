"""Training curves for TensorBoard, MLflow and Weights & Biases, by a callback of Ray Train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ray.train import Checkpoint, UserCallback

from eclipse_ray.config import LoggerName
from eclipse_ray.data.store import Store
from eclipse_ray.errors import ConfigError

PROJECT = "eclipse_ray"
# The module that must be there, by the name in run.loggers.
MODULES: dict[LoggerName, str] = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}

Log = Callable[[Mapping[str, float], int], None]
"""Takes values by name, and the iteration that they are of."""


class TrainLogger(UserCallback):
    """Hands what the first worker reports to every logger, in the process that controls the training."""

    def __init__(self, names: Sequence[LoggerName], folder: str, run: str) -> None:
        self.names, self.folder, self.run = tuple(names), folder, run
        self.logs: list[Log] | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Log one report; called by Ray Train when all workers have made it."""
        if self.logs is None:
            # Not before: this object travels to the process that uses it, and open files do not.
            self.logs = [OPEN[name](self.folder, self.run) for name in self.names]
        values = {key: float(value) for key, value in metrics[0].items() if key != "iteration"}
        for log in self.logs:
            log(values, int(metrics[0]["iteration"]))


def train_loggers(names: Sequence[LoggerName], output: Store, run: str) -> list[UserCallback]:
    """Return the callbacks for run.loggers; `run`, a fingerprint, names the run there.

    Raises ConfigError if a library is missing here, or TensorBoard would have to write to no folder.
    """
    for name in names:
        if find_spec(MODULES[name]) is None:
            raise ConfigError(
                f"run.loggers: {name} needs {MODULES[name]}, which is not installed: pip install {MODULES[name]}"
            )
    if "tensorboard" in names and not output.local:
        raise ConfigError(
            f"run.loggers: tensorboard writes to a folder, and {output.url} is none; use mlflow or wandb"
        )
    return [TrainLogger(names, output.path("_eclipse/tensorboard"), run)] if names else []


def _tensorboard(folder: str, run: str) -> Log:
    writer = import_module("tensorboardX").SummaryWriter(f"{folder}/{run}")

    def log(values: Mapping[str, float], iteration: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, iteration)
        writer.flush()

    return log


def _mlflow(_folder: str, run: str) -> Log:
    mlflow = import_module("mlflow")
    mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=run)

    def log(values: Mapping[str, float], iteration: int) -> None:
        mlflow.log_metrics(dict(values), step=iteration)

    return log


def _wandb(_folder: str, run: str) -> Log:
    started = import_module("wandb").init(project=PROJECT, id=run, resume="allow")

    def log(values: Mapping[str, float], iteration: int) -> None:
        started.log(dict(values), step=iteration)

    return log


OPEN: dict[LoggerName, Callable[[str, str], Log]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
