"""Everything a report says about a purification, read once: plan, statuses, samples, failures, noise schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eclipse_ray import ledger
from eclipse_ray.config import Config, Settings, with_overrides
from eclipse_ray.data.store import Store
from eclipse_ray.diffusion.schedule import cosine_alphas_cumprod
from eclipse_ray.errors import EclipseError
from eclipse_ray.report.folders import read_config, read_schedule
from eclipse_ray.report.measures import Floats
from eclipse_ray.report.samples import Samples, draw_samples

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
