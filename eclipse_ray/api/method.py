"""The method's own verbs: train, import_checkpoint, purify, and what asks about a purification."""

from __future__ import annotations

from eclipse_ray.api.settings import ConfigLike, resolve
from eclipse_ray.config import (
    ScheduleName,
    Settings,
)
from eclipse_ray.results import (
    DryRunResult,
    GcResult,
    ImportResult,
    PurifyResult,
    StatusResult,
    TrainResult,
    VerifyResult,
)


def train(
    *,
    clean: str | None = None,
    out: str | None = None,
    resize: int | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> TrainResult:
    """Fit a denoiser on the sparse clean set `clean` and write it to `out`; the same call resumes."""
    from eclipse_ray import training as room

    named = {"data.clean": clean, "denoiser.output": out, "data.resize": resize}
    return room.train(resolve(config, settings, named))


def import_checkpoint(
    file: str,
    *,
    out: str,
    heads: int = 4,
    timesteps: int = 4000,
    schedule: ScheduleName = "cosine",
) -> ImportResult:
    """Turn weights of improved-diffusion or guided-diffusion, a local file, into the local denoiser `out`."""
    from eclipse_ray.diffusion import improved_diffusion as room

    return room.import_checkpoint(file, out=out, heads=heads, timesteps=timesteps, schedule=schedule)


def purify(
    source: str | None = None,
    output: str | None = None,
    *,
    denoiser: str | None = None,
    resize: int | None = None,
    retry_failed: bool = False,
    extend: bool = False,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> PurifyResult:
    """Purify every image of `source` into `output`; the same call resumes what it began.

    `retry_failed` does failed images again and keeps the bytes of the others; `extend` also purifies objects that
    the source has gained since the output was begun.
    """
    from eclipse_ray.purification import run as room

    resolved = resolve(config, settings, _purify_settings(source, output, denoiser, resize))
    return room.purify(resolved, retry_failed=retry_failed, extend=extend)


def dry_run(
    source: str | None = None,
    output: str | None = None,
    *,
    denoiser: str | None = None,
    resize: int | None = None,
    extend: bool = False,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> DryRunResult:
    """Return what `purify` would do and about how long it would take; nothing is written, no cluster is asked."""
    from eclipse_ray.purification import plan as room

    return room.estimate(
        resolve(config, settings, _purify_settings(source, output, denoiser, resize)), extend=extend
    )


def _purify_settings(
    source: str | None, output: str | None, denoiser: str | None, resize: int | None
) -> dict[str, str | int | None]:
    return {
        "data.source": source,
        "data.output": output,
        "purify.denoiser": denoiser,
        "data.resize": resize,
    }


def status(output: str) -> StatusResult:
    """Say how far the run in `output` is; works while it runs."""
    from eclipse_ray import ledger
    from eclipse_ray.storage.store import Store

    return ledger.summarise(Store(output))


def verify(output: str) -> VerifyResult:
    """Audit the output of a run from its bytes: counts, ids and hashes."""
    from eclipse_ray import ledger
    from eclipse_ray.storage.store import Store

    return ledger.verify(Store(output))


def gc(output: str, *, idle: bool = False) -> GcResult:
    """Remove what dead workers left in an output folder; nothing that a status names is ever touched.

    `idle` promises that no run is writing there: leftovers of unfinished shards and unfinished uploads go too.
    """
    from eclipse_ray import ledger
    from eclipse_ray.storage.store import Store

    store = Store(output)
    removed = ledger.collect(store, idle)
    return GcResult(removed, store.abort_uploads() if idle else 0, store.url)
