"""The settings that a sweep tries: the space, its points, their recipes, and who chooses among them.

Grid and random search list their points before anything runs. Optuna chooses each point after it has seen the
results of others, and ASHA stops victims early; both run inside Ray Tune.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from eclipse_ray.config import Config, DenoiserConfig, Range, with_overrides
from eclipse_ray.diffusion.sampling import check_purification
from eclipse_ray.errors import ConfigError
from eclipse_ray.experiments.recipe import (
    Entry,
    Facts,
    Recipe,
    Row,
    Victim,
    defended_key,
    denoiser_key,
    images_key,
    make_recipe,
    source_column,
)

Space = dict[str, list[Any] | Range]
Point = dict[str, Any]

SPARSE_PERCENT = "sweep.sparse_percent"
PURIFY_AXES = ("t_star", "num_inference_steps", "sampler")
COMPENSATION_AXES = ("mode", "p", "sigma", "coarse_sigma", "coarse_grid", "colour_sigma")
DRAWS_PER_TRIAL = 50
"""Random points drawn per wanted point before a small space counts as exhausted."""


@dataclass(frozen=True)
class Trial:
    """One point of the space: its row with all settings resolved, and one recipe per seed."""

    point: Point
    row: Row
    recipes: tuple[Recipe, ...]

    @property
    def title(self) -> str:
        """The point in words."""
        return title_of(self.point)


def space_of(config: Config, facts: Facts) -> Space:
    """Return the space of the section `sweep`, or the default one. Raises as `check_space` does."""
    check_space(config)
    return dict(config.sweep.space) or default_space(config, facts)


def check_space(config: Config) -> None:
    """Raise ConfigError for an impossible axis, which needs no image to be seen."""
    named = {f"purify.{name}" for name in PURIFY_AXES} | {f"compensation.{name}" for name in COMPENSATION_AXES}
    for key, values in config.sweep.space.items():
        if key not in named and not _trains(key):
            raise ConfigError(
                f"sweep.space: {key} is no axis; vary purify.{', '.join(PURIFY_AXES)}, "
                f"compensation.{', '.join(COMPENSATION_AXES)}, keys of denoiser, or {SPARSE_PERCENT}"
            )
        if _trains(key):
            if config.purify.denoiser:
                raise ConfigError(f"sweep.space varies {key}, which a given denoiser cannot: leave --denoiser out")
            if isinstance(values, Range) and values.step is None:
                raise ConfigError(f"sweep.space: {key} needs listed values or a step, as each trains a denoiser")
    for percent in listed(config.sweep.space.get(SPARSE_PERCENT, [])):
        with_overrides(config, {SPARSE_PERCENT: percent})


def default_space(config: Config, facts: Facts) -> Space:
    """Return depths that the denoiser was trained for, one and more steps, and values of compensation."""
    t_max = facts.of_denoiser(config).t_max
    depths = sorted({max(1, round(part * t_max)) for part in (0.25, 0.5, 0.8)})
    steps = sorted({1, min(4, depths[0])})
    compensation: Space = {"compensation.p": [0.2, 0.4, 0.6], "compensation.sigma": [0.05, 0.1]}
    return {"purify.t_star": list(depths), "purify.num_inference_steps": list(steps), **compensation}


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
        numbers = [one for one in ends if isinstance(one, int)]
        if numbers and key in ("purify.t_star", "purify.num_inference_steps"):
            first[key] = max(numbers) if key == "purify.t_star" else min(numbers)
    return [first | point for point in training_points(space)]


def choose_trials(config: Config, space: Space, facts: Facts) -> list[Trial]:
    """Return at most sweep.trials distinct trials of a grid, a random sample of a larger one, or random draws.

    Points with more steps than timesteps are left out. Raises ConfigError for any other impossible value, and for
    a grid over a range without a step.
    """
    sweep = config.sweep
    found: dict[str, Trial] = {}
    for point in _candidates(space, sweep.search, sweep.trials, config.run.seed):
        if len(found) == sweep.trials:
            break
        if feasible(config, point, facts):
            trial = make_trial(config, point, facts)
            found.setdefault(trial.recipes[0].key, trial)
    if not found:
        raise ConfigError(
            "sweep.space: every point has more num_inference_steps than t_star; nothing can be tried"
        )
    # Neighbours share the purified images.
    first = {trial.recipes[0].training: place for place, trial in reversed(list(enumerate(found.values())))}
    return sorted(found.values(), key=lambda trial: first[trial.recipes[0].training])


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
    axes = [listed(values) for values in space.values()]
    sides = [len(axis) for axis in axes]
    places = range(math.prod(sides))
    few = len(places) <= trials
    for place in places if few else rng.sample(places, min(len(places), DRAWS_PER_TRIAL * trials)):
        chosen = zip(axes, np.unravel_index(place, sides), strict=True)
        yield dict(zip(space, (axis[index] for axis, index in chosen), strict=True))


def listed(values: list[Any] | Range) -> list[Any]:
    """Return all values of an axis that has a list or a step."""
    if not isinstance(values, Range):
        return list(values)
    assert values.step is not None
    count = math.floor((values.high - values.low) / values.step + 1e-9)
    return [_tidy(values.low + index * values.step) for index in range(count + 1)]


def feasible(config: Config, point: Point, facts: Facts) -> bool:
    """Return whether there are no more steps than timesteps. Raises ConfigError for impossible values."""
    chosen = with_overrides(config, point)
    depth = chosen.purify.t_star or facts.of_denoiser(chosen).t_star
    return (chosen.purify.num_inference_steps or 1) <= depth


def make_trial(config: Config, point: Point, facts: Facts) -> Trial:
    """Return the trial of a point. Raises ConfigError for an impossible value, naming its key."""
    chosen = _resolved(with_overrides(config, point), facts)
    sweep, title = chosen.sweep, title_of(point)
    denoiser = denoiser_key(chosen, facts, sweep.sparse_percent)
    row = Row(Entry(title, "eclipse", "", point), chosen, chosen.compensation, denoiser)
    victim = Victim(Entry(chosen.victim.arch, chosen.victim.arch, "", {}), chosen.victim)
    scored = defended_key(images_key(facts.test), row)
    rungs = [sweep.grace_epochs, sweep.reduction_factor] if sweep.asha else None
    recipes = [
        make_recipe(
            source_column(facts, "data"),
            row,
            victim,
            chosen.run.seed + index,
            facts,
            title if sweep.seeds == 1 else f"{title}, seed {chosen.run.seed + index}",
            scored=scored,
            rungs=rungs,
        )
        for index in range(sweep.seeds)
    ]
    return Trial(point, row, tuple(recipes))


def title_of(point: Point) -> str:
    """Return a point in words."""
    return ", ".join(f"{key.split('.')[1]} {value}" for key, value in point.items())


def contains(space: Space, point: Point) -> bool:
    """Return whether a point lies in the space."""
    return point.keys() == space.keys() and all(
        value in axis if isinstance(axis, list) else axis.low <= value <= axis.high
        for axis, value in ((space[name], value) for name, value in point.items())
    )


def _resolved(config: Config, facts: Facts) -> Config:
    """Return the settings with the denoiser's recommendations where purification has none."""
    known = facts.of_denoiser(config)
    depth, steps = check_purification(known, config.purify)
    # With a single step all samplers give x0_pred.
    sampler = "ddpm" if steps == 1 else config.purify.sampler or known.sampler
    chosen = {"t_star": depth, "num_inference_steps": steps, "sampler": sampler}
    return config.model_copy(update={"purify": config.purify.model_copy(update=chosen)})


def _trains(key: str) -> bool:
    section, _, name = key.partition(".")
    return key == SPARSE_PERCENT or (section == "denoiser" and name not in DenoiserConfig.OF_A_RUN)


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
    """Return a number rounded to six digits."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def tune_config(
    config: Config, space: Space, done: list[tuple[Point, float]], left: int | None, concurrent: int
) -> Any:
    """Return what Ray Tune is told: who chooses points, who stops trials, and how many run at the same time.

    `done` are points with their scores. `left` is how many points Optuna still chooses; None: they are listed.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    sweep, scheduler = config.sweep, None
    if sweep.asha:
        epochs = config.victim.epochs
        scheduler = ASHAScheduler(
            time_attr="epoch",
            metric="score",
            mode="max",
            max_t=epochs,
            grace_period=min(sweep.grace_epochs, epochs),
            reduction_factor=sweep.reduction_factor,
        )
    return tune.TuneConfig(
        search_alg=None if left is None else _searcher(space, done, config.run.seed),
        num_samples=left or 1,
        scheduler=scheduler,
        max_concurrent_trials=concurrent,
        reuse_actors=True,
    )


def tuned_point(parameters: dict[str, Any]) -> Point:
    """Return the point that the parameters of a trial of Ray Tune stand for."""
    return json.loads(parameters["point"]) if "point" in parameters else parameters


def _searcher(space: Space, done: list[tuple[Point, float]], seed: int) -> Any:
    """Return Optuna's search, which is told what was measured before."""
    optuna = require_optuna()
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        space={key: _distribution(optuna, values) for key, values in space.items()},
        metric="score",
        mode="max",
        # Each run draws anew, because with the same seed it would ask for the first points again.
        seed=seed + len(done),
        points_to_evaluate=[point for point, _ in done] or None,
        evaluated_rewards=[score for _, score in done] or None,
    )


def require_optuna() -> Any:
    """Return the module optuna. Raises ConfigError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "sweep.search optuna needs Optuna: pip install 'eclipse-ray[sweep]', or search by grid or random"
        ) from None
    return optuna


def _distribution(optuna: Any, values: list[Any] | Range) -> Any:
    kinds = optuna.distributions
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution(values)
    if all(isinstance(one, int) for one in (values.low, values.high, values.step or 1)):
        return kinds.IntDistribution(values.low, values.high, log=values.log, step=values.step or 1)
    return kinds.FloatDistribution(values.low, values.high, log=values.log, step=values.step)
