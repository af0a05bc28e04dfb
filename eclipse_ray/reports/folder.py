"""What kind of output folder this is, and what a report reads of it: settings, versions, ledger, sample images."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from eclipse_ray import ledger
from eclipse_ray.config import Config, DataConfig, Settings, recorded_config, with_overrides
from eclipse_ray.datasets.formats import FORMATS, PASSED_OVER, Source, open_source, read_parts
from eclipse_ray.datasets.images import decode_required
from eclipse_ray.datasets.memory import decode_resized
from eclipse_ray.datasets.table import Span, image_bytes, read_note
from eclipse_ray.diffusion.checkpoint import CARD_FILE, SCHEDULER_FILE, Card, parse_schedule
from eclipse_ray.diffusion.process import cosine_alphas_cumprod
from eclipse_ray.errors import EclipseError, InputError
from eclipse_ray.ledger import layout
from eclipse_ray.reports.measures import Floats
from eclipse_ray.reports.tables import RESULTS, TABLE
from eclipse_ray.results import EVALUATION_FILE
from eclipse_ray.storage.store import Store

COMMAND = f"{layout.PRIVATE}/command.json"
AUDIT = "audit.json"
BEST = "best.yaml"

# The first kind whose objects are all there is taken, since a demo holds folders of other kinds.
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
    """Return the settings of the run in `store`, None if none are recorded.

    Settings that this version no longer has are left out. Raises InputError for a value that it does not know.
    """
    text = layout.read_optional(store, layout.CONFIG)
    if text is None:
        return None
    try:
        return recorded_config(yaml.safe_load(text))
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
    """Return alphas_cumprod of the denoiser in `store`, float64 (T,), or None if it has none."""
    data = layout.read_optional(store, SCHEDULER_FILE)
    if data is None:
        return None
    alphas: Floats = parse_schedule(store.path(SCHEDULER_FILE), data).numpy()
    return alphas


def record_command(url: str, command: str) -> None:
    """Write down in a finished output folder its command, the versions, and when it ended (UTC)."""
    note = {"command": without_credentials(command), "finished": now(), **software()}
    Store(url).write(COMMAND, json.dumps(note, indent=2).encode())


def software() -> dict[str, Any]:
    """Return the versions of Python and of the packages that compute, and the platform."""
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


Pixels = NDArray[np.uint8]

SHARDS, IMAGES_OF_A_SHARD = 4, 16
"""At most this many shards, spread over the run, are opened, and at most this many images of each are compared."""


@dataclass(frozen=True)
class Sample:
    """One image (H, W, 3) before purification, after it, and clean if a clean copy is known; `label` in words."""

    id: str
    label: str
    before: Pixels
    after: Pixels
    clean: Pixels | None


@dataclass(frozen=True)
class Samples:
    """Sampled images of a run, and sentences on what could not be read."""

    images: Sequence[Sample]
    notes: Sequence[str]

    @property
    def paired(self) -> list[Sample]:
        """The images that have a clean copy."""
        return [sample for sample in self.images if sample.clean is not None]


@dataclass(frozen=True)
class _Rows:
    """The first rows of a shard: their spans, and the place of the first one in the whole source."""

    offset: int
    spans: list[Span]


def draw_samples(
    store: Store,
    config: Config,
    plan: ledger.Plan,
    statuses: Mapping[str, ledger.Status],
    origin: str | None,
) -> Samples:
    """Return images of at most SHARDS committed shards of the purification in `store`, with their sources.

    Clean copies are taken from `origin`, or from the dataset that `eclipse-ray poison` made the source from, if it
    is still there. What cannot be read any more is left out and noted.
    """
    if not config.data.source:
        return Samples([], ["The settings of the run name no source, so no image can be shown as it was."])
    clean, notes = None, []
    try:
        clean = _clean_source(origin or _origin(config.data.source), config.data, plan)
    except (EclipseError, OSError) as error:
        notes.append(f"What the source was made from cannot be read any more: {error}.")
    found: list[Sample] = []
    for index in spread(len(plan.base), SHARDS):
        shard = plan.base[index]
        status = statuses.get(shard.name)
        if status is None or status.object is None:
            continue
        offset = sum(before.rows for before in plan.base[:index])
        try:
            found += _of_shard(store, config, plan.classes, status, _first_rows(shard, offset), clean)
        except (EclipseError, OSError) as error:
            notes.append(f"Images of shard {shard.name} cannot be shown: {error}.")
    if all(sample.clean is None or np.array_equal(sample.clean, sample.before) for sample in found):
        found = [replace(sample, clean=None) for sample in found]
        notes.append(
            "No clean copies of these images are known, as is usual for data from elsewhere: rows, curves and "
            "numbers that would need them are left out."
        )
    return Samples(found, notes)


def _of_shard(
    store: Store,
    config: Config,
    classes: Sequence[str] | None,
    status: ledger.Status,
    rows: _Rows,
    clean: Source | None,
) -> list[Sample]:
    base, name = _location(str(config.data.source), rows.spans[0][0])
    before = read_parts(base, name, classes, rows.spans, config.data)
    after = ledger.read_object(store, status)
    assert after is not None, "the caller looked"
    place = {id: row for row, id in enumerate(after["id"].to_pylist())}
    kept = [(row, place[id]) for row, id in enumerate(before["id"].to_pylist()) if id in place]
    purified = after.take([row for _, row in kept])
    originals = before.take([row for row, _ in kept])
    cleans = _clean_images(clean, config.data, rows, before)
    labels = originals["label"].to_pylist() if "label" in originals.column_names else [None] * len(kept)
    found = []
    for (row, _), id, label, old, new in zip(
        kept, originals["id"].to_pylist(), labels, image_bytes(originals), image_bytes(purified), strict=True
    ):
        sample = Sample(
            id=id,
            label=_class_name(label, classes),
            before=decode_resized(base, id, old, config.data),
            after=decode_required(f"{store.url}: image {id}", new, DataConfig()),
            clean=cleans[row] if cleans else None,
        )
        if sample.before.shape == sample.after.shape:
            fits = sample.clean is not None and sample.clean.shape == sample.before.shape
            found.append(sample if fits else replace(sample, clean=None))
    return found


def _clean_images(clean: Source | None, data: DataConfig, rows: _Rows, before: pa.Table) -> list[Pixels] | None:
    """Return the clean images at the places of `before`, None if their ids differ."""
    if clean is None:
        return None
    wanted = before["id"].to_pylist()
    table = read_parts(clean.url, clean.format, clean.classes, _rows_at(clean, rows.offset, len(wanted)), data)
    if table["id"].to_pylist() != wanted:
        return None
    return [decode_resized(clean.url, i, b, data) for i, b in zip(wanted, image_bytes(table), strict=True)]


def _origin(source: str) -> str | None:
    """Return the location that `source` says it was made from, image by image; None if it says nothing."""
    store = Store(source)
    origin = None if store.is_file() else read_note(store).get("source")
    return origin if isinstance(origin, str) else None


def _clean_source(origin: str | None, data: DataConfig, plan: ledger.Plan) -> Source | None:
    opened = open_source(origin, data) if origin else None
    return opened if opened and opened.images == sum(shard.rows for shard in plan.base) else None


def _location(source: str, key: str) -> tuple[str, str]:
    """Return (folder, format) of the object `key` of a source, without listing it again."""
    name = next((name for name, each in FORMATS.items() if each.claims(key)), None)
    store = Store(source)
    if name is None:
        raise InputError(f"{store.path(key)}: of no format that can be read")
    if store.exists() and not store.is_file():
        return store.url, name
    # One file, or a pattern of file names: keys are relative to their folder.
    return store.url.rpartition("/")[0] or "/", name


def _first_rows(shard: ledger.Shard, offset: int) -> _Rows:
    spans: list[Span] = []
    left = IMAGES_OF_A_SHARD
    for span in shard.spans:
        if not left:
            break
        stop = min(span.stop, span.start + left)
        spans.append((span.key, span.start, stop))
        left -= stop - span.start
    return _Rows(offset, spans)


def _rows_at(source: Source, offset: int, count: int) -> list[Span]:
    spans: list[Span] = []
    for part in source.parts:
        start, stop = max(offset, 0), min(offset + count, part.rows)
        if start < stop:
            spans.append((part.key, start, stop))
        offset -= part.rows
    return spans


def _class_name(label: int | None, classes: Sequence[str] | None) -> str:
    if label is None or label < 0:
        return ""
    return classes[label] if classes is not None and label < len(classes) else f"class {label}"


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` evenly spread places in 0 .. count - 1, beginning with 0."""
    return sorted({index * count // wanted for index in range(wanted)}) if count else []


FAILURES_SHOWN = 200
"""At most this many failed images are listed."""


@dataclass(frozen=True)
class Noise:
    """How the run added noise: alphas_cumprod (T,), depth, steps, sampler; `note` says what is assumed."""

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
    def passed_over(self) -> str:
        """A sentence on the files of the source that were not read, empty if all were."""
        return self.store.read(PASSED_OVER).decode() if self.store.exists(PASSED_OVER) else ""

    @property
    def failed(self) -> int:
        """Images that became error rows."""
        return sum(status.failed for status in self.done)


def read_purification(store: Store, moved: Settings | None = None, origin: str | None = None) -> Purification:
    """Return what is known of the run in `store`. Raises InputError or StorageError if the ledger is damaged.

    `moved` are settings with the present places of its source and its denoiser. `origin` is the dataset that the
    source was made from; None means the one that the source names, if this package poisoned it.
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
