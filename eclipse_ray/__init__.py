"""Purify availability-poisoned image datasets with sparse diffusion denoisers, on Ray.

Nothing heavy is imported before it is used: `load_denoiser` and `purify_images` need neither Ray nor Arrow.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eclipse_ray.api import (
        audit,
        convert,
        doctor,
        dry_run,
        evaluate,
        evaluate_plan,
        gc,
        import_checkpoint,
        poison,
        purify,
        report,
        split,
        status,
        submit,
        sweep,
        sweep_plan,
        train,
        verify,
    )
    from eclipse_ray.config import Config, load_config
    from eclipse_ray.demonstration import demo
    from eclipse_ray.diffusion.checkpoint import load_denoiser
    from eclipse_ray.diffusion.noise import noise
    from eclipse_ray.diffusion.sampling import purify_images

__version__ = "0.1.0"

# Read when Ray is first imported. A thread of a run that was just stopped would otherwise start Ray again, or join
# a cluster of somebody else on this machine.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

_HOMES = {
    "audit": "eclipse_ray.api",
    "convert": "eclipse_ray.api",
    "doctor": "eclipse_ray.api",
    "dry_run": "eclipse_ray.api",
    "evaluate": "eclipse_ray.api",
    "evaluate_plan": "eclipse_ray.api",
    "gc": "eclipse_ray.api",
    "import_checkpoint": "eclipse_ray.api",
    "poison": "eclipse_ray.api",
    "purify": "eclipse_ray.api",
    "report": "eclipse_ray.api",
    "split": "eclipse_ray.api",
    "status": "eclipse_ray.api",
    "sweep": "eclipse_ray.api",
    "sweep_plan": "eclipse_ray.api",
    "submit": "eclipse_ray.api",
    "train": "eclipse_ray.api",
    "verify": "eclipse_ray.api",
    "demo": "eclipse_ray.demonstration",
    "Config": "eclipse_ray.config",
    "load_config": "eclipse_ray.config",
    "load_denoiser": "eclipse_ray.diffusion.checkpoint",
    "noise": "eclipse_ray.diffusion.noise",
    "purify_images": "eclipse_ray.diffusion.sampling",
}

__all__ = [
    "Config",
    "audit",
    "convert",
    "demo",
    "doctor",
    "dry_run",
    "evaluate",
    "evaluate_plan",
    "gc",
    "import_checkpoint",
    "load_config",
    "load_denoiser",
    "noise",
    "poison",
    "purify",
    "purify_images",
    "report",
    "split",
    "status",
    "submit",
    "sweep",
    "sweep_plan",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
