"""What a purification would take, from its plan and from some of its images purified and encoded here."""

from __future__ import annotations

import time
from dataclasses import dataclass

from eclipse_ray import ledger
from eclipse_ray.config import Config
from eclipse_ray.data.formats import read_tables
from eclipse_ray.data.images import ImageError, centre_crop, decode_stored, encode_image, resize_image
from eclipse_ray.data.table import image_bytes
from eclipse_ray.diffusion.model import default_device
from eclipse_ray.distributed.prepare import Prepared, largest_batch, prepare
from eclipse_ray.distributed.purifier import purify_batch
from eclipse_ray.distributed.shards import Pixels
from eclipse_ray.results import DryRunResult

ENCODED = 200
# Time on the device goes by pixels, so the middle of a large image says as much as all of it.
TIMED_SIDE = 256
TIMED = 64


@dataclass(frozen=True)
class Sampled:
    """Sums over the images looked at, and the middles of some of them."""

    images: int
    pixels: int
    encoded_bytes: int
    cpu_seconds: float
    middles: list[Pixels]


def estimate(config: Config, *, extend: bool = False) -> DryRunResult:
    """Return shards, bytes and times of what `purify` would do now; nothing is written. Raises what it raises."""
    prepared = prepare(config, extend=extend)
    shards = prepared.plan.shards
    statuses = ledger.read_statuses(prepared.store) if prepared.store.exists() else {}
    left = ledger.pending(shards, statuses)
    images = sum(shard.rows for shard in left)
    sampled = _sample(prepared)
    share = images / max(1, sampled.images)
    return DryRunResult(
        planned=sum(shard.rows for shard in shards),
        images_left=images,
        shards=len(shards),
        shards_left=len(left),
        input_bytes=sum(part.size for part in prepared.source.parts),
        output_bytes=round(share * sampled.encoded_bytes),
        cpu_hours=share * sampled.cpu_seconds / 3600,
        device_hours=share * sampled.pixels * _seconds_a_pixel(prepared, sampled.middles) / 3600,
        device=default_device().type,
        output=prepared.store.url,
    )


def _sample(prepared: Prepared) -> Sampled:
    """Decode and encode the first images, one at a time."""
    config = prepared.config
    started = time.process_time()
    images = pixels = size = 0
    middles: list[Pixels] = []
    for table in read_tables(prepared.source, config.data, max_images=ENCODED):
        for data in image_bytes(table):
            try:
                image = resize_image(decode_stored(data, config.data), config.data.resize)
            except ImageError:
                continue
            images, pixels = images + 1, pixels + image.shape[0] * image.shape[1]
            size += len(encode_image(image, config.data.encoding))
            if len(middles) < TIMED:
                middles.append(centre_crop(image, TIMED_SIDE))
        break
    return Sampled(images, pixels, size, time.process_time() - started, middles)


def _seconds_a_pixel(prepared: Prepared, middles: list[Pixels]) -> float:
    """Return the time on this machine's device for each pixel, after one pass to warm up."""
    settings = prepared.config.purify
    images = largest_batch(middles, settings.batch_size, settings.batch_pixels)
    if images is None:
        return 0.0
    ids = [f"timed-{index}" for index in range(len(images))]
    denoiser = prepared.denoiser.to(default_device())
    denoiser.precision = settings.precision
    for _ in range(2):
        started = time.perf_counter()
        purify_batch(denoiser, images, ids, settings, prepared.config.run.seed)
    return (time.perf_counter() - started) / (images.shape[0] * images.shape[1] * images.shape[2])
