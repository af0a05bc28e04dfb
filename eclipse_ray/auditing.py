"""Audit a dataset: Ray Data streams a random sample of it through crops, and the driver scores and decides."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from eclipse_ray.cluster.connect import Resources, check_denoiser, connect, local_denoiser, refuse_process_local
from eclipse_ray.cluster.work import Watch, reaching, watched
from eclipse_ray.config import Config, content_hash
from eclipse_ray.datasets.formats import Source, open_source, read_parts, refuse_output
from eclipse_ray.datasets.images import ImageError, centre_crop, decode_stored, resize_image
from eclipse_ray.datasets.memory import random_chunks, require_classes, rows_in
from eclipse_ray.datasets.table import Span, image_bytes, labels_or_none
from eclipse_ray.detection import GRID, Finding, Images, Score, judge, score_images
from eclipse_ray.diffusion.checkpoint import load_denoiser, read_card
from eclipse_ray.diffusion.noise import uniform
from eclipse_ray.diffusion.tiling import MIN_SIDE
from eclipse_ray.errors import ConfigError, EclipseError, InputError, error_of_note, note_of_error
from eclipse_ray.log import counted, say
from eclipse_ray.progress import ProgressLine
from eclipse_ray.purification.run import IO_CPUS, dataset_of, on_actors, pool
from eclipse_ray.purification.stages import (
    DenoisingActor,
    FailureRow,
    Pixels,
    pack,
    purify_batch,
    same_size_batches,
    unpack,
)
from eclipse_ray.results import AuditResult
from eclipse_ray.storage.store import Store

# Timestep of the draws that choose the sample, far from those of any poison.
AUDIT_T = 2**30 + 32 * 2**16
CROPS_SCHEMA = pa.schema([("id", pa.string()), ("label", pa.int64()), ("draw", pa.float64())])


@dataclass(frozen=True)
class AuditJob:
    """What every worker must know; `keep` is the part of the rows that is looked at, 0-1."""

    source: Source
    keep: float
    config: Config


def read_crops(batch: pa.Table, job: AuditJob) -> pa.Table:
    """Return crops of the chosen rows of one chunk: id, label (-1: none) and draw, packed as one row."""
    try:
        return _read_crops([tuple(span) for span in json.loads(batch["spans"][0].as_py())], job)
    except EclipseError as error:
        return pack({"read": [0]}, CROPS_SCHEMA.empty_table(), [], [], note_of_error(error))


def _read_crops(spans: Sequence[Span], job: AuditJob) -> pa.Table:
    table = read_parts(job.source, spans)
    ids: list[str] = table["id"].to_pylist()
    draws = uniform(job.config.run.seed, ids, AUDIT_T, (1,))[:, 0].tolist()
    kept: list[dict[str, object]] = []
    crops: list[Pixels] = []
    failures: list[FailureRow] = []
    for name, label, draw, encoded in zip(ids, labels_or_none(table), draws, image_bytes(table), strict=True):
        if draw >= job.keep:
            continue
        try:
            crops.append(_crop(encoded, job.config))
            kept.append({"id": name, "label": label, "draw": draw})
        except ImageError as error:
            failures.append({"id": name, "error": str(error)})
    return pack({"read": [len(ids)]}, pa.Table.from_pylist(kept, CROPS_SCHEMA), crops, failures)


def _crop(encoded: bytes, config: Config) -> Pixels:
    """Return the middle of an image, square, its side a multiple of GRID. Raises ImageError for a small one."""
    image = resize_image(decode_stored(encoded, config.data), config.data.resize)
    side = min(config.audit.crop, *image.shape[:2]) // GRID * GRID
    if side < MIN_SIDE:
        raise ImageError(
            f"{image.shape[1]}x{image.shape[0]} pixels are too few to look at, {MIN_SIDE} a side are needed"
        )
    return centre_crop(image, side)


class Denoised(DenoisingActor):
    """The actor of an audit with a denoiser: adds to each crop what remains of it."""

    def __init__(self, job: AuditJob) -> None:
        folder, self.settings, self.seed = job.config.audit.denoiser, job.config.purify, job.config.run.seed
        assert folder is not None
        super().__init__(folder, self.settings)

    def handle(self, batch: pa.Table) -> pa.Table:
        """Return the row with each crop followed, in a second half of the images, by its denoised form."""
        table, crops, failures = unpack(batch)
        ids: list[str] = table["id"].to_pylist()
        denoised: list[Pixels] = list(crops)
        for places in same_size_batches(crops, self.settings.batch_size, self.settings.batch_pixels):
            images = np.stack([crops[place] for place in places])
            done = self._symmetric(images, [ids[place] for place in places])
            for place, image in zip(places, done, strict=True):
                denoised[place] = image
        return pack({"read": batch["read"].to_pylist()}, table, [*crops, *denoised], failures)

    def _symmetric(self, images: Pixels, ids: Sequence[str]) -> Pixels:
        # The mean over both sides of the mirror, under the same noise, turns with the image: no network does by
        # itself, and the audit's null is about the mirror.
        straight = purify_batch(self.denoiser, images, ids, self.settings, self.seed)
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        turned = purify_batch(self.denoiser, mirrored, ids, self.settings, self.seed).flip(2)
        return ((straight.int() + turned.int() + 1) // 2).to(torch.uint8).numpy()


# Rows that are read for each one that is kept, so that rare classes keep enough.
SPARE = 3


@dataclass(frozen=True)
class Crop:
    """A crop of the sample: its id, label (-1: none), draw, pixels, and what a denoiser made of them or None."""

    id: str
    label: int
    draw: float
    pixels: Pixels
    denoised: Pixels | None


@dataclass(frozen=True)
class Audit:
    """A verdict, and what its picture is drawn from."""

    result: AuditResult
    sample: Images
    clean: Images | None


def audit(config: Config) -> Audit:
    """Score a class-balanced random sample of data.source, beside data.clean if there is one, and decide.

    Raises InputError for missing labels, too few images, and a clean set that shares images with the sample.
    """
    source, clean_url = config.data.source, config.data.clean
    if not source:
        raise ConfigError("audit needs a dataset: eclipse-ray audit SRC [--clean SRC]")
    for url in (source, clean_url):
        if url:
            refuse_output(url, config.audit.output)
            refuse_process_local(url, Store(url).in_this_process_only)
    if config.audit.output:
        Store(config.audit.output).require_writable()
    if config.audit.denoiser:
        # Found here, it takes no start of Ray.
        check_denoiser(load_denoiser(local_denoiser(config.audit.denoiser)), config)
    # A poison is what images of one label share.
    opened = open_source(source, config.data)
    require_classes(source, opened, 2, partly=True)
    crops = balanced(_crops(config, source, opened), config.audit.images, config.audit.classes)
    others: list[Crop] = []
    if clean_url:
        others = _crops(config, clean_url, open_source(clean_url, config.data))[: config.audit.images]
        _refuse_shared(source, clean_url, crops, others)
        if all(each.label < 0 for each in others):
            say(f"audit: {clean_url} has no labels, so that the sample cannot be compared with it; add them")
    side = common_side([*crops, *others])
    sample, clean = as_images(crops, side), as_images(others, side) if others else None
    say(f"audit: scoring {counted(len(sample.images), 'image')} of {side} px")
    scores = score_images(sample, clean, config.run.seed)
    finding = judge(sample, scores, config.audit.alpha)
    return Audit(_result(config, finding, scores, sample, clean), sample, clean)


def balanced(crops: Sequence[Crop], images: int, classes: int) -> list[Crop]:
    """Return at most `images` labelled crops of the `classes` largest classes, as even as they allow."""
    by_label: dict[int, list[Crop]] = defaultdict(list)
    for crop in sorted(crops, key=lambda crop: (crop.draw, crop.id)):
        if crop.label >= 0:
            by_label[crop.label].append(crop)
    largest = sorted(by_label, key=lambda label: (-len(by_label[label]), label))[:classes]
    share = -(-images // max(1, len(largest)))
    chosen = [crop for label in sorted(largest) for crop in by_label[label][:share]]
    return sorted(chosen, key=lambda crop: (crop.draw, crop.id))[:images]


def common_side(crops: Sequence[Crop]) -> int:
    """Return the side, in pixels, that all but 5 % of the crops have at least."""
    sides = sorted(crop.pixels.shape[0] for crop in crops)
    return sides[len(sides) // 20]


def as_images(crops: Sequence[Crop], side: int) -> Images:
    """Return the middle of every crop that is large enough, as tensors; labels unless none has one."""
    kept = [crop for crop in crops if crop.pixels.shape[0] >= side]
    labels = torch.tensor([crop.label for crop in kept])
    denoised = [crop.denoised for crop in kept if crop.denoised is not None]
    return Images(
        _tensor([crop.pixels for crop in kept], side),
        labels if bool((labels >= 0).any()) else None,
        _tensor(denoised, side) if denoised else None,
    )


def _tensor(pixels: Sequence[Pixels], side: int) -> torch.Tensor:
    return (
        torch.from_numpy(np.stack([centre_crop(each, side) for each in pixels])).permute(0, 3, 1, 2).contiguous()
    )


def _crops(config: Config, url: str, source: Source) -> list[Crop]:
    """Return a random part of a dataset, sorted by draw: SPARE times audit.images, or all there are."""
    chosen = random_chunks(source.parts, config.audit.images, config.run.seed)
    found = sum(rows_in(spans) for spans in chosen)
    keep = min(1.0, SPARE * config.audit.images / found)
    job = AuditJob(replace(source, parts=()), keep, config)
    crops: list[Crop] = []
    failed = 0
    every = config.run.progress_seconds
    with ProgressLine("audit: reading", "images", found, every, phase=reaching(config)) as line:
        resources = connect(config)
        line.phase = "first chunk"
        watch = Watch("audit", "chunk", config.run.watchdog_seconds)
        for part, failures, read in watched(_stream(job, chosen, resources), watch):
            crops += part
            failed += failures
            line.advance(read, failures)
    if failed:
        say(f"audit: {counted(failed, 'image')} of {url} left out as damaged or too small")
    if not crops:
        raise InputError(f"{url}: no image could be looked at; check that they decode and have 16 pixels a side")
    return sorted(crops, key=lambda crop: (crop.draw, crop.id))


def _stream(
    job: AuditJob, chunks: Sequence[Sequence[Span]], resources: Resources
) -> Iterator[tuple[list[Crop], int, int]]:
    """Yield (crops, failures, rows read) of each chunk."""
    rows = [pa.table({"spans": [json.dumps(spans)]}) for spans in chunks]
    dataset = dataset_of(rows).map_batches(
        read_crops, fn_kwargs={"job": job}, batch_size=1, batch_format="pyarrow", num_cpus=IO_CPUS
    )
    if job.config.audit.denoiser is not None:
        actors, gpus = pool(job.config, resources, len(chunks))
        dataset = on_actors(dataset, Denoised, job, actors, gpus)
    for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow"):
        if batch["fatal"][0].as_py():
            raise error_of_note(batch["fatal"][0].as_py())
        table, images, failures = unpack(batch)
        rest = images[table.num_rows :]
        denoised: list[Pixels | None] = [*rest] if rest else [None] * table.num_rows
        # Copies: a crop kept as a view would keep its whole chunk.
        crops = [
            Crop(row["id"], row["label"], row["draw"], image.copy(), None if clean is None else clean.copy())
            for row, image, clean in zip(table.to_pylist(), images[: table.num_rows], denoised, strict=True)
        ]
        yield crops, len(failures), batch["read"][0].as_py()


def _refuse_shared(source: str, clean_url: str, crops: Sequence[Crop], others: Sequence[Crop]) -> None:
    shared = {content_hash(crop.pixels) for crop in crops} & {content_hash(crop.pixels) for crop in others}
    if shared:
        raise InputError(
            f"{source}, {clean_url}: sample and clean set share {counted(len(shared), 'image')} (by content); a "
            "clean set is compared with the sample only if it is disjoint from it"
        )


def _result(
    config: Config, finding: Finding, scores: Sequence[Score], sample: Images, clean: Images | None
) -> AuditResult:
    folder, compensation = config.audit.denoiser, config.compensation
    recommended: dict[str, float | None] = {"t_star": None, "p": None, "sigma": None}
    if finding.verdict == "poisoned":
        t_star = read_card(local_denoiser(folder)).t_star if folder else config.denoiser.t_star
        recommended = {"t_star": t_star, "p": compensation.p, "sigma": compensation.sigma}
    assert sample.labels is not None, "the sample was chosen by its labels"
    return AuditResult(
        verdict=finding.verdict,
        p_value=finding.p_value,
        frequency=finding.frequency,
        scope=finding.scope,
        recommended=recommended,
        words=finding.words,
        images=len(sample.images),
        classes=len(torch.unique(sample.labels)),
        clean_images=0 if clean is None else len(clean.images),
        evidence=[asdict(score) for score in scores],
        output=config.audit.output,
    )
