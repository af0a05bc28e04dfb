"""What kind of output folder this is, and what it says of itself: settings, fingerprint, command, versions."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from pydantic import ValidationError

from eclipse_ray import ledger
from eclipse_ray.config import Config, Settings, with_overrides
from eclipse_ray.diffusion.checkpoint import CARD_FILE, SCHEDULER_FILE, Card, parse_schedule
from eclipse_ray.diffusion.process import cosine_alphas_cumprod
from eclipse_ray.errors import EclipseError, InputError
from eclipse_ray.ledger import layout
from eclipse_ray.reports.measures import Floats
from eclipse_ray.reports.samples import Samples, draw_samples
from eclipse_ray.results import EVALUATION_FILE
from eclipse_ray.storage.store import Store

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


FAILURES_SHOWN = 200


@dataclass(frozen=True)
class Noise:
    """How the run noised: alphas_cumprod (T,), depth, steps, sampler; `note` says what had to be assumed."""

    alphas_cumprod: Floats
    t_star: int
    num_inference_steps: int
    sampler: str
    note: str


@dataclass(frozen=True)
class Purification:
    """A purification, finished or not; `failures` are the first FAILURES_SHOWN of its error rows."""

    store: Store
    config: Config
    shards: Sequence[ledger.Shard]
    statuses: Mapping[str, ledger.Status]
    samples: Samples
    failures: Sequence[ledger.ImageFailure]
    noise: Noise

    @property
    def done(self) -> list[ledger.Status]:
        """Statuses of the planned shards that are committed, in plan order."""
        return [self.statuses[shard.name] for shard in self.shards if shard.name in self.statuses]

    @property
    def planned(self) -> int:
        """Images of the plan."""
        return sum(shard.rows for shard in self.shards)

    @property
    def ok(self) -> int:
        """Purified images."""
        return sum(status.ok for status in self.done)

    @property
    def failed(self) -> int:
        """Images that became error rows."""
        return sum(status.failed for status in self.done)


def read_purification(store: Store, moved: Settings | None = None, origin: str | None = None) -> Purification:
    """Return what is known of the run in `store`. Raises InputError or StorageError if the ledger is damaged.

    `moved` are settings that say where its source and its denoiser lie by now, `origin` is where the images lie
    from which the source was made; it says so itself if it was poisoned by this package.
    """
    plan, statuses = ledger.read_plan(store), ledger.read_statuses(store)
    config = with_overrides(read_config(store) or Config(), moved or {})
    shards = plan.shards
    return Purification(
        store=store,
        config=config,
        shards=shards,
        statuses=statuses,
        samples=draw_samples(store, config, plan, statuses, origin),
        failures=_failures(store, [statuses[shard.name] for shard in shards if shard.name in statuses]),
        noise=_noise(store, config),
    )


def _failures(store: Store, statuses: Sequence[ledger.Status]) -> list[ledger.ImageFailure]:
    found: list[ledger.ImageFailure] = []
    for status in statuses:
        if len(found) >= FAILURES_SHOWN:
            break
        if status.errors_object:
            found += ledger.read_failures(store, status)
    return found[:FAILURES_SHOWN]


def _noise(store: Store, config: Config) -> Noise:
    # The fingerprint has the resolved numbers; the settings may leave them to the denoiser.
    used: dict[str, Any] = ledger.read_fingerprint(store).config.get("purify", {})
    alphas, note = None, ""
    try:
        alphas = read_schedule(Store(config.purify.denoiser)) if config.purify.denoiser else None
    except (EclipseError, OSError) as error:
        note = f" ({error})"
    if alphas is None:
        alphas = cosine_alphas_cumprod(config.denoiser.num_train_timesteps).numpy()
        note = f"The denoiser cannot be read any more{note}: a cosine schedule of T = {len(alphas):,} is assumed."
    return Noise(
        alphas_cumprod=alphas,
        t_star=min(int(used.get("t_star") or config.denoiser.t_star), len(alphas)),
        num_inference_steps=int(used.get("num_inference_steps") or 1),
        sampler=str(used.get("sampler") or "ddpm"),
        note=note,
    )
