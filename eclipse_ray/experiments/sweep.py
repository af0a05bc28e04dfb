"""Search for settings: one Ray Tune trial a point, committed by put-if-absent, so that any run does the rest.

As for the matrix, the ledger is ours and not Tune's: results/<key>.json. Purified images are cached by their own
keys, so trials that differ only in compensation share them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import ASHAScheduler

from eclipse_ray.cluster.connect import connect, refuse_process_local, require_place
from eclipse_ray.cluster.metrics import open_curves
from eclipse_ray.cluster.work import BoardWatcher, message_of, start_board
from eclipse_ray.config import Config, Range, to_yaml, with_overrides
from eclipse_ray.errors import ConfigError, EclipseError
from eclipse_ray.experiments import materials, space, sweep_sets, tuner
from eclipse_ray.experiments.materials import Cache
from eclipse_ray.experiments.space import Space, SweepFacts, Trial
from eclipse_ray.experiments.sweep_sets import SweepSets
from eclipse_ray.experiments.sweep_trial import Result, Setup, prepare, run_trial, score_of
from eclipse_ray.experiments.tuner import shares
from eclipse_ray.log import say
from eclipse_ray.progress import ProgressLine
from eclipse_ray.results import sweep_order
from eclipse_ray.storage.store import Store


@dataclass
class Sweep:
    """A sweep, and how far it is; `listed` are its trials, or None when Optuna chooses them one by one."""

    config: Config
    sets: SweepSets
    facts: SweepFacts
    space: Space
    listed: list[Trial] | None
    cache: Cache
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        """The folder of results and pictures."""
        return self.cache.store

    def done(self) -> list[tuple[Trial, Result]]:
        """Return what was measured of this space, each trial with its result, in order."""
        names = {entry.key.rpartition("/")[2].removesuffix(".json") for entry in self.store.list("results")}
        if self.listed is not None:
            return [(trial, self._read(trial.key)) for trial in self.listed if trial.key in names]
        found = [(key, self._read(key)) for key in sorted(names)]
        trials = [(self._trial(result["point"], key), result) for key, result in found]
        return [(trial, result) for trial, result in trials if trial is not None]

    def missing(self) -> list[Trial]:
        """Return the listed trials that are still to be measured."""
        done = {trial.key for trial, _ in self.done()}
        return [trial for trial in self.listed or [] if trial.key not in done]

    def left(self) -> int:
        """Return how many trials a run would still do."""
        return self.config.sweep.trials - len(self.done()) if self.listed is None else len(self.missing())

    def _read(self, key: str) -> Result:
        result: Result = json.loads(self.store.read(f"results/{key}.json"))
        return result

    def _trial(self, point: dict[str, Any], key: str) -> Trial | None:
        """Return the trial of a result if it lies in this space and was measured as trials are now."""
        if point.keys() != self.space.keys() or not all(
            value in axis if isinstance(axis, list) else axis.low <= value <= axis.high
            for axis, value in ((self.space[name], value) for name, value in point.items())
        ):
            return None
        trial = space.make_trial(self.config, point, self.facts)
        return trial if trial.key == key else None


def open_sweep(config: Config) -> Sweep:
    """Read the sets, check that they are disjoint, and return the sweep; only `run` writes anything.

    Raises ConfigError for a space that cannot be searched, InputError for unusable sets.
    """
    if config.sweep.search == "optuna":
        _optuna()
    # Ray Tune gives each trial a working directory of its own, where a relative path leads nowhere.
    places = {"data.output": config.data.output, "purify.denoiser": config.purify.denoiser}
    config = with_overrides(config, {key: Store(place).url for key, place in places.items() if place})
    sets = sweep_sets.load_sets(config)
    facts = sweep_sets.facts(config, sets)
    axes = space.space_of(config, facts.recommended)
    for note in sweep_sets.notes(config, sets):
        say(f"sweep: {note}")
    listed = None
    if config.sweep.search == "optuna":
        for point in space.deepest_points(axes):
            space.make_trial(config, point, facts)
    else:
        listed = space.choose_trials(config, axes, facts)
    cache = Cache(str(config.data.output))
    refuse_process_local(str(config.data.output), cache.store.in_this_process_only)
    return Sweep(config, sets, facts, axes, listed, cache)


def run(sweep: Sweep, publish: Callable[[], object]) -> None:
    """Measure what is missing; `publish` is called at the end, whatever ends it.

    A trial that fails does not hold up the others and stands in `sweep.failures` by its title.
    """
    sweep.store.probe()
    sweep.store.write("_eclipse/config.yaml", to_yaml(sweep.config).encode())
    try:
        if sweep.left() > 0:
            runner = _Runner(sweep)
            runner.fit_denoisers()
            runner.purify()
            runner.search()
        else:
            say(f"sweep: all {len(sweep.done())} trials are measured already")
    finally:
        publish()


class _Runner:
    """Makes what trials share, then runs them."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.config = sweep, sweep.config
        # First: a logger that is not there is refused before Ray starts.
        self.curves = open_curves(self.config.run.loggers, sweep.store.url)
        resources = connect(self.config)
        limits = self.config.sweep
        self.gpus, self.concurrent, self.threads = shares(limits.num_gpus, limits.max_concurrent, resources)
        self.cpus = self.threads * resources.cpus_per_core
        require_place(resources, self.cpus, self.gpus, "a trial of the sweep")
        self.setup = ray.put(Setup(self.config, sweep.facts, sweep.sets.source, sweep.sets.scored, self.threads))
        self.board = start_board()
        scores = {trial.title: score_of(result, self.config) for trial, result in sweep.done()}
        self.best = max(((score, title) for title, score in scores.items()), default=None)
        self.seen: set[tuple[str, int]] = set()
        epochs = limits.seeds * self.config.victim.epochs
        self.per_trial = epochs if limits.objective == "proxy_accuracy" else 1

    def fit_denoisers(self) -> None:
        """Train every denoiser that a missing trial needs."""
        if self.config.purify.denoiser:
            return
        sweep, needed = self.sweep, sweep_denoisers(self.sweep)
        for number, (key, config) in enumerate(needed.items(), 1):
            say(f"sweep: denoiser {number} of {len(needed)}")
            part = sweep.sets.parts[config.sweep.sparse_percent]
            key_of_part = sweep.facts.sparse[config.sweep.sparse_percent]
            read = materials.chosen_part(config, sweep.cache, str(config.data.clean), part.ids, key_of_part)
            materials.fit_denoiser(config, sweep.cache, key, read)

    def purify(self) -> None:
        """Purify once for each setting that missing trials share; Optuna's trials do it themselves."""
        needed = {trial.purified: trial for trial in self.sweep.missing()}
        if not needed:
            return
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus)(_prepare)
        pending = [task.remote(self.setup, trial) for trial in needed.values()]
        with ProgressLine("sweep", "purified parts", len(needed), self.config.run.progress_seconds) as line:
            while pending:
                ready, pending = ray.wait(pending)
                try:
                    ray.get(ready)
                except RayError as error:
                    # Its trials say it again, each for itself.
                    say(f"sweep: a part could not be purified: {message_of(error)}")
                line.advance(len(ready))

    def search(self) -> None:
        """Run the missing trials, or as many as Optuna may still choose."""
        sweep, left = self.sweep, self.sweep.left()
        units = self.per_trial * left
        unit = "epochs" if self.per_trial > 1 else "trials"
        trial = tune.with_parameters(run_trial, setup=[self.setup], board=self.board)
        # A trial that fails reports its message and no score.
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
        with (
            ProgressLine("sweep", unit, units, self.config.run.progress_seconds) as self.line,
            BoardWatcher(self.board, self._show),
        ):
            failed = tuner.fit(
                "sweep",
                trial,
                self._grid(),
                {"cpu": self.cpus, "gpu": self.gpus},
                self._tune_config(left),
                [_KeepStopped(sweep.store)],
            )
        for point, message in failed:
            point = json.loads(point["point"]) if "point" in point else point
            title = ", ".join(f"{key.split('.')[1]} {value}" for key, value in point.items())
            sweep.failures[title] = message

    def _grid(self) -> dict[str, Any]:
        if self.sweep.listed is None:
            return {}
        return {"point": tune.grid_search([json.dumps(trial.point) for trial in self.sweep.missing()])}

    def _tune_config(self, left: int) -> Any:
        limits = self.config.sweep
        scheduler = None
        if limits.asha:
            epochs = self.config.victim.epochs
            scheduler = ASHAScheduler(
                time_attr="epoch",
                metric="score",
                mode="max",
                max_t=epochs,
                grace_period=min(limits.grace_epochs, epochs),
                reduction_factor=limits.reduction_factor,
            )
        chosen = self.sweep.listed is None
        return tune.TuneConfig(
            search_alg=self._searcher() if chosen else None,
            num_samples=left if chosen else 1,
            scheduler=scheduler,
            max_concurrent_trials=self.concurrent,
            reuse_actors=True,
        )

    def _searcher(self) -> Any:
        """Return Optuna's search, told what was measured before."""
        optuna = _optuna()
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        done = self.sweep.done()
        return OptunaSearch(
            space={key: _distribution(optuna, values) for key, values in self.sweep.space.items()},
            metric="score",
            mode="max",
            # Each run goes on with draws of its own, or it would ask for the first points again.
            seed=self.config.run.seed + len(done),
            points_to_evaluate=[trial.point for trial, _ in done] or None,
            evaluated_rewards=[score_of(result, self.config) for _, result in done] or None,
        )

    def _show(self, entry: dict[str, Any]) -> None:
        # A trial that Ray had to start again reports its first epochs twice.
        epoch = self.per_trial if entry["last"] else entry["epoch"]
        if (entry["key"], epoch) in self.seen:
            return
        self.seen.add((entry["key"], epoch))
        self.curves.log({entry["title"]: entry["score"]}, epoch)
        if entry["last"]:
            self.best = max(filter(None, [self.best, (entry["score"], entry["title"])]))
        note = f"best so far {self.best[0]:.1f}: {self.best[1]}" if self.best else ""
        self.line.advance(1, note=note)


class _KeepStopped(tune.Callback):
    """Commits trials that the scheduler stopped, whose own process cannot any more."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write what the trial last reported, unless it was its final word."""
        last = trial.last_result or {}
        if "record" in last:
            result = json.loads(last["record"])
            self.store.create(f"results/{last['key']}.json", json.dumps(result, indent=1).encode())


def sweep_denoisers(sweep: Sweep) -> dict[str, Config]:
    """Return the settings of every denoiser that a missing trial needs and that is not there yet, by key."""
    if sweep.listed is None:
        points = space.deepest_points(sweep.space)
        trials = [space.make_trial(sweep.config, point, sweep.facts) for point in points]
    else:
        trials = sweep.missing()
    needed = {trial.denoiser: trial.config for trial in trials}
    return {key: config for key, config in needed.items() if sweep.cache.note("denoisers", key) is None}


def _prepare(setup: Setup, trial: Trial) -> None:
    prepare(setup, trial)


def _optuna() -> Any:
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


def best_of(sweep: Sweep) -> tuple[Trial, Result]:
    """Return the trial of the highest score; one that was stopped early only if there is no other.

    Raises EclipseError if nothing was measured.
    """
    done = sweep.done()
    if not done:
        first = next(iter(sweep.failures.values()), "no trial was run")
        raise EclipseError(f"no trial could be measured: {first}")
    return min(done, key=lambda pair: sweep_order(pair[1]["stopped"], score_of(pair[1], sweep.config)))
