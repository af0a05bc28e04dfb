"""What is settled before a purification starts: source, samples, plan, fingerprint, and the workers' job."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np

from eclipse_ray import ledger
from eclipse_ray.cluster.connect import check_denoiser, local_denoiser, refuse_process_local
from eclipse_ray.config import Config, DataConfig, content_hash, to_yaml
from eclipse_ray.datasets.formats import (
    PASSED_OVER,
    Source,
    open_source,
    read_parts,
    read_tables,
    refuse_repeated_ids,
)
from eclipse_ray.datasets.images import (
    ImageError,
    centre_crop,
    check_encoding,
    decode_stored,
    encode_image,
    resize_image,
)
from eclipse_ray.datasets.table import image_bytes
from eclipse_ray.diffusion.checkpoint import load_denoiser, read_card, weights_digest
from eclipse_ray.diffusion.network import Denoiser, default_device, set_precision
from eclipse_ray.diffusion.sampling import ENGINE_VERSION, check_tile, purify_images
from eclipse_ray.diffusion.tiling import MIN_SIDE, tiled_pixels
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.log import say
from eclipse_ray.purification.stages import Job, Pixels, purify_batch, same_size_batches
from eclipse_ray.results import DryRunResult
from eclipse_ray.storage.store import Store

SAMPLES = 64
# Samples come from at most this many objects, if an object holds more than one image.
SAMPLED_OBJECTS = 8
# Of larger images the middle is looked at, so that the check takes seconds whatever their size.
SAMPLE_SIDE = 64
DATA_IN_FINGERPRINT = {
    "alpha",
    "animated",
    "encoding",
    "extra_columns",
    "image_column",
    "label_column",
    "max_pixels",
    "resize",
    "tar_ids",
}
# Settings of `purify` that decide pixels or how the source is cut.
PURIFY_IN_FINGERPRINT = {
    "t_star",
    "num_inference_steps",
    "sampler",
    "batch_size",
    "batch_pixels",
    "precision",
    "tile",
    "tile_overlap",
    "shard_images",
    "shard_bytes",
}
# Where nothing is set, a source is cut into this many shards, if each then has as many images or decoded bytes as
# the fewest, and no more images than the most.
SHARDS, FEWEST_IMAGES, FEWEST_BYTES, MOST_IMAGES = 32, 512, 16 * 2**20, 4096
# Removing a poison within 8/255 is no sign of a wrong denoiser; this is its energy if uniform, on [-1, 1].
POISON_MSE = (2 * 8 / 255) ** 2 / 3
WARN_DB = 3.0


@dataclass(frozen=True)
class Sample:
    """An image read before the run: its size in pixels, and its middle of at most SAMPLE_SIDE pixels each way.

    `hash` is that of its content as it is stored, before it is resized.
    """

    id: str
    hash: str
    height: int
    width: int
    crop: Pixels


@dataclass(frozen=True)
class Prepared:
    """Everything that `purify` knows before it writes; `config` has the depth that the denoiser recommends."""

    config: Config
    source: Source
    samples: list[Sample]
    denoiser: Denoiser
    heldout_psnr: float | None
    store: Store
    plan: ledger.Plan
    fingerprint: ledger.Fingerprint
    job: Job

    def claim(self) -> None:
        """Make the output folder this run's, or find it so. Raises ResumeError if it is another's."""
        ledger.open_run(self.store, self.plan, self.fingerprint, to_yaml(self.config))
        if self.source.passed_over:
            self.store.write(PASSED_OVER, self.source.passed_over.encode())


def prepare(config: Config, *, extend: bool = False) -> Prepared:
    """List the source, load the denoiser and cut the plan; nothing is written.

    Raises ConfigError or InputError for unusable input, ResumeError if the output's plan lacks objects that the
    source has, unless `extend`.
    """
    source, output, denoiser_url = config.data.source, config.data.output, config.purify.denoiser
    if not (source and output and denoiser_url):
        named = {"data.source": source, "data.output": output, "purify.denoiser": denoiser_url}
        name = next(name for name, value in named.items() if not value)
        raise ConfigError(f"{name} is not set; usage: eclipse-ray purify SRC DST --denoiser DIR")
    check_encoding(config.data.encoding, config.data.allow_lossy)
    folder = local_denoiser(denoiser_url)
    denoiser, card = load_denoiser(folder), read_card(folder)
    config = _resolved(config, denoiser)
    opened = open_source(source, config.data)
    refuse_repeated_ids(opened)
    samples = read_samples(opened, config, SAMPLES)
    _check_sizes(source, samples)
    store = Store(output, config.purify.single_writer)
    refuse_process_local(output, store.in_this_process_only)
    most = _images_per_shard(config, samples, opened.images)
    plan = ledger.plan_source(store, opened.parts, most, opened.classes, extend)
    job = Job(
        source=replace(opened, parts=(), classes=plan.classes),
        output=store.url,
        denoiser=denoiser_url,
        purify=config.purify,
        seed=config.run.seed,
        compensation=config.compensation,
        sparse_hashes=frozenset(card.sparse_hashes),
    )
    # Workers look at every image; what these few show is refused before anything is written.
    for sample in samples:
        job.refuse_leakage(sample.id, sample.hash)
    fingerprint = _fingerprint(config, plan, weights_digest(folder))
    return Prepared(config, opened, samples, denoiser, card.denoise_psnr, store, plan, fingerprint, job)


def _resolved(config: Config, denoiser: Denoiser) -> Config:
    """Return the settings with the denoiser's recommendations where nothing was asked for."""
    t_star, steps = check_denoiser(denoiser, config)
    chosen = {"t_star": t_star, "num_inference_steps": steps, "sampler": config.purify.sampler or denoiser.sampler}
    return config.model_copy(update={"purify": config.purify.model_copy(update=chosen)}, deep=True)


def read_samples(source: Source, config: Config, count: int) -> list[Sample]:
    """Return the readable ones of `count` images, spread over the objects of the source; their middles are kept.

    Spread, because images of a class often lie together and have sizes of their own. Raises InputError if nothing
    can be read, or an object cannot where data.on_error is stop.
    """
    found: list[tuple[str, bytes]] = []
    # A few rows of a Parquet object take the time of a whole group of them.
    objects = count if source.images == len(source.parts) else SAMPLED_OBJECTS
    parts = source.parts[:: max(1, -(-len(source.parts) // objects))]
    left, read, refused = count, 0, None
    for number, part in enumerate(parts):
        rows = min(part.rows, -(-left // (len(parts) - number)))
        try:
            table = read_parts(source, [(part.key, 0, rows)])
        except InputError as error:
            if config.data.on_error == "stop":
                raise
            # Its images will be error rows; here it only says nothing about size.
            refused = refused or error
            continue
        read += 1
        left -= rows
        images = [(image or {}).get("bytes") or b"" for image in table["image"].to_pylist()]
        found += zip(table["id"].to_pylist(), images, strict=True)
    if refused and not read:
        raise refused
    return list(_decoded_apart(found, config.data))


def _decoded_apart(images: Sequence[tuple[str, bytes]], config: DataConfig) -> Iterator[Sample]:
    """Yield the readable images, decoded in another process: one that kills its decoder must not end the run.

    Workers find such an image and make it an error row; here it says nothing about size, as a damaged one.
    """
    while images:
        # A fork has everything imported already, and starts in milliseconds.
        with ProcessPoolExecutor(1, get_context("fork"), initializer=_leave_signals) as pool:
            waiting = [pool.submit(_sample, *image, config) for image in images]
            for number, result in enumerate(waiting, 1):
                try:
                    sample = result.result()
                except BrokenProcessPool:
                    images = images[number:]
                    break
                if sample is not None:
                    yield sample
            else:
                return


def _leave_signals() -> None:
    # Ctrl-C reaches every process of a terminal; the command itself says what happened, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _sample(name: str, image: bytes, config: DataConfig) -> Sample | None:
    try:
        stored = decode_stored(image, config)
        pixels = resize_image(stored, config.resize)
    except ImageError:
        return None
    return Sample(name, content_hash(stored), pixels.shape[0], pixels.shape[1], centre_crop(pixels, SAMPLE_SIDE))


def _check_sizes(source: str, samples: list[Sample]) -> None:
    # Some that are too small become error rows; where all are, nothing would be left.
    if samples and all(min(sample.height, sample.width) < MIN_SIDE for sample in samples):
        raise InputError(
            f"{source}: images are {samples[0].width}x{samples[0].height} pixels; purification needs at least "
            f"{MIN_SIDE} on each side: enlarge them, for example with --resize 32"
        )


def _images_per_shard(config: Config, samples: list[Sample], images: int) -> int:
    """Return the most images of a shard: those that are set, or a SHARDS-th of the source within bounds.

    A shard has its price whatever it holds, and yet sixteen actors should get two each.
    """
    sizes = [3 * sample.height * sample.width for sample in samples] or [1]
    usual = sum(sizes) / len(sizes)
    fitting = int(config.purify.shard_bytes / usual)
    fewest = min(FEWEST_IMAGES, int(FEWEST_BYTES / usual))
    most = config.purify.shard_images or min(max(fewest, -(-images // SHARDS)), MOST_IMAGES)
    return max(1, min(most, fitting))


def _fingerprint(config: Config, plan: ledger.Plan, weights: str) -> ledger.Fingerprint:
    """Everything that decides pixels or what the output says of itself; not how the work is spread."""
    # With its number, so that bytes of two versions with other defaults never stand in one folder.
    encoding = check_encoding(config.data.encoding, config.data.allow_lossy)
    tree = {
        "purify": config.purify.model_dump(mode="json", include=PURIFY_IN_FINGERPRINT),
        "compensation": config.compensation.model_dump(mode="json"),
        "data": {
            **config.data.model_dump(mode="json", include=DATA_IN_FINGERPRINT),
            **config.data.deciding_labels(),
            "encoding": encoding,
        },
        "run": {"seed": config.run.seed},
    }
    return ledger.Fingerprint(tree, weights, ledger.plan_digest(plan.base), ENGINE_VERSION)


def largest_batch(images: list[Pixels], batch_size: int, batch_pixels: int) -> Pixels | None:
    """Return the most images of one size that are large enough to purify, (B, H, W, 3), at most one batch."""
    batches = same_size_batches(images, batch_size, batch_pixels)
    fitting = [batch for batch in batches if min(images[batch[0]].shape[:2]) >= MIN_SIDE]
    return np.stack([images[index] for index in max(fitting, key=len)]) if fitting else None


def warn_if_unsuitable(
    denoiser: Denoiser, samples: list[Pixels], heldout: float | None, t_star: int | None
) -> None:
    """Warn when denoising changes real images far more than it did held-out clean ones (plus a poison).

    For an imported denoiser, whose held-out error nobody measured: more than the noise that it should remove.
    """
    images = largest_batch(samples, SAMPLES, SAMPLES * SAMPLE_SIDE**2)
    if images is None or t_star != denoiser.t_star:
        return
    ids = [f"sample-{index}" for index in range(len(images))]
    purified = purify_images(images, denoiser, t_star=denoiser.t_star, num_inference_steps=1, ids=ids).numpy()
    error = float(np.mean(((purified.astype(np.float64) - images) / 127.5) ** 2))
    abar = float(denoiser.alphas_cumprod[denoiser.t_star - 1])
    allowed = (1 - abar) / abar if heldout is None else 4 / 10 ** (heldout / 10)
    expected = allowed + POISON_MSE
    measured_db, expected_db = (10 * np.log10(4 / max(value, 1e-12)) for value in (error, expected))
    if measured_db < expected_db - WARN_DB:
        say(
            f"warning: denoising {len(images)} images of the source leaves {measured_db:.1f} dB, "
            f"{expected_db:.1f} dB were expected: was this denoiser trained on images of this kind?"
        )


ENCODED = 200
# Time on the device goes by pixels, so the middle of a large image says as much as all of it.
TIMED_SIDE = 256
TIMED = 64


def estimate(config: Config, *, retry_failed: bool = False, extend: bool = False) -> DryRunResult:
    """Return shards, bytes and times of what `purify` would do now; nothing is written. Raises what it raises."""
    prepared = prepare(config, extend=extend)
    shards = prepared.plan.shards
    ledger.check_claim(prepared.store, prepared.fingerprint, shards)
    statuses = ledger.read_statuses(prepared.store) if prepared.store.exists() else {}
    left = ledger.pending(shards, statuses)
    if retry_failed:
        left += ledger.retriable(shards, statuses)
    images_left = sum(shard.rows for shard in left)
    images = pixels = size = 0
    middles: list[Pixels] = []
    started = time.process_time()
    for image in _first_images(prepared):
        images += 1
        pixels += _network_pixels(prepared, image)
        size += len(encode_image(image, config.data.encoding))
        if len(middles) < TIMED:
            middles.append(centre_crop(image, TIMED_SIDE))
    cpu_seconds = time.process_time() - started
    share = images_left / max(1, images)
    return DryRunResult(
        planned=sum(shard.rows for shard in shards),
        images_left=images_left,
        shards=len(shards),
        shards_left=len(left),
        input_bytes=sum(part.size for part in prepared.source.parts),
        output_bytes=round(share * size),
        cpu_hours=share * cpu_seconds / 3600,
        device_hours=share * pixels * _seconds_a_pixel(prepared, middles) / 3600,
        device=default_device().type,
        output=prepared.store.url,
    )


def _first_images(prepared: Prepared) -> Iterator[Pixels]:
    """Yield those of the first ENCODED images that can be decoded, one at a time."""
    data_config = prepared.config.data
    for table in itertools.islice(read_tables(prepared.source, max_images=ENCODED), 1):
        for data in image_bytes(table):
            with suppress(ImageError):
                yield resize_image(decode_stored(data, data_config), data_config.resize)


def _seconds_a_pixel(prepared: Prepared, middles: list[Pixels]) -> float:
    """Return the seconds per pixel of the network on the device of this machine, after one pass to warm up."""
    settings = prepared.config.purify
    images = largest_batch(middles, settings.batch_size, settings.batch_pixels)
    if images is None:
        return 0.0
    ids = [f"timed-{index}" for index in range(len(images))]
    denoiser = prepared.denoiser.to(default_device())
    set_precision(denoiser, settings.precision)
    for _ in range(2):
        started = time.perf_counter()
        purify_batch(denoiser, images, ids, settings, prepared.config.run.seed)
    return (time.perf_counter() - started) / (len(images) * _network_pixels(prepared, images[0]))


def _network_pixels(prepared: Prepared, image: Pixels) -> int:
    """Return the pixels that the network computes for an image, the overlaps of its tiles counted twice."""
    denoiser, overlap = prepared.denoiser, prepared.config.purify.tile_overlap
    tile = check_tile(denoiser, prepared.config.purify.tile, overlap)
    return tiled_pixels(image.shape[0], image.shape[1], tile, overlap, denoiser.size_multiple)
