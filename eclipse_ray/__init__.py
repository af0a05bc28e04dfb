"""Purify availability-poisoned image datasets with sparse diffusion denoisers, on Ray.

The verbs of `eclipse_ray.verbs`, and what is listed below. Nothing heavy is imported before it is used:
`load_denoiser` and `purify_images` need neither Ray nor Arrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eclipse_ray.config import Config as Config
    from eclipse_ray.config import load_config as load_config
    from eclipse_ray.diffusion.checkpoint import load_denoiser as load_denoiser
    from eclipse_ray.diffusion.noise import noise as noise
    from eclipse_ray.diffusion.sampling import purify_images as purify_images
    from eclipse_ray.verbs import *  # noqa: F403

__version__ = "0.1.0"

_HOMES = {
    "Config": "eclipse_ray.config",
    "load_config": "eclipse_ray.config",
    "load_denoiser": "eclipse_ray.diffusion.checkpoint",
    "noise": "eclipse_ray.diffusion.noise",
    "purify_images": "eclipse_ray.diffusion.sampling",
}


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        verbs = vars(import_module("eclipse_ray.verbs"))
        public = verbs.get("PUBLIC", ())
        if name != "__all__" and name not in public:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = [*_HOMES, *public] if name == "__all__" else verbs[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
