"""The settings that a sweep tries: the space, its points, and the key of each trial. No Ray in here.

A key is a digest of everything that decides what a trial measures, and of nothing else: so a space that grows, or
is searched in another way, finds what it has measured before.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eclipse_ray.config import Config, Range, digest, with_overrides
from eclipse_ray.errors import ConfigError
from eclipse_ray.experiments.grid import VERSION, purification, trained_key

Space = dict[str, list[Any] | Range]
Point = dict[str, Any]

SPARSE_PERCENT = "sweep.sparse_percent"
PURIFY_AXES = ("t_star", "num_inference_steps", "sampler")
COMPENSATION_AXES = ("mode", "p", "sigma", "coarse_sigma", "coarse_grid")
NO_DENOISER_AXES = ("output", "num_workers", "use_gpu", "report_every", "checkpoint_every")
DRAWS_PER_TRIAL = 50
"""Random points drawn for each one wanted, before a small space counts as exhausted."""


@dataclass(frozen=True)
class Recommended:
    """What a denoiser's card says: trained range of t, and what purification takes where nothing is set."""

    t_max: int
    t_star: int
    num_inference_steps: int
    sampler: str


@dataclass(frozen=True)
class SweepFacts:
    """Digests of what trials are measured on, as grid.Facts.

    `sparse` identifies the images that train a denoiser here, by sparse_percent; `weights` and `recommended` are
    of a given denoiser, and empty and None when denoisers are trained here.
    """

    source: str
    scored: str
    sparse: Mapping[float | None, str]
    weights: str = ""
    recommended: Recommended | None = None


@dataclass(frozen=True)
class Trial:
    """One setting: its point, all settings resolved, and the keys of what it needs and of what it gives."""

    point: Point
    config: Config
    denoiser: str
    purified: str
    scored: str
    key: str

    @property
    def title(self) -> str:
        """The point in words."""
        return ", ".join(f"{key.split('.')[1]} {value}" for key, value in self.point.items())


def space_of(config: Config, recommended: Recommended | None) -> Space:
    """Return the space of the section `sweep`, or the default one. Raises ConfigError for axes that cannot be."""
    space = dict(config.sweep.space) or default_space(config, recommended)
    for key, values in space.items():
        section = key.split(".")[0]
        if not _is_axis(key):
            raise ConfigError(
                f"sweep.space: {key} is no axis; vary purify.{', '.join(PURIFY_AXES)}, "
                f"compensation.{', '.join(COMPENSATION_AXES)}, keys of denoiser, or {SPARSE_PERCENT}"
            )
        if _trains(key):
            if config.purify.denoiser:
                raise ConfigError(f"sweep.space varies {key}, which a given denoiser cannot: leave --denoiser out")
            if isinstance(values, Range) and values.step is None:
                raise ConfigError(f"sweep.space: {key} needs listed values or a step, as each trains a denoiser")
        if section == "compensation" and config.sweep.objective == "shortcut_score":
            raise ConfigError(
                f"sweep.space: shortcut_score looks at what purification removed and cannot judge {key}; use "
                "objective proxy_accuracy, which needs labelled clean images, or leave that axis out"
            )
    return space


def default_space(config: Config, recommended: Recommended | None) -> Space:
    """Return depths that the denoiser was trained for, few and more steps, and compensation if it is judged."""
    t_max = recommended.t_max if recommended else int(config.denoiser.t_max or 0)
    depths = sorted({max(1, round(part * t_max)) for part in (0.25, 0.5, 0.8)})
    steps = sorted({1, min(4, depths[0])})
    space: Space = {"purify.t_star": list(depths), "purify.num_inference_steps": list(steps)}
    if config.sweep.objective == "proxy_accuracy":
        space |= {"compensation.p": [0.2, 0.4, 0.6], "compensation.sigma": [0.05, 0.1]}
    return space


def training_points(space: Space) -> list[Point]:
    """Return every combination of the axes that decide how a denoiser is trained; one empty point without any."""
    axes = {key: listed(values) for key, values in space.items() if _trains(key)}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def deepest_points(space: Space) -> list[Point]:
    """Return a point for every denoiser to train: as deep as the space goes, with the fewest steps."""
    first: Point = {}
    for key, values in space.items():
        ends = [values.low, values.high] if isinstance(values, Range) else values
        first[key] = ends[0]
        if key in ("purify.t_star", "purify.num_inference_steps"):
            first[key] = max(ends) if key == "purify.t_star" else min(ends)
    return [first | point for point in training_points(space)]


def choose_trials(config: Config, space: Space, facts: SweepFacts) -> list[Trial]:
    """Return at most sweep.trials distinct trials of a grid, a random sample of a larger one, or random draws.

    Points with more steps than timesteps are left out. Raises ConfigError for other values that cannot be, and for
    a grid over a range without a step.
    """
    sweep = config.sweep
    found: dict[str, Trial] = {}
    for point in _candidates(space, sweep.search, sweep.trials, config.run.seed):
        if len(found) == sweep.trials:
            break
        if feasible(config, point, facts):
            trial = make_trial(config, point, facts)
            found.setdefault(trial.key, trial)
    if not found:
        raise ConfigError(
            "sweep.space: every point has more num_inference_steps than t_star; nothing can be tried"
        )
    # Neighbours share the purified images.
    first = {trial.purified: place for place, trial in reversed(list(enumerate(found.values())))}
    return sorted(found.values(), key=lambda trial: first[trial.purified])


def _candidates(space: Space, search: str, trials: int, seed: int) -> Iterator[Point]:
    rng = random.Random(seed)
    if search == "random":
        for _ in range(DRAWS_PER_TRIAL * trials):
            yield {key: _draw(values, rng) for key, values in space.items()}
        return
    for key, values in space.items():
        if isinstance(values, Range) and values.step is None:
            raise ConfigError(
                f"sweep.space: a grid needs the values of {key}: list them, or give the range a step"
            )
    places = range(math.prod(len(listed(values)) for values in space.values()))
    few = len(places) <= trials
    for place in places if few else rng.sample(places, min(len(places), DRAWS_PER_TRIAL * trials)):
        yield _grid_point(space, place)


def listed(values: list[Any] | Range) -> list[Any]:
    """Return all values of an axis that has a list or a step."""
    if not isinstance(values, Range):
        return list(values)
    assert values.step is not None
    count = math.floor((values.high - values.low) / values.step + 1e-9)
    return [_tidy(values.low + index * values.step) for index in range(count + 1)]


def feasible(config: Config, point: Point, facts: SweepFacts) -> bool:
    """Return whether there are no more steps than timesteps. Raises ConfigError for values that cannot be."""
    chosen = with_overrides(config, point)
    depth = chosen.purify.t_star or (facts.recommended or trained_recommendation(chosen)).t_star
    return (chosen.purify.num_inference_steps or 1) <= depth


def make_trial(config: Config, point: Point, facts: SweepFacts) -> Trial:
    """Return the trial of a point. Raises ConfigError for a value that cannot be, naming its key."""
    chosen = _resolved(with_overrides(config, point), facts)
    denoiser = digest(["weights", facts.weights]) if facts.weights else _trained(chosen, facts)
    own = [["eclipse"], chosen.run.seed, *purification(chosen, denoiser)]
    purified, scored = (digest(["defended", VERSION, images, own]) for images in (facts.source, facts.scored))
    parts = ["trial", VERSION, purified, scored, facts.scored, chosen.run.seed, _judged(chosen)]
    return Trial(point, chosen, denoiser, purified, scored, digest(parts))


def _resolved(config: Config, facts: SweepFacts) -> Config:
    """Return the settings with the denoiser's recommendations where purification has none."""
    known = facts.recommended or trained_recommendation(config)
    depth = config.purify.t_star or known.t_star
    if depth > known.t_max:
        raise ConfigError(
            f"purify.t_star {depth} is outside 1..{known.t_max}, the timesteps the denoiser is trained on; leave "
            "it out of the space, or train with a higher denoiser.t_max"
        )
    steps = config.purify.num_inference_steps or min(known.num_inference_steps, depth)
    if steps > depth:
        raise ConfigError(f"purify.num_inference_steps {steps} exceeds t_star {depth}")
    # With a single step all samplers give x0_pred.
    sampler = "ddpm" if steps == 1 else config.purify.sampler or known.sampler
    chosen = {"t_star": depth, "num_inference_steps": steps, "sampler": sampler}
    return config.model_copy(update={"purify": config.purify.model_copy(update=chosen)})


def trained_recommendation(config: Config) -> Recommended:
    """Return what the card of a denoiser trained with these settings will say."""
    own = config.denoiser
    return Recommended(int(own.t_max or 0), own.t_star, own.num_inference_steps, own.sampler)


def _trained(config: Config, facts: SweepFacts) -> str:
    return trained_key(config, facts.sparse[config.sweep.sparse_percent])


def _judged(config: Config) -> list[Any]:
    """Return the settings that decide a trial's numbers beside the purified images."""
    sweep = config.sweep
    if sweep.objective == "shortcut_score":
        return ["shortcut_score"]
    compensation = config.compensation.model_dump(mode="json")
    if config.compensation.mode == "none":
        compensation = {"mode": "none"}
    rungs = [sweep.grace_epochs, sweep.reduction_factor] if sweep.asha else None
    return ["proxy_accuracy", compensation, config.victim.model_dump(mode="json"), sweep.seeds, rungs]


def _is_axis(key: str) -> bool:
    section, _, name = key.partition(".")
    return (
        (section == "purify" and name in PURIFY_AXES)
        or (section == "compensation" and name in COMPENSATION_AXES)
        or _trains(key)
    )


def _trains(key: str) -> bool:
    section, _, name = key.partition(".")
    return key == SPARSE_PERCENT or (section == "denoiser" and name not in NO_DENOISER_AXES)


def _grid_point(space: Space, place: int) -> Point:
    point: Point = {}
    for key, values in reversed(space.items()):
        place, index = divmod(place, len(listed(values)))
        point[key] = listed(values)[index]
    return {key: point[key] for key in space}


def _draw(values: list[Any] | Range, rng: random.Random) -> Any:
    if not isinstance(values, Range):
        return rng.choice(values)
    if values.step is not None:
        return rng.choice(listed(values))
    if values.log:
        drawn = math.exp(rng.uniform(math.log(values.low), math.log(values.high)))
    else:
        drawn = rng.uniform(values.low, values.high)
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    return round(drawn) if whole else _tidy(drawn)


def _tidy(value: float) -> float:
    """Return a number without the last digits of binary fractions."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
