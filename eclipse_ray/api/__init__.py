"""One function a verb, with the same names and defaults as the command line.

Every function takes `config` (a Config, or the path of a YAML file) and `settings` ({"section.key": value}), which
override it; arguments named here override both. Ray is imported by the verbs that need it, when they are called.
"""

from __future__ import annotations

from eclipse_ray.api.cluster import doctor, submit
from eclipse_ray.api.datasets import convert, poison, split
from eclipse_ray.api.method import dry_run, gc, import_checkpoint, purify, status, train, verify
from eclipse_ray.api.proof import audit, evaluate, evaluate_plan, report, sweep, sweep_plan
from eclipse_ray.api.settings import ConfigLike, resolve

__all__ = [
    "ConfigLike",
    "audit",
    "convert",
    "doctor",
    "dry_run",
    "evaluate",
    "evaluate_plan",
    "gc",
    "import_checkpoint",
    "poison",
    "purify",
    "report",
    "resolve",
    "split",
    "status",
    "submit",
    "sweep",
    "sweep_plan",
    "train",
    "verify",
]
