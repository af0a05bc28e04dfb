"""What kind of output folder this is, and what it says of itself: settings, fingerprint, command, versions."""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from pydantic import ValidationError

from eclipse_ray.config import Config
from eclipse_ray.data.store import Store
from eclipse_ray.diffusion.checkpoint import CARD_FILE, SCHEDULER_FILE, Card, parse_schedule
from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout
from eclipse_ray.report.measures import Floats
from eclipse_ray.results import EVALUATION_FILE

COMMAND = f"{layout.PRIVATE}/command.json"
AUDIT = "audit.json"
RESULTS, TABLE, BEST = "results.parquet", "table.md", "best.yaml"

# The first that fits wins: the demo holds other folders, and a sweep may keep purified ones.
MARKS = {
    "demo": ("demo.png",),
    "sweep": (BEST,),
    "audit": (AUDIT,),
    "matrix": (RESULTS, TABLE),
    "evaluate": (EVALUATION_FILE,),
    "purify": (layout.PLAN,),
    "train": (CARD_FILE,),
}
"""The objects by which each kind of output folder is known."""

PACKAGES = ("eclipse-ray", "torch", "diffusers", "ray", "pyarrow", "numpy", "pillow")
# Of a URL such as s3://key:secret@host/bucket.
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class Folder:
    """An output folder and its kind."""

    store: Store
    kind: str

    @property
    def name(self) -> str:
        """The last part of its location."""
        return self.store.url.rpartition("/")[2]

    def part(self, name: str) -> Folder | None:
        """Return the output folder `name` below this one, or None."""
        store = Store(f"{self.store.url}/{name}")
        kind = kind_of(store)
        return Folder(store, kind) if kind else None


def open_folder(url: str) -> Folder:
    """Return the output folder at `url`. Raises InputError if no command of ours has finished one there."""
    store = Store(url)
    kind = kind_of(store)
    if kind is None:
        raise InputError(
            f"{url}: no output of train, purify, evaluate, sweep, audit or demo here that could be reported; "
            "check the location, or run its command to the end"
        )
    return Folder(store, kind)


def kind_of(store: Store) -> str | None:
    """Return the kind of output in `store`, None if it is none."""
    for kind, marks in MARKS.items():
        if all(store.exists(mark) for mark in marks):
            return kind
    return None


def read_config(store: Store) -> Config | None:
    """Return the settings of the run in `store`, None if none are recorded. Raises InputError for others' keys."""
    text = layout.read_optional(store, layout.CONFIG)
    if text is None:
        return None
    try:
        return Config.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{store.path(layout.CONFIG)}: not settings of this version ({reason})") from error


def read_json(store: Store, key: str) -> dict[str, Any]:
    """Return the JSON object `key`. Raises InputError if it is missing or damaged."""
    data = layout.read_optional(store, key)
    try:
        tree = json.loads(data or b"")
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise InputError(f"{store.path(key)}: missing or damaged; run the command that writes it again")
    return tree


def read_card(store: Store) -> Card:
    """Return the card of the denoiser in `store`. Raises InputError if it is damaged."""
    try:
        return Card.model_validate_json(store.read(CARD_FILE))
    except ValidationError as error:
        raise InputError(f"{store.path(CARD_FILE)}: damaged; train the denoiser again") from error


def read_schedule(store: Store) -> Floats | None:
    """Return alphas_cumprod of the denoiser in `store`, float64 (T,), or None if there is none to be read."""
    data = layout.read_optional(store, SCHEDULER_FILE)
    if data is None:
        return None
    alphas: Floats = parse_schedule(store.path(SCHEDULER_FILE), data).numpy()
    return alphas


def record_command(url: str, command: str) -> None:
    """Leave word in a finished output folder: the command, versions, and when it ended (UTC)."""
    note = {"command": without_credentials(command), "finished": now(), **software()}
    Store(url).write(COMMAND, json.dumps(note, indent=2).encode())


def software() -> dict[str, Any]:
    """Return the versions of what computes here, and the platform."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"versions": found, "platform": f"{sys.platform} {platform.machine()}"}


def now() -> str:
    """Return the time as text, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def without_credentials(text: str) -> str:
    """Return `text` without the user names and passwords of URLs."""
    return _CREDENTIALS.sub("", text)
