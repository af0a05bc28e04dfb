"""What all trials share: their part of the machine, and Ray Tune run so that it can be stopped."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from ray import tune

from eclipse_ray.cluster.connect import Resources, require_gpus
from eclipse_ray.cluster.work import message_of, on_a_thread

RETRIES = 2
"""How often a trial whose process died is begun again."""
GPU_SHARE = 0.25


def shares(num_gpus: float | None, max_concurrent: int | None, resources: Resources) -> tuple[float, int, int]:
    """Return (GPUs of a trial, trials at once, CPU threads of each); one thread unless fewer trials are asked for.

    The threads do not depend on how many trials are left, because floats summed by other threads differ. Raises
    ConfigError for GPUs where there are none.
    """
    require_gpus(resources, num_gpus or 0, f"num_gpus={num_gpus} of a trial")
    if resources.gpus and num_gpus != 0:
        gpus = num_gpus or GPU_SHARE
        room = max(1, int(resources.gpus / gpus))
        return gpus, min(room, max_concurrent or room), 1
    cores = resources.cores if resources.local else resources.cpus
    concurrent = min(cores, max_concurrent or cores)
    return 0.0, concurrent, max(1, resources.cores // concurrent)


def fit(
    name: str,
    trainable: Any,
    space: dict[str, Any],
    resources: dict[str, float],
    tune_config: Any,
    callbacks: Sequence[Any] = (),
) -> list[tuple[dict[str, Any], str]]:
    """Run the trials of `space` to their end; return the point and the message of each that failed.

    A trial that fails by itself reports a metric `error`; one whose process died is begun again RETRIES times.
    Raises EclipseError when Ray Tune itself stops.
    """
    _be_quiet()
    # Dead workers may still write there when it is deleted; nothing of Tune's is read again.
    with tempfile.TemporaryDirectory(prefix="eclipse-ray-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space=space,
            tune_config=tune_config,
            run_config=tune.RunConfig(
                name=name,
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=list(callbacks),
            ),
        )
        outcome = on_a_thread(tuner.fit, "Ray Tune")
    said = [(one, (one.metrics or {}).get("error")) for one in outcome]
    return [
        (one.config, message or message_of(one.error)) for one, message in said if message or one.error is not None
    ]


def _be_quiet() -> None:
    """Keep Ray Tune from writing and saying what nobody reads: the board of `progress` tells of every trial."""
    # A CSV and a JSON file for each trial, and then a warning of several lines that there are none.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # A box with its own settings and the name of a folder that is gone afterwards, which verbose=0 lets pass.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
