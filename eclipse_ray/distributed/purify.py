"""Ray Data streams shards through decode, the denoising actor pool, encode and commit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from eclipse_ray import ledger
from eclipse_ray.config import Config, to_yaml
from eclipse_ray.data.formats import Source, open_source, read_parts
from eclipse_ray.data.images import ImageError, centre_crop, check_encoding, decode_stored, resize_image
from eclipse_ray.data.store import Store
from eclipse_ray.diffusion.checkpoint import load_denoiser, read_card, weights_digest
from eclipse_ray.diffusion.model import Denoiser
from eclipse_ray.diffusion.sampler import ENGINE_VERSION, check_depth, purify_images
from eclipse_ray.diffusion.tiling import MIN_SIDE
from eclipse_ray.distributed.cluster import Resources, connect, refuse_process_local, require_cpus
from eclipse_ray.distributed.fetch import local_denoiser
from eclipse_ray.distributed.progress import ProgressLine, say
from eclipse_ray.distributed.purifier import Purifier
from eclipse_ray.distributed.stages import (
    Job,
    Pixels,
    encode_and_commit,
    read_and_decode,
    same_size_batches,
    shard_rows,
)
from eclipse_ray.errors import ConfigError, EclipseError, InputError
from eclipse_ray.results import PurifyResult

SAMPLES = 64
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
# Removing a poison within 8/255 is no sign of a wrong denoiser; this is its energy if uniform, on [-1, 1].
POISON_MSE = (2 * 8 / 255) ** 2 / 3
WARN_DB = 3.0
# Reading and encoding mostly wait; and a share other than the actors' keeps Ray from fusing them into the actors.
IO_CPUS = 0.5


def purify(config: Config) -> PurifyResult:
    """Purify data.source into data.output with purify.denoiser; the same command resumes what it began.

    Raises ConfigError or InputError before anything is written for unusable input, ResumeError if the output
    belongs to another run.
    """
    source, output, denoiser_url = _locations(config)
    check_encoding(config.data.encoding, config.data.allow_lossy)
    folder = local_denoiser(denoiser_url)
    denoiser = load_denoiser(folder)
    t_star, steps = check_depth(denoiser, config.purify.t_star, config.purify.num_inference_steps)
    sampler = config.purify.sampler or denoiser.sampler
    opened = open_source(source, config.data)
    samples = _read_samples(opened, config)
    _check_sizes(source, samples)
    images_per_shard = _images_per_shard(config, samples)
    shards = ledger.plan_shards(opened.parts, images_per_shard)

    store = Store(output)
    refuse_process_local(output, store.in_this_process_only)
    resolved = config.model_copy(deep=True)
    resolved.purify = config.purify.model_copy(
        update={"t_star": t_star, "num_inference_steps": steps, "sampler": sampler}
    )
    fingerprint = _fingerprint(resolved, images_per_shard, shards, weights_digest(folder))
    ledger.open_run(store, shards, fingerprint, to_yaml(resolved))
    statuses = ledger.read_statuses(store)
    pending = ledger.pending(shards, statuses)
    rate = 0.0
    if pending:
        crops = [sample.crop for sample in samples]
        _warn_if_unsuitable(denoiser, crops, read_card(folder).denoise_psnr, t_star)
        job = Job(
            source=opened.url,
            format=opened.format,
            classes=None if opened.classes is None else tuple(opened.classes),
            data=config.data,
            output=store.url,
            denoiser=denoiser_url,
            t_star=t_star,
            num_inference_steps=steps,
            sampler=sampler,
            batch_size=config.purify.batch_size,
            batch_pixels=config.purify.batch_pixels,
            precision=config.purify.precision,
            tile=config.purify.tile,
            tile_overlap=config.purify.tile_overlap,
            seed=config.run.seed,
            compensation=config.compensation,
            sparse_hashes=frozenset(read_card(folder).sparse_hashes),
        )
        rate = _run(config, job, shards, pending)
    ledger.finalise(store)
    summary = ledger.summarise(store)
    return PurifyResult(summary.planned, summary.ok, summary.failed, round(rate, 2), store.url)


def _locations(config: Config) -> tuple[str, str, str]:
    data, purify_config = config.data, config.purify
    for name, value in (
        ("data.source", data.source),
        ("data.output", data.output),
        ("purify.denoiser", purify_config.denoiser),
    ):
        if not value:
            raise ConfigError(f"{name} is not set; usage: eclipse-ray purify SRC DST --denoiser DIR")
    return str(data.source), str(data.output), str(purify_config.denoiser)


@dataclass(frozen=True)
class Sample:
    """An image looked at before the run: its size in pixels, and its middle, at most SAMPLE_SIDE a side."""

    height: int
    width: int
    crop: Pixels


def _read_samples(source: Source, config: Config) -> list[Sample]:
    """Return the first readable images, at most SAMPLES of them; only their middles are kept in memory."""
    samples: list[Sample] = []
    left = SAMPLES
    for part in source.parts[:SAMPLES]:
        rows = min(left, part.rows)
        table = read_parts(source.url, source.format, source.classes, [(part.key, 0, rows)], config.data)
        for image in table["image"].to_pylist():
            try:
                pixels = decode_stored((image or {}).get("bytes") or b"", config.data)
            except ImageError:
                # It will be an error row of its shard; here it only says nothing about size.
                continue
            pixels = resize_image(pixels, config.data.resize)
            samples.append(Sample(pixels.shape[0], pixels.shape[1], centre_crop(pixels, SAMPLE_SIDE)))
        left -= rows
        if left <= 0:
            break
    return samples


def _check_sizes(source: str, samples: list[Sample]) -> None:
    # Some that are too small become error rows; where all are, nothing would be left.
    if samples and all(min(sample.height, sample.width) < MIN_SIDE for sample in samples):
        raise InputError(
            f"{source}: images are {samples[0].width}x{samples[0].height} pixels; purification needs at least "
            f"{MIN_SIDE} on each side: enlarge them, for example with --resize 32"
        )


def _images_per_shard(config: Config, samples: list[Sample]) -> int:
    largest = max((3 * sample.height * sample.width for sample in samples), default=1)
    return max(1, min(config.purify.shard_images, config.purify.shard_bytes // largest))


def _fingerprint(
    config: Config, images_per_shard: int, shards: list[ledger.Shard], weights: str
) -> ledger.Fingerprint:
    """Everything that decides pixels or what the output says of itself; not how the work is spread."""
    data = config.data
    tree = {
        "purify": {
            "t_star": config.purify.t_star,
            "num_inference_steps": config.purify.num_inference_steps,
            "sampler": config.purify.sampler,
            "batch_size": config.purify.batch_size,
            "batch_pixels": config.purify.batch_pixels,
            "precision": config.purify.precision,
            "tile": config.purify.tile,
            "tile_overlap": config.purify.tile_overlap,
            "shard_images": images_per_shard,
        },
        "compensation": config.compensation.model_dump(mode="json"),
        "data": data.model_dump(mode="json", include=DATA_IN_FINGERPRINT),
        "run": {"seed": config.run.seed},
    }
    return ledger.Fingerprint(tree, weights, ledger.plan_digest(shards), ENGINE_VERSION)


def _warn_if_unsuitable(denoiser: Denoiser, samples: list[Pixels], heldout: float | None, t_star: int) -> None:
    """Warn when denoising changes real images far more than it did held-out clean ones (plus a poison).

    For an imported denoiser, whose held-out error nobody measured: more than the noise that it should remove.
    """
    batches = same_size_batches(samples, SAMPLES, SAMPLES * SAMPLE_SIDE**2)
    fitting = [batch for batch in batches if min(samples[batch[0]].shape[:2]) >= MIN_SIDE]
    if not fitting or t_star != denoiser.t_star:
        return
    images = np.stack([samples[index] for index in max(fitting, key=len)])
    ids = [f"sample-{index}" for index in range(len(images))]
    purified = purify_images(images, denoiser, t_star=t_star, num_inference_steps=1, ids=ids).numpy()
    error = float(np.mean(((purified.astype(np.float64) - images) / 127.5) ** 2))
    abar = float(denoiser.alphas_cumprod[t_star - 1])
    allowed = (1 - abar) / abar if heldout is None else 4 / 10 ** (heldout / 10)
    expected = allowed + POISON_MSE
    measured_db, expected_db = (10 * np.log10(4 / max(value, 1e-12)) for value in (error, expected))
    if measured_db < expected_db - WARN_DB:
        say(
            f"warning: denoising {len(images)} images of the source leaves {measured_db:.1f} dB, "
            f"{expected_db:.1f} dB were expected: was this denoiser trained on images of this kind?"
        )


def _run(config: Config, job: Job, shards: list[ledger.Shard], pending: list[ledger.Shard]) -> float:
    """Stream the pending shards; return images a second of this run."""
    resources = connect(config)
    actors, gpus = _pool(config, resources, len(pending))
    done = sum(shard.rows for shard in shards) - sum(shard.rows for shard in pending)
    total = sum(shard.rows for shard in shards)
    if done:
        say(f"purify: resuming, {len(shards) - len(pending)} of {len(shards)} shards are already committed")
    line = ProgressLine("purify", "images", total, config.run.progress_seconds, done)
    try:
        for ok, failed in _stream(config, job, pending, actors, gpus):
            line.advance(ok + failed, failed)
    except RayError as error:
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        raise EclipseError(f"purify stopped: {reason}; run the same command again to resume") from error
    return line.rate


def _pool(config: Config, resources: Resources, shards: int) -> tuple[int, float]:
    """Return (actors, GPUs of each); never more actors than there are shards to keep them busy."""
    gpus = config.purify.num_gpus
    if gpus is None:
        gpus = 1.0 if resources.gpus else 0.0
    if gpus > resources.gpus:
        raise ConfigError(f"purify.num_gpus {gpus:g}: the Ray cluster has {resources.gpus} GPUs")
    default = int(resources.gpus / gpus) if gpus else max(1, resources.cpus // 2)
    actors = min(config.purify.actors or default, shards)
    require_cpus(resources, actors + 1, f"purify with {actors} actors and a CPU task to read and encode")
    return actors, gpus


def _stream(
    config: Config, job: Job, pending: list[ledger.Shard], actors: int, gpus: float
) -> Iterator[tuple[int, int]]:
    """Yield (ok, failed) of each shard as it is committed."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = config.purify.watchdog_seconds
    dataset = ray.data.from_arrow(shard_rows(pending))
    dataset = dataset.map_batches(
        read_and_decode, fn_kwargs={"job": job}, batch_size=1, batch_format="pyarrow", num_cpus=IO_CPUS
    )
    dataset = dataset.map_batches(
        Purifier,
        fn_constructor_args=(job,),
        compute=ActorPoolStrategy(size=actors),
        batch_size=1,
        batch_format="pyarrow",
        num_gpus=gpus or None,
        num_cpus=None if gpus else 1,
    )
    dataset = dataset.map_batches(
        encode_and_commit, fn_kwargs={"job": job}, batch_size=1, batch_format="pyarrow", num_cpus=IO_CPUS
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            if row["fatal"]:
                raise InputError(row["fatal"])
            yield row["ok"], row["failed"]
