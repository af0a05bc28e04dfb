"""Run an experiment: make what its recipes need, measure what is missing, and go on after any end.

The ledger is ours: a finished recipe is an object results/<key>.json, written by put-if-absent. So a grid may grow
between two runs, its order may change, and nothing of Ray has to be restored. The cells of a grid run as tasks of
Ray, the trials of a sweep in Ray Tune. What runs on the workers stands at the end.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import ray
import torch
from ray import tune

from eclipse_ray.cluster.connect import Resources, connect, require_place
from eclipse_ray.cluster.metrics import open_curves
from eclipse_ray.cluster.work import (
    RETRIES,
    BoardWatcher,
    Done,
    Tasks,
    Watch,
    message_of,
    on_threads,
    reaching,
    run_tasks,
    run_trials,
    settle,
    shares,
    start_board,
)
from eclipse_ray.compensation import bake
from eclipse_ray.config import CompensationConfig, Config, to_yaml
from eclipse_ray.defenses.simple import privacy
from eclipse_ray.diffusion.network import default_device
from eclipse_ray.errors import EclipseError, InterruptedRunError
from eclipse_ray.experiments import artifacts, rows, search
from eclipse_ray.experiments.artifacts import Cache, Pixels, make_defended, quality
from eclipse_ray.experiments.experiment import (
    Experiment,
    Sets,
    labels_of,
    open_evaluation,
    open_matrix,
    open_sweep,
    result_json,
    score_of,
)
from eclipse_ray.experiments.recipe import Column, Facts, Measured, Need, Recipe, attacked, denoiser_key
from eclipse_ray.experiments.search import feasible, make_trial, tuned_point
from eclipse_ray.log import counted, say
from eclipse_ray.poisoning import fits_at_once
from eclipse_ray.progress import ProgressLine
from eclipse_ray.results import EvaluateResult, MatrixResult, MatrixView, SweepResult, SweepView
from eclipse_ray.storage.store import Store
from eclipse_ray.victims.training import train_victim

MOST_DB = 100.0
"""Stands for the PSNR of images that did not change."""
CELLS_AHEAD = 4
"""Size of a group of recipes that is made ready together, in recipes per concurrent victim."""


def evaluate(config: Config) -> EvaluateResult:
    """Train evaluate.seeds victims on data.source and test them on data.test; the last epoch decides.

    Raises InputError for missing labels, sets that share images, or images of two sizes.
    """
    experiment = open_evaluation(config)
    name = f"evaluate {PurePosixPath(str(config.data.source)).name}"
    with _line(experiment, name) as line:
        _Runner(experiment, line).train(experiment.grid.recipes, {})
    if experiment.failures:
        message = next(iter(experiment.failures.values()))
        raise EclipseError(f"training of a victim stopped: {message}; run the same command again to resume")
    return rows.evaluation(experiment)


def matrix(config: Config, write: Callable[[str, MatrixView], object]) -> MatrixResult:
    """Measure what is missing of the section `matrix`; `write` is given the folder and all rows after each group.

    A cell that fails does not hold up the others and stands in `failures` by its title.
    """
    experiment = open_matrix(config)
    _start(experiment)
    try:
        missing = experiment.missing()
        if not missing:
            say(f"matrix: all {counted(len(experiment.grid.recipes), 'cell')} measured already")
        else:
            with _line(experiment, "matrix") as line:
                runner = _Runner(experiment, line)
                for group in groups(missing, CELLS_AHEAD * runner.concurrent):
                    runner.prepare_and_train(group)
                    write(experiment.store.url, rows.matrix_view(experiment))
    finally:
        write(experiment.store.url, rows.matrix_view(experiment))
    return rows.matrix_result(experiment)


def sweep(config: Config, write: Callable[[str, SweepView], object]) -> SweepResult:
    """Search as the section `sweep` says; `write` is given the folder and all rows at the end, in any case.

    A trial that fails does not hold up the others and stands in `failures` by its title.
    """
    experiment = open_sweep(config)
    _start(experiment)
    try:
        left = experiment.trials_left()
        if left <= 0:
            say(f"sweep: all {counted(len(experiment.measured_trials()), 'trial')} measured already")
        else:
            with _line(experiment, "sweep") as line:
                runner = _Runner(experiment, line)
                for key, chosen in rows.denoisers_to_train(experiment).items():
                    runner.denoiser(chosen, key)
                runner.make_sets(experiment.missing(), {})
                runner.tune(left)
    finally:
        write(experiment.store.url, rows.sweep_view(experiment))
    return rows.sweep_result(experiment)


def _line(experiment: Experiment, name: str) -> ProgressLine:
    config = experiment.config
    epochs = sum(recipe.victim.config.epochs for recipe in experiment.missing())
    if experiment.space and experiment.trials is None:
        epochs = experiment.trials_left() * config.sweep.seeds * config.victim.epochs
    return ProgressLine(name, "epochs", epochs, config.run.progress_seconds, phase=reaching(config))


def _start(experiment: Experiment) -> None:
    experiment.store.probe()
    experiment.store.write("_eclipse/config.yaml", to_yaml(experiment.config).encode())


def groups(recipes: list[Recipe], size: int) -> Iterator[list[Recipe]]:
    """Yield the recipes in order, at least `size` at a time, never parting those of one column.

    A column with denoisers of its own ends a group, so that its cells do not wait for those of the next column.
    """
    group: list[Recipe] = []
    for index, recipe in enumerate(recipes):
        full = len(group) >= size or any(one.row.entry.against for one in group)
        if full and recipes[index - 1].column.key != recipe.column.key:
            yield group
            group = []
        group.append(recipe)
    if group:
        yield group


@dataclass(frozen=True)
class Bench:
    """What every worker of an experiment needs; `threads` is the number of CPU threads of one victim."""

    sets: Sets
    cache: Cache
    threads: int
    fidelity_weight: float


Told = Callable[[Recipe, Measured, float], None]
"""Is given a recipe after an epoch, what is known of it, and its score."""


class _Runner:
    """Makes what recipes need and trains their victims; what fails is written down and left out."""

    def __init__(self, experiment: Experiment, line: ProgressLine) -> None:
        self.experiment, self.config, self.line = experiment, experiment.config, line
        self.name = line.what.split()[0]
        # First, so that a logger that is not there is refused before Ray starts.
        self.curves = open_curves(self.config.run.loggers, self.config.data.output)
        self.resources = connect(self.config)
        self.gpus, self.concurrent, self.threads = share(self.config, self.name, self.resources)
        self.cpus = self.threads * self.resources.cpus_per_core
        require_place(self.resources, self.cpus, self.gpus, f"a victim of {self.name}")
        sets, weight = experiment.sets, self.config.sweep.fidelity_weight
        self.bench = ray.put(Bench(replace(sets, sparse=None), experiment.cache, self.threads, weight))
        self.board = start_board()
        self.total, self.seen = len(experiment.grid.recipes), set[tuple[str, int]]()
        self.copies = Counter(recipe.key for recipe in experiment.grid.recipes)
        self.finished = self.total - sum(self.copies[recipe.key] for recipe in experiment.missing())
        trials = experiment.measured_trials() if experiment.space else []
        scores = [(rows.trial_score(experiment, trial), trial.title) for trial in trials]
        self.best: tuple[float, str] | None = max(scores, default=None)

    def prepare_and_train(self, recipes: list[Recipe]) -> None:
        """Make what the recipes need, then train their victims."""
        columns = self._columns(recipes)
        recipes = [recipe for recipe in recipes if recipe.column.key in columns]
        made = self.make_sets(recipes, columns)
        self._compare({one.column.key: one.column.entry.label for one in recipes}, columns)
        ready = [recipe for recipe in recipes if all(need.key in made for need in recipe.needs)]
        self.train(ready, columns)

    def train(self, recipes: list[Recipe], columns: dict[str, Any]) -> None:
        """Train the victims of recipes whose sets are there; `columns` are references to poisoned images."""
        jobs = {one.key: (one, self.bench, columns.get(one.column.key), self.board) for one in recipes}
        self.line.phase = "first epoch"
        watch = Watch(self.name, "epoch", self.config.run.watchdog_seconds)
        with BoardWatcher(self.board, self._show, watch):
            for key, done in self._each(measure, jobs, watch):
                if done.error:
                    self._failed([jobs[key][0]], done.error)
                else:
                    self.experiment.results[key] = done.value()

    def make_sets(self, recipes: list[Recipe], columns: dict[str, Any]) -> set[str]:
        """Make the transformed sets of `recipes`; return the keys of all that are there."""
        needs = {need.key: need for recipe in recipes for need in recipe.needs}
        wanted = {key: need for key, need in needs.items() if self.experiment.cache.note("defended", key) is None}
        failed: dict[str, BaseException] = {}
        jobs = {}
        for key, need in wanted.items():
            try:
                if need.row.denoiser:
                    against = need.column if need.row.entry.against else None
                    self.denoiser(need.row.config, need.row.denoiser, against)
                jobs[key] = (need, self.bench, columns.get(need.column.key) if need.column else None)
            except InterruptedRunError:
                raise
            except EclipseError as error:
                failed[key] = error
        if jobs:
            self.line.phase = "making transformed sets"
            say(f"{self.name}: {self._so_far()}; {len(jobs)} transformed sets")
            with ProgressLine("transform", "sets", len(jobs), self.config.run.progress_seconds) as line:
                # A set is made in one task that tells nothing on the way: it may take any time.
                for key, done in self._each(defend, jobs, Watch(self.name, "set")):
                    if done.error:
                        failed[key] = done.error
                    line.advance(1, failed=int(key in failed))
        for key, cause in failed.items():
            self._failed([one for one in recipes if any(need.key == key for need in one.needs)], cause)
        return needs.keys() - failed.keys()

    def denoiser(self, config: Config, key: str, against: Column | None = None) -> str:
        """Return the folder of the denoiser `key`, which a row or a poison needs, fitted if it was not before.

        `against` is the column, whose images are there, that it is trained against.
        """
        experiment = self.experiment
        part = config.sweep.sparse_percent if experiment.space else config.matrix.sparse_limit
        images, clean = experiment.sets.parts.get(part), experiment.sets.sparse
        whole = images is None or clean is None or len(images.ids) == len(clean.ids)
        ids = None if images is None or (whole and against is None) else images.ids
        sparse, suspicious = experiment.facts.sparse.get(part, ""), None
        if against is not None and experiment.cache.note("denoisers", key) is None:
            suspicious = self._suspicious(against)
        return artifacts.fit_denoiser(config, experiment.cache, key, ids, sparse, suspicious)

    def _suspicious(self, column: Column) -> str:
        """Return the location of the column's images, in canonical form."""
        experiment = self.experiment
        if column.config is not None:
            return experiment.cache.url("poisons", column.key)
        url, source = column.entry.source or str(self.config.data.source), experiment.sets.source
        names = experiment.sets.published.get(url, source.ids)
        # Others may have published theirs without labels.
        labelled = source if column.entry.source else None
        part = artifacts.part_of(self.config, experiment.cache, url, names, column.key, labelled)
        return str(part["data.source"])

    def _columns(self, recipes: list[Recipe]) -> dict[str, Any]:
        """Return references to the images of columns, by key; None for those that no poison changes.

        Poisons are fitted side by side if there is room; a column that cannot be made is left out.
        """
        columns = {recipe.column.key: recipe.column for recipe in recipes}
        self.line.phase = "making poisoned sets"
        poisoned = {key: column for key, column in columns.items() if column.poisoned}
        works = [partial(self._column, column, recipes) for column in poisoned.values()]
        made = on_threads(works, fits_at_once(self.resources), "the making of poisons")
        found = dict.fromkeys(columns) | dict(zip(poisoned, made, strict=True))
        return {key: made for key, made in found.items() if made is not None or key not in poisoned}

    def _column(self, column: Column, recipes: list[Recipe]) -> Any:
        """Return a reference to the column's images, or None after a failure."""
        experiment, config = self.experiment, column.config
        sets, facts = experiment.sets, experiment.facts
        try:
            if config is None:
                url = column.entry.source
                return ray.put(
                    artifacts.load_published(url, sets.source, self.config, sets.published[url])[0].images
                )
            denoiser = None
            if denoised := attacked(config):
                denoiser = self.denoiser(denoised, denoiser_key(denoised, facts, config.matrix.sparse_limit))
            ids = None if len(sets.source.ids) == sets.total else sets.source.ids
            artifacts.ensure_poison(column, experiment.cache, denoiser, ids, facts)
        except EclipseError as error:
            self._failed([recipe for recipe in recipes if recipe.column.key == column.key], error)
            return None
        url = experiment.cache.url("poisons", column.key)
        load = ray.remote(num_cpus=self.resources.cpus_per_core)(artifacts.load_column)
        return load.remote(url, sets.source.ids, self.config.data.max_pixels)

    def _compare(self, labels: Mapping[str, str], columns: dict[str, Any]) -> None:
        """Measure what each poison does to the images; a failure costs its rows the PSNR, and is said."""
        jobs = {key: (key, self.bench, columns[key]) for key in labels if columns[key] is not None}
        watch = Watch(self.name, "column", self.config.run.watchdog_seconds)
        for key, done in self._each(likeness, jobs, watch):
            if done.error:
                say(f"{self.name}: the PSNR of {labels[key]} is missing: {message_of(done.error)}")

    def tune(self, left: int) -> None:
        """Run the missing trials of a sweep inside Ray Tune, or as many as Optuna may still choose."""
        experiment = self.experiment
        optuna = experiment.trials is None
        done = experiment.measured_trials() if optuna else []
        scores = [(trial.point, rows.trial_score(experiment, trial)) for trial in done]
        missing = {recipe.key for recipe in experiment.missing()}
        points = [one.point for one in experiment.trials or [] if missing & {each.key for each in one.recipes}]
        trial = tune.with_parameters(
            try_point, config=self.config, facts=experiment.facts, bench=[self.bench], board=self.board
        )
        # A trial that fails reports its message and no score.
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
        # A point that Optuna chooses is purified inside its trial, which may take any time and says nothing.
        watch = Watch(self.name, "epoch", math.inf if optuna else self.config.run.watchdog_seconds)
        self.line.phase = "first epoch"
        with BoardWatcher(self.board, self._show, watch):
            failed = run_trials(
                trial,
                {} if optuna else {"point": tune.grid_search([json.dumps(point) for point in points])},
                {"cpu": self.cpus, "gpu": self.gpus},
                search.tune_config(
                    self.config, experiment.space, scores, left if optuna else None, self.concurrent
                ),
                watch,
                [KeepStopped(experiment.store)],
            )
        for parameters, message in failed:
            experiment.failures[search.title_of(tuned_point(parameters))] = message

    def _each(
        self, function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], watch: Watch
    ) -> Iterator[tuple[str, Done]]:
        """Run `function` as a task of Ray for each job; yield the key of each job that has ended, and its end."""
        tasks = Tasks(function, self.concurrent, self.cpus, self.gpus, RETRIES)
        keys = list(jobs)
        return ((keys[done.number], done) for done in run_tasks(tasks, jobs.values(), watch))

    def _show(self, entry: dict[str, Any]) -> None:
        """Show one epoch of a victim, as `measure` posts it."""
        key, title, epoch, accuracy = (entry[name] for name in ("key", "title", "epoch", "test_accuracy"))
        # A victim that Ray had to start again reports its first epochs twice.
        if (key, epoch) in self.seen:
            return
        self.seen.add((key, epoch))
        if entry["last"]:
            self.finished += self.copies[key] or 1
            self.best = max(self.best or (entry["score"], title), (entry["score"], title))
        self.curves.log({title: accuracy}, epoch)
        reached = f"{title}: {accuracy:.1f} %"
        if self.experiment.space:
            reached = f"best so far {self.best[0]:.1f}: {self.best[1]}" if self.best else ""
        elif self.experiment.output:
            reached = f"{self._so_far()}, {reached}"
        self.line.advance(1, note=reached)

    def _so_far(self) -> str:
        return f"{self.finished}/{self.total} cells"

    def _failed(self, recipes: list[Recipe], error: BaseException) -> None:
        message = message_of(error)
        self.experiment.failures |= {recipe.title: message for recipe in recipes}
        say(f"{self.name}: {counted(len(recipes), 'cell')} failed, {recipes[0].title} among them: {message}")


def share(config: Config, name: str, resources: Resources) -> tuple[float, int, int]:
    """Return (GPUs of a victim, victims at the same time, CPU threads of each) for evaluate, matrix or sweep."""
    if name == "evaluate":
        seeds = config.evaluate.seeds
        gpus = min(1.0, resources.gpus / seeds) if resources.gpus else None
        return shares(gpus, seeds, resources)
    limits = config.sweep if name == "sweep" else config.matrix
    return shares(limits.num_gpus, limits.max_concurrent, resources)


def defend(need: Need, bench: Bench, images: Pixels | None) -> None:
    """Make a transformed set; `images` are those of its column, or None for images that no poison changed."""
    torch.set_num_threads(bench.threads)
    original = bench.sets.source if need.column else bench.sets.test
    made_of = original.images if images is None else images
    make_defended(need.key, need.row, bench.cache, made_of, original, bench.sets.num_classes)


def likeness(key: str, bench: Bench, images: Pixels) -> None:
    """Measure once what the poison of a column does to the images."""
    if bench.cache.note("quality", key) is None:
        bench.cache.finish("quality", key, quality(images, bench.sets.source.images))


def measure(recipe: Recipe, bench: Bench, images: Pixels | None, board: Any, told: Told | None = None) -> Measured:
    """Return what a recipe gives, measured and committed if it was not before.

    `images` are those of the recipe's column, or None for images that no poison changed. Every epoch is posted on
    `board`; `told` is called after every epoch but the last.
    """
    kept = bench.cache.folder
    if kept is not None and kept.exists(f"results/{recipe.key}.json"):
        return Measured(**json.loads(kept.read(f"results/{recipe.key}.json")))
    torch.set_num_threads(bench.threads)
    trained_on, compensation = _training_images(recipe, bench, images)
    result = _begin(recipe, bench)
    began = time.monotonic()

    def on_epoch(epoch: int, accuracy: float, loss: float) -> None:
        result.test_accuracy.append(accuracy)
        result.train_loss.append(loss)
        score, last = score_of(result, bench.fidelity_weight), epoch == recipe.victim.config.epochs
        entry = {"key": recipe.key, "title": recipe.title, "epoch": epoch, "test_accuracy": accuracy}
        board.post.remote({**entry, "score": score, "last": last})
        if told is not None and not last:
            told(recipe, replace(result, seconds=time.monotonic() - began), score)

    config, defense = recipe.row.config, recipe.row.defense
    clean = bench.sets.parts[config.matrix.sparse_limit] if defense.dilution else None
    train_victim(
        trained_on,
        labels_of(bench.sets.source),
        bench.sets.test.images,
        labels_of(bench.sets.test),
        recipe.victim.config,
        compensation,
        recipe.seed,
        default_device(),
        on_epoch,
        augmentations=[defense.augmentation(config.defense)] if defense.augmentation else [],
        privacy=privacy(config.defense) if defense.privacy else None,
        extra=(clean.images, labels_of(clean)) if clean else None,
    )
    result = replace(result, seconds=time.monotonic() - began)
    if kept is not None:
        kept.create(f"results/{recipe.key}.json", result_json(result))
    return result


def _training_images(recipe: Recipe, bench: Bench, images: Pixels | None) -> tuple[Pixels, CompensationConfig]:
    """Return the images to train on, and what the loader adds to them."""
    own = recipe.row.compensation
    if recipe.training == recipe.column.key:
        # A run that baked has written the compensation into these images already.
        return bench.sets.source.images if images is None else images, own
    found = bench.cache.load(recipe.training)
    if own.mode != "baked":
        return found, own
    baked = bake(torch.from_numpy(found), bench.sets.source.ids, own, recipe.row.config.run.seed)
    return baked.numpy(), CompensationConfig(mode="none")


def _begin(recipe: Recipe, bench: Bench) -> Measured:
    device, fidelity = default_device(), None
    if recipe.scored:
        kept = (bench.cache.note("defended", recipe.scored) or {})["psnr"]
        fidelity = MOST_DB if kept is None else kept
    return Measured(
        title=recipe.title,
        test_accuracy=[],
        train_loss=[],
        seconds=0.0,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        threads=bench.threads,
        images=len(bench.sets.source.ids),
        seed=recipe.seed,
        victim=recipe.victim.config.model_dump(mode="json"),
        compensation=recipe.row.compensation.model_dump(mode="json"),
        point=recipe.row.entry.settings,
        psnr=fidelity,
    )


def try_point(parameters: dict[str, Any], config: Config, facts: Facts, bench: list[Any], board: Any) -> None:
    """Try one point of a sweep inside Ray Tune; `bench` is a reference in a list, which Ray does not resolve."""
    shared: Bench = ray.get(bench[0])
    point = tuned_point(parameters)
    try:
        if not feasible(config, point, facts):
            # Only Optuna asks for more steps than timesteps, because it does not know the rule: it gets no score.
            tune.report({"left_out": True})
            return
        trial = make_trial(config, point, facts)
        for need in trial.recipes[0].needs:
            defend(need, shared, None)
        told = _tell_scheduler if config.sweep.asha else None
        results = [measure(one, shared, None, board, told) for one in trial.recipes]
    except EclipseError as error:
        # Reported and not raised, because another attempt would fail too.
        tune.report({"error": str(error)})
        return
    settle(board)
    score = float(np.mean([score_of(result, shared.fidelity_weight) for result in results]))
    tune.report({"score": score, "epoch": config.victim.epochs})


def _tell_scheduler(recipe: Recipe, result: Measured, score: float) -> None:
    """Tell the scheduler, which may stop the victim, about an epoch."""
    record = json.dumps({"key": recipe.key, "result": asdict(replace(result, stopped=True))})
    tune.report({"score": score, "epoch": len(result.test_accuracy), "record": record})


class KeepStopped(tune.Callback):
    """Commits what a victim had reached that the scheduler stopped, because its own process no longer can."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write what the trial last reported, unless it was its final report."""
        last = trial.last_result or {}
        if "record" in last:
            kept = json.loads(last["record"])
            self.store.create(f"results/{kept['key']}.json", result_json(Measured(**kept["result"])))
