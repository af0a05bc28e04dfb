"""Measure a matrix: one Ray Tune trial a cell, committed by put-if-absent, so that any run goes on with the rest.

The ledger is ours, not Tune's: a finished cell is an object results/<key>.json, and Tune is only told what is
missing. So a grid may grow between two runs, its order may change, and nothing of Tune has to be restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from eclipse_ray.cluster.connect import (
    Resources,
    connect,
    refuse_process_local,
    require_place,
)
from eclipse_ray.cluster.metrics import open_curves
from eclipse_ray.cluster.work import BoardWatcher, message_of, on_threads, start_board
from eclipse_ray.config import CompensationConfig, Config, to_yaml
from eclipse_ray.errors import EclipseError, InterruptedRunError
from eclipse_ray.experiments import materials, tuner
from eclipse_ray.experiments import sets as datasets
from eclipse_ray.experiments.grid import Cell, Column, Facts, Grid, attacks_denoiser, build_grid, denoiser_key
from eclipse_ray.experiments.materials import Cache, Work
from eclipse_ray.experiments.sets import Sets
from eclipse_ray.experiments.trial import Pantry, run_trial
from eclipse_ray.experiments.tuner import shares
from eclipse_ray.log import say
from eclipse_ray.poisoning import fits_at_once
from eclipse_ray.progress import ProgressLine
from eclipse_ray.storage.store import Store

CELLS_AHEAD = 4
"""So many times the trials at once are made ready together: few trials wait for the last of a group."""


@dataclass
class Matrix:
    """A matrix, and how far it is; `results` are the cells read so far, by key."""

    config: Config
    sets: Sets
    facts: Facts
    grid: Grid
    cache: Cache
    failures: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        """The folder of results and tables."""
        return self.cache.store

    def done(self) -> set[str]:
        """Return the keys of all cells that were ever measured in this folder."""
        names = (entry.key.rpartition("/")[2] for entry in self.store.list("results"))
        return {name.removesuffix(".json") for name in names}

    def missing(self) -> list[Cell]:
        """Return the cells that are still to be measured, each key once, in order."""
        done = self.done()
        return list({cell.key: cell for cell in self.grid.cells if cell.key not in done}.values())


def open_matrix(config: Config) -> Matrix:
    """Read the sets, check that they are disjoint, and return the matrix; only `run` writes anything.

    Raises ConfigError for settings that cannot work, InputError for unusable sets.
    """
    sets = datasets.load_sets(config)
    facts = datasets.facts(config, sets)
    grid = build_grid(config, facts)
    if any(row.defense.dilution for row in grid.rows):
        datasets.check_labels(sets, config.data.clean)
    cache = Cache(str(config.data.output))
    refuse_process_local(str(config.data.output), cache.store.in_this_process_only)
    return Matrix(config, sets, facts, grid, cache)


def run(matrix: Matrix, publish: Callable[[], object]) -> None:
    """Measure what is missing; `publish` is called when cells are done and at the end, whatever ends it.

    What fails is left out, so that it does not hold up the rest, and stands in `matrix.failures` by cell title.
    """
    matrix.store.probe()
    matrix.store.write("_eclipse/config.yaml", to_yaml(matrix.config).encode())
    try:
        missing = matrix.missing()
        if not missing:
            say(f"matrix: all {len(matrix.grid.cells)} cells are measured already")
            return
        runner = _Runner(matrix, missing)
        with runner.line:
            for cells in groups(missing, CELLS_AHEAD * runner.concurrent):
                runner.measure(cells)
                publish()
    finally:
        publish()


def groups(cells: list[Cell], size: int) -> Iterator[list[Cell]]:
    """Yield the cells in order, at least `size` at a time, never parting those of one column."""
    group: list[Cell] = []
    for index, cell in enumerate(cells):
        if len(group) >= size and cells[index - 1].column.key != cell.column.key:
            yield group
            group = []
        group.append(cell)
    if group:
        yield group


class _Runner:
    """Makes materials and trains victims for one group of cells after the other."""

    def __init__(self, matrix: Matrix, missing: list[Cell]) -> None:
        self.matrix = matrix
        # First: a logger that is not there is refused before Ray starts.
        self.curves = open_curves(matrix.config.run.loggers, matrix.store.url)
        self.resources = connect(matrix.config)
        self.gpus, self.concurrent, self.threads = share(matrix.config, self.resources)
        require_place(self.resources, self.cpus, self.gpus, "a victim of the matrix")
        self.board, self.pantry = start_board(), ray.remote(num_cpus=0)(Pantry).remote()
        epochs = sum(cell.victim.config.epochs for cell in missing)
        self.line = ProgressLine("matrix", "epochs", epochs, matrix.config.run.progress_seconds)
        keys = {cell.key for cell in missing}
        self.cells = len(matrix.grid.cells)
        self.finished = sum(cell.key not in keys for cell in matrix.grid.cells)
        self.seen: set[tuple[str, int]] = set()
        self.titles = {cell.key: cell.title for cell in matrix.grid.cells}
        images, labels = matrix.sets.source.images, matrix.sets.source.labels
        self.source, self.labels = ray.put(images), ray.put(labels)
        self.test = ray.put((matrix.sets.test.images, matrix.sets.test.labels))
        self.fixed: dict[str, Any] = {}

    @property
    def cpus(self) -> float:
        """Logical CPUs of a trial."""
        return self.threads * self.resources.cpus_per_core

    def measure(self, cells: list[Cell]) -> None:
        """Make what the cells need, then train their victims; what fails is written down."""
        columns = {cell.column.key: cell.column for cell in cells}
        images = self._columns(columns, cells)
        cells = [cell for cell in cells if cell.column.key in images]
        likeness = [self._likeness(key, ref) for key, ref in images.items() if columns[key].config]
        sets = self._defended(cells, images)
        cells = [cell for cell in cells if cell.training in sets]
        if likeness:
            ray.wait(likeness, num_returns=len(likeness))
        if not cells:
            return
        jobs = {cell.key: self._job(cell) for cell in cells}
        extra = {
            job["sets"]["extra"]: self._extra(job["sets"]["extra"]) for job in jobs.values() if job["dilution"]
        }
        ray.get(self.pantry.fill.remote(jobs, {**sets, **extra, "labels": self.labels, "test": self.test}))
        with BoardWatcher(self.board, self._show):
            failed = self._tune([cell.key for cell in cells])
        for cell in cells:
            if cell.key in failed:
                self._failed([cell], EclipseError(failed[cell.key]))
        ray.get(self.pantry.fill.remote({}, {}))

    def _columns(self, columns: dict[str, Column], cells: list[Cell]) -> dict[str, Any]:
        """Return references to the images of columns that could be made, fitted side by side if there is room."""
        works = [partial(self._column, column, cells) for column in columns.values()]
        made = on_threads(works, fits_at_once(self.resources), "the making of poisons")
        return {key: images for key, images in zip(columns, made, strict=True) if images is not None}

    def _column(self, column: Column, cells: list[Cell]) -> Any:
        """Return a reference to the column's images, or None after a failure."""
        if column.config is None:
            return self.source
        matrix, ids = self.matrix, self.matrix.sets.source.ids
        try:
            denoiser = self._denoiser(column.config) if attacks_denoiser(column.config) else None
            materials.ensure_poison(column, matrix.cache, denoiser, len(ids), matrix.facts.source)
        except EclipseError as error:
            self._failed([cell for cell in cells if cell.column.key == column.key], error)
            return None
        url = matrix.cache.url("poisons", column.key)
        return self._io_task(materials.load_column).remote(url, ids, matrix.config.data.max_pixels)

    def _likeness(self, key: str, images: Any) -> Any:
        return self._io_task(materials.keep_quality).remote(self.matrix.cache, key, images, self.source)

    def _denoiser(self, config: Config) -> str:
        facts = self.matrix.facts
        key = denoiser_key(config, facts)
        sparse = facts.sparse.get(config.matrix.sparse_limit or 0, "")
        return materials.ensure_denoiser(config, self.matrix.cache, key, sparse)

    def _defended(self, cells: list[Cell], images: dict[str, Any]) -> dict[str, Any]:
        """Return references to all training sets of `cells` that could be made, by key."""
        ready = {key: ref for key, ref in images.items() if any(cell.training == key for cell in cells)}
        wanted = {cell.training: cell for cell in cells if cell.training not in images}
        if wanted:
            say(f"matrix: {self._so_far()}; {len(wanted)} transformed sets")
        pending: dict[str, Any] = {}
        for key, cell in wanted.items():
            try:
                pending[key] = self._defend(cell, images[cell.column.key])
            except InterruptedRunError:
                raise
            except EclipseError as error:
                self._failed([cell for cell in cells if cell.training == key], error)
        for key, cause in self._await(pending).items():
            self._failed([cell for cell in cells if cell.training == key], cause)
            del pending[key]
        return ready | pending

    def _await(self, pending: dict[str, Any]) -> dict[str, RayError]:
        """Wait until every set is made or has failed, and tell how far that is; return the errors, by key."""
        if not pending:
            return {}
        failed: dict[str, RayError] = {}
        waiting = {self._io_task(_nothing).remote(ref): key for key, ref in pending.items()}
        line = ProgressLine("transform", "sets", len(waiting), self.matrix.config.run.progress_seconds)
        with line:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                key = waiting.pop(done)
                try:
                    ray.get(done)
                except RayError as error:
                    failed[key] = error
                line.advance(1, failed=int(key in failed))
        return failed

    def _defend(self, cell: Cell, images: Any) -> Any:
        matrix, config = self.matrix, cell.row.config
        work = Work(
            cache=matrix.cache,
            key=cell.training,
            name=cell.row.entry.name,
            config=config.model_dump(mode="json"),
            denoiser=self._denoiser(config) if cell.row.denoiser else None,
            seed=config.run.seed,
            num_classes=matrix.sets.num_classes,
            threads=self.threads,
        )
        make = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus)(materials.make_defended)
        return make.remote(work, images, self.source, self.labels, matrix.sets.source.ids)

    def _io_task(self, function: Callable[..., Any]) -> Any:
        return ray.remote(num_cpus=self.resources.cpus_per_core)(function)

    def _job(self, cell: Cell) -> dict[str, Any]:
        config, defense = cell.row.config, cell.row.defense
        compensation = defense.compensation(config) if defense.compensation else CompensationConfig(mode="none")
        sets = {"images": cell.training, "labels": "labels", "test": "test"}
        if defense.dilution:
            sets["extra"] = f"extra {config.matrix.sparse_limit or 0}"
        return {
            "output": self.matrix.store.url,
            "title": cell.title,
            "defense": cell.row.entry.name,
            "settings": config.defense.model_dump(mode="json"),
            "compensation": compensation.model_dump(mode="json"),
            "dilution": defense.dilution,
            "victim": cell.victim.config.model_dump(mode="json"),
            "seed": cell.seed,
            "threads": self.threads,
            "sets": sets,
        }

    def _extra(self, name: str) -> Any:
        if name not in self.fixed:
            count = int(name.split()[1])
            sparse = self.matrix.sets.sparse
            assert sparse is not None
            sparse = datasets.first_images(sparse, count)
            self.fixed[name] = ray.put((sparse.images, sparse.labels))
        return self.fixed[name]

    def _tune(self, keys: list[str]) -> dict[str, str]:
        """Run one trial a key; return the messages of those that failed."""
        trial = tune.with_parameters(run_trial, pantry=self.pantry, board=self.board)
        failed = tuner.fit(
            "matrix",
            trial,
            {"cell": tune.grid_search(keys)},
            {"cpu": self.cpus, "gpu": self.gpus},
            tune.TuneConfig(max_concurrent_trials=self.concurrent, reuse_actors=True),
        )
        return {point["cell"]: message for point, message in failed}

    def _show(self, entry: dict[str, Any]) -> None:
        # A trial that Ray had to start again reports its first epochs twice.
        place = (entry["cell"], entry["epoch"])
        if place in self.seen:
            return
        self.seen.add(place)
        if entry["last"]:
            self.finished += sum(cell.key == entry["cell"] for cell in self.matrix.grid.cells)
        title, reached = self.titles[entry["cell"]], entry["test_accuracy"]
        self.curves.log({title: reached}, entry["epoch"])
        self.line.advance(1, note=f"{self._so_far()}, {title}: {reached:.1f} %")

    def _so_far(self) -> str:
        return f"{self.finished}/{self.cells} cells"

    def _failed(self, cells: list[Cell], error: BaseException) -> None:
        message = message_of(error)
        self.matrix.failures |= {cell.title: message for cell in cells}
        say(f"matrix: {len(cells)} cells failed, {cells[0].title} among them: {message}")


def share(config: Config, resources: Resources) -> tuple[float, int, int]:
    """Return (GPUs of a trial, trials at once, CPU threads of each), as the section `matrix` limits them."""
    return shares(config.matrix.num_gpus, config.matrix.max_concurrent, resources)


def _nothing(_value: Any) -> None:
    """Succeed if what it waits for did; the value itself never comes to the driver."""
