"""What kind of output folder this is, and what a report reads of it: settings, versions, ledger, some images."""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from eclipse_ray import ledger
from eclipse_ray.config import Config, DataConfig, Settings, with_overrides
from eclipse_ray.datasets.formats import FORMATS, PASSED_OVER, Source, open_source, read_parts
from eclipse_ray.datasets.images import decode_required
from eclipse_ray.datasets.memory import decode_resized
from eclipse_ray.datasets.table import Span, image_bytes, read_note
from eclipse_ray.diffusion.checkpoint import CARD_FILE, SCHEDULER_FILE, Card, parse_schedule
from eclipse_ray.diffusion.process import cosine_alphas_cumprod
from eclipse_ray.errors import EclipseError, InputError, did_you_mean
from eclipse_ray.ledger import layout
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


class Folder(NamedTuple):
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
            f"{url}: no output of train, purify, evaluate, sweep, audit or demo here that could be reported"
            f"{did_you_mean(url) or '; check the location, or run its command to the end'}"
        )
    return Folder(store, kind)


def kind_of(store: Store) -> str | None:
    """Return the kind of output in `store`, None if it is none."""
    return next((kind for kind, marks in MARKS.items() if all(map(store.exists, marks))), None)


def read_mapping(store: Store, key: str) -> dict[str, Any]:
    """Return the JSON object or YAML mapping `key`. Raises InputError if it is missing or damaged."""
    data = layout.read_optional(store, key) or b""
    try:
        tree = json.loads(data) if key.endswith(".json") else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError):
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
Floats = NDArray[np.float64]

SHARDS, IMAGES_OF_A_SHARD = 4, 16
"""At most this many shards, spread over the run, are sampled, and at most this many images of each."""
MOST, LEAST = 10, 5
"""This many of the most and of the least changed images are shown."""
FAILURES_SHOWN = 200
"""At most this many failed images are listed."""


class Sample(NamedTuple):
    """One image (H, W, 3) before and after purification, clean if a clean copy is known, and its change in dB."""

    id: str
    label: int | None
    before: Pixels
    after: Pixels
    clean: Pixels | None = None
    psnr: float = math.nan


class Noise(NamedTuple):
    """How the run added noise: alphas_cumprod (T,), depth, steps, sampler; `note` says what is assumed."""

    alphas_cumprod: Floats
    t_star: int
    num_inference_steps: int
    sampler: str
    note: str


class Purification:
    """A purification, finished or not. Raises InputError or StorageError if its ledger is damaged.

    `moved` are settings with the present places of its source and its denoiser. `origin` is the dataset that the
    source was made from; None means the one that the source names, if this package poisoned it.

    `samples` are images of a few shards, `most` and `least` the most and the least changed images, `notes`
    sentences on what could not be read, `failures` the first error rows. `changes` has one row per image, with
    the columns of `ledger.CHANGES_SCHEMA`.
    """

    def __init__(self, store: Store, moved: Settings | None = None, origin: str | None = None) -> None:
        self.store = store
        self.plan, self.statuses = ledger.read_plan(store), ledger.read_statuses(store)
        self.config = with_overrides(ledger.read_settings(store) or Config(), moved or {})
        self.noise = _noise(store, self.config)
        self.passed_over = store.read(PASSED_OVER).decode() if store.exists(PASSED_OVER) else ""
        self.done = [self.statuses[shard.name] for shard in self.plan.shards if shard.name in self.statuses]
        """Statuses of the planned shards that are committed, in plan order."""
        self.planned = sum(shard.rows for shard in self.plan.shards)
        self.ok, self.failed = sum(status.ok for status in self.done), sum(status.failed for status in self.done)
        failures = (failure for status in self.done for failure in ledger.read_failures(store, status))
        self.failures = list(islice(failures, FAILURES_SHOWN))
        self.notes: list[str] = []
        self.samples = self._sampled(origin)
        self.changes = ledger.read_changes(store, self.done)
        self.most, self.least = self._extremes()

    @property
    def paired(self) -> list[Sample]:
        """The samples that have a clean copy."""
        return [sample for sample in self.samples if sample.clean is not None]

    def class_name(self, label: int | None) -> str:
        """Return the name of a class, empty for an image without a label."""
        if label is None or label < 0:
            return ""
        classes = self.plan.classes or ()
        return classes[label] if label < len(classes) else f"class {label}"

    def _extremes(self) -> tuple[list[Sample], list[Sample]]:
        """Return the most changed images, the most changed first, and the least changed, the least first."""
        good = self.changes.filter(self.changes["psnr"].is_valid())
        good = good.sort_by([("psnr", "ascending"), ("id", "ascending")])
        rows = [*range(min(MOST, len(good))), *range(max(MOST, len(good) - LEAST), len(good))]
        shown = good.take(pa.array(rows, pa.int64())).to_pylist()
        images: dict[str, Sample] = {}
        if self.config.data.source:
            places: dict[str, list[Span]] = {}
            for row in shown:
                places.setdefault(row["shard"], []).append((row["key"], row["row"], row["row"] + 1))
            images = {sample.id: sample for found in self._read(places).values() for sample in found}
        found = [images[row["id"]]._replace(psnr=row["psnr"]) if row["id"] in images else None for row in shown]
        most, least = found[:MOST], found[: MOST - 1 : -1]
        return [sample for sample in most if sample], [sample for sample in least if sample]

    def _sampled(self, origin: str | None) -> list[Sample]:
        """Return images of at most SHARDS committed shards, with clean copies where these are known.

        Clean copies are taken from `origin`, or from the dataset that `eclipse-ray poison` made the source from.
        """
        if not self.config.data.source:
            self.notes.append("The settings of the run name no source, so no image can be shown as it was.")
            return []
        base = self.plan.base
        chosen = {base[index].name: index for index in spread(len(base), SHARDS)}
        whole = {status.shard for status in self.done if status.object}
        spans = {name: [span.row()[:3] for span in base[i].spans] for name, i in chosen.items() if name in whole}
        found = self._read({name: _rows_at(each, 0) for name, each in spans.items()})
        samples = [sample for drawn in found.values() for sample in drawn]
        try:
            origin = origin or _origin(self.config.data.source)
            clean = open_source(origin, self.config.data) if origin else None
            if clean and clean.images == sum(shard.rows for shard in base):
                offsets = {name: sum(shard.rows for shard in base[: chosen[name]]) for name in found}
                samples = [
                    sample for name, drawn in found.items() for sample in _with_clean(drawn, clean, offsets[name])
                ]
        except (EclipseError, OSError) as error:
            self.notes.append(f"What the source was made from cannot be read any more: {error}.")
        if all(sample.clean is None or np.array_equal(sample.clean, sample.before) for sample in samples):
            return [sample._replace(clean=None) for sample in samples]
        return samples

    def _read(self, places: Mapping[str, Sequence[Span]]) -> dict[str, list[Sample]]:
        """Return images by shard from these places in the source; what cannot be read any more is noted."""
        found: dict[str, list[Sample]] = {}
        for shard, spans in places.items():
            try:
                found[shard] = self._pairs(self.statuses[shard], spans)
            except (EclipseError, OSError) as error:
                self.notes.append(f"Images of shard {shard} cannot be shown: {error}.")
        return found

    def _pairs(self, status: ledger.Status, spans: Sequence[Span]) -> list[Sample]:
        """Return the purified images of `spans`, and what they were before, if both have the same size."""
        data = self.config.data
        base, name = _location(str(data.source), spans[0][0])
        before = read_parts(Source(base, name, self.plan.classes, data), spans)
        after = ledger.read_object(self.store, status)
        assert after is not None, "a shard without purified images was asked for"
        place = {id: row for row, id in enumerate(after["id"].to_pylist())}
        before = before.filter(pc.is_in(before["id"], pa.array(list(place), pa.string())))
        ids: list[str] = before["id"].to_pylist()
        after = after.take(pa.array([place[id] for id in ids], pa.int64()))
        labels = before["label"].to_pylist() if "label" in before.column_names else [None] * len(ids)
        found = []
        for id, label, old, new in zip(ids, labels, image_bytes(before), image_bytes(after), strict=True):
            one = decode_resized(base, id, old, data)
            two = decode_required(f"{self.store.url}: image {id}", new, DataConfig())
            found += [Sample(id, label, one, two)] if one.shape == two.shape else []
        return found


def _with_clean(drawn: Sequence[Sample], clean: Source, offset: int) -> list[Sample]:
    """Return the first images of a shard that begins at row `offset` with the clean images of the same ids."""
    spans = _rows_at([(part.key, 0, part.rows) for part in clean.parts], offset)
    table = read_parts(clean, spans)
    encoded = dict(zip(table["id"].to_pylist(), image_bytes(table), strict=True))
    found = []
    for sample in drawn:
        known = sample.id in encoded
        copy = decode_resized(clean.url, sample.id, encoded[sample.id], clean.data) if known else None
        fits = copy is not None and copy.shape == sample.before.shape
        found.append(sample._replace(clean=copy if fits else None))
    return found


def _origin(source: str) -> str | None:
    """Return the location that `source` says it was made from, image by image; None if it says nothing."""
    store = Store(source)
    origin = None if store.is_file() else read_note(store).get("source")
    return origin if isinstance(origin, str) else None


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


def _rows_at(spans: Sequence[Span], offset: int) -> list[Span]:
    """Return where the IMAGES_OF_A_SHARD rows lie that begin at row `offset` of `spans`."""
    found: list[Span] = []
    for key, start, stop in spans:
        first, last = start + max(offset, 0), min(start + offset + IMAGES_OF_A_SHARD, stop)
        if first < last:
            found.append((key, first, last))
        offset -= stop - start
    return found


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` evenly spread places in 0 .. count - 1, beginning with 0."""
    return sorted({index * count // wanted for index in range(wanted)}) if count else []


def _noise(store: Store, config: Config) -> Noise:
    # The fingerprint has the resolved numbers; the settings may leave them to the denoiser.
    used: dict[str, Any] = ledger.read_fingerprint(store).config.get("purify", {})
    alphas, note = None, ""
    try:
        folder = Store(config.purify.denoiser) if config.purify.denoiser else None
        data = layout.read_optional(folder, SCHEDULER_FILE) if folder else None
        if folder and data is not None:
            alphas = parse_schedule(folder.path(SCHEDULER_FILE), data).numpy()
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
