"""An open experiment: its sets, read once and found disjoint, its recipes, and what was measured of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eclipse_ray import ledger
from eclipse_ray.cluster.connect import local_denoiser, refuse_process_local
from eclipse_ray.config import CompensationConfig, Config, content_hash, digest, with_overrides
from eclipse_ray.datasets.formats import open_source, read_labels
from eclipse_ray.datasets.memory import ImageSet, choose_clean, load_images, load_sample, require_classes
from eclipse_ray.diffusion.checkpoint import CARD_FILE, load_denoiser, read_card, weights_digest
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.experiments import search
from eclipse_ray.experiments.artifacts import Cache, load_published, require_one_size
from eclipse_ray.experiments.recipe import (
    Facts,
    Grid,
    Measured,
    Recipe,
    Recommended,
    attacked_denoisers,
    build_grid,
    given_denoisers,
    published_sources,
    single_grid,
    source_column,
    sparse_counts,
)
from eclipse_ray.experiments.search import SPARSE_PERCENT, Space, Trial
from eclipse_ray.log import counted, say
from eclipse_ray.storage.store import Store

PERCENT_OF_THREAT_MODEL = 5.0


@dataclass(frozen=True)
class Sets:
    """The images of an experiment, disjoint by content: those of data.source, those that test, the clean set.

    `parts` are the clean images that train a denoiser, by the setting that chooses them (see Facts.sparse).
    `total` is the number of images of data.source, of which a sweep reads a sample. `published` are the ids of the
    images of `source` in each poison that others published, by location.
    """

    source: ImageSet
    test: ImageSet
    sparse: ImageSet | None
    parts: dict[float | None, ImageSet]
    total: int
    published: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Classes of the training and test images."""
        return int(max(labels_of(self.source).max(), labels_of(self.test).max())) + 1


def labels_of(images: ImageSet) -> NDArray[np.int64]:
    """Return the labels of a set that was read as a labelled one."""
    assert images.labels is not None, "the set was read as a labelled one"
    return images.labels


def check_labels(config: Config, *urls: str, partly: bool = False) -> None:
    """Say which classes sets have, before an image of any is read; data.source needs two. Raises InputError."""
    for url in urls:
        least = 2 if url == config.data.source else 1
        require_classes(url, open_source(url, config.data), least, partly=partly)


@dataclass
class Experiment:
    """An experiment and how far it is; `failures` are messages by title, of what the last run could not do.

    A sweep has a `space`; `trials` are its points, or None when Optuna chooses them one by one.
    """

    config: Config
    sets: Sets
    facts: Facts
    grid: Grid
    output: str | None
    space: Space = field(default_factory=dict)
    trials: list[Trial] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    results: dict[str, Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open the folder of results, if there is one."""
        self.cache = Cache(self.output)
        if self.output is not None and self.store.is_file():
            raise InputError(f"{self.output}: this is a file; choose a folder as output")
        refuse_process_local(str(self.output), self.output is not None and self.store.in_this_process_only)

    @property
    def store(self) -> Store:
        """The folder of results and tables."""
        return self.cache.store

    def done(self) -> set[str]:
        """Return the keys of all recipes that were ever measured in this folder, none without a folder."""
        if self.output is None:
            return set()
        names = (entry.key.rpartition("/")[2] for entry in self.store.list("results"))
        return {name.removesuffix(".json") for name in names}

    def missing(self) -> list[Recipe]:
        """Return the recipes that are still to be measured, each key once, in order."""
        done = self.done()
        return list({one.key: one for one in self.grid.recipes if one.key not in done}.values())

    def result(self, key: str) -> Measured:
        """Return what was measured for a recipe; a result never changes."""
        if key not in self.results:
            self.results[key] = Measured(**json.loads(self.store.read(f"results/{key}.json")))
        return self.results[key]

    def measured_trials(self) -> list[Trial]:
        """Return the trials of a sweep whose recipes are all measured, in order."""
        done = self.done()
        if self.trials is not None:
            found = self.trials
        else:
            points = {json.dumps(self.result(key).point): self.result(key).point for key in sorted(done)}
            inside = [point for point in points.values() if search.contains(self.space, point)]
            found = [search.make_trial(self.config, point, self.facts) for point in inside]
        return [trial for trial in found if all(recipe.key in done for recipe in trial.recipes)]

    def trials_wanted(self) -> int:
        """Return how many trials a sweep has when it is done."""
        return self.config.sweep.trials if self.trials is None else len(self.trials)

    def trials_left(self) -> int:
        """Return how many trials of a sweep a run would still do."""
        return self.trials_wanted() - len(self.measured_trials())


def result_json(result: Measured) -> bytes:
    """Return what is stored of a result."""
    return json.dumps(asdict(result), indent=1).encode()


def open_evaluation(config: Config) -> Experiment:
    """Return the experiment that judges data.source as it is on data.test; the last epoch decides.

    Raises InputError for missing labels, sets that share images, or images of two sizes.
    """
    data = config.data
    if not data.source or not data.test:
        raise ConfigError("evaluate needs both: eclipse-ray evaluate SRC --test SRC")
    check_labels(config, data.source, data.test)
    source, test = load_images(data.source, data), load_images(data.test, data)
    _same_classes(data.source, source, data.test, test)
    advice = ": train and test images must have the same size"
    require_one_size(data.source, source, data.test, test, advice)
    recorded = ledger.recorded_settings(Store(data.source))
    sparse = load_images(data.clean, data) if data.clean else None
    sets = Sets(source, test, sparse, {}, len(source.ids))
    used = recorded.purify.denoiser if recorded else None
    _refuse_shared(config, sets, {used} if used else ())
    grid = single_grid(config, evaluated_compensation(config, recorded, data.source))
    return Experiment(config, sets, Facts("", "", {}), grid, None)


def evaluated_compensation(config: Config, recorded: Config | None, source: str) -> CompensationConfig:
    """Return what a victim of one dataset trains with, as evaluate.compensation says.

    `recorded` are the settings of the run that wrote `source`, None if no run did.
    """
    if config.evaluate.compensation != "recorded":
        return config.compensation.model_copy(update={"mode": config.evaluate.compensation})
    found = recorded.compensation if recorded else CompensationConfig(mode="none")
    for name, value in config.compensation.model_dump(exclude_defaults=True).items():
        if getattr(found, name) != value or (found.mode == "none" and name != "mode"):
            say(
                f"note: compensation.{name} has no effect: the victim trains as the run of {source} recorded; add "
                "--set evaluate.compensation=augment to compensate as section compensation says"
            )
            break
    return found


def open_matrix(config: Config) -> Experiment:
    """Return the experiment of the section `matrix`; only a run writes anything.

    The *clean* training images are compared with the sparse and the test set, because a poison changes the content
    of every image. Raises ConfigError for settings that cannot work, InputError for sets that share images,
    missing labels or two sizes.
    """
    data, matrix = config.data, config.matrix
    for name, value in (("data.source", data.source), ("data.test", data.test), ("data.output", data.output)):
        if not value:
            raise ConfigError(f"{name} is not set: a matrix needs data.source, data.test and data.output")
    # Once without images, so that a wrong entry is found before minutes of reading.
    unread: dict[float | None, str] = dict.fromkeys(sparse_counts(config), "") if data.clean else {}
    given = given_denoisers(config)
    # What a poison attacks may have been trained on any image: no victim sees what it makes of clean ones.
    denoisers = _given(given | attacked_denoisers(config))
    build_grid(config, Facts("", "", unread, denoisers, dict.fromkeys(published_sources(config), "")))
    check_labels(config, str(data.source), str(data.test))
    for url in published_sources(config):
        opened = open_source(url, data)
        own = read_labels(opened)
        if own is not None and (own >= 0).any():
            require_classes(url, opened)
    source = load_images(str(data.source), data, limit=matrix.limit)
    test = load_images(str(data.test), data, limit=matrix.test_limit)
    sparse = load_images(data.clean, data) if data.clean else None
    _check_classes(config, source)
    _same_classes(str(data.source), source, str(data.test), test)
    named = {"training set": source, "test set": test}
    parts: dict[float | None, ImageSet] = {}
    if sparse is not None:
        named["sparse clean set"] = sparse
        if sparse.labels is not None and int(sparse.labels.min()) < 0:
            sparse = replace(sparse, labels=None)
        parts = {count: _first(sparse, count) for count in sparse_counts(config)}
    sizes = {name: images.images.shape[1:3] for name, images in named.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"a matrix needs images of one size, found {sizes}; set data.resize")
    total = len(source.ids) if matrix.limit is None else open_source(str(data.source), data).images
    sets = Sets(source, test, sparse, parts, total)
    _refuse_shared(config, sets, given)
    identities, names = _published(config, sets, given)
    sets, facts = replace(sets, published=names), replace(_facts(sets, denoisers), published=identities)
    grid = build_grid(config, facts)
    if any(row.defense.dilution for row in grid.rows) and (sparse is None or sparse.labels is None):
        raise InputError(
            f"{data.clean}: the defense dilution needs labels of every sparse clean image; leave it out"
        )
    return Experiment(config, sets, facts, grid, data.output)


def _published(
    config: Config, sets: Sets, denoisers: Iterable[str]
) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    """Return the identity of every poison that others published and its ids in the order of the training images.

    Both are by location; the images are checked as a training set is.
    """
    found, names = {}, {}
    for url in published_sources(config):
        images, names[url] = load_published(url, sets.source, config)
        own = with_overrides(config, {"data.source": url})
        _refuse_shared(own, replace(sets, source=images), denoisers)
        found[url] = _identity(images)
    return found, names


def _check_classes(config: Config, source: ImageSet) -> None:
    found = set(labels_of(source).tolist())
    if config.matrix.limit and source.classes and len(found) < len(source.classes):
        raise InputError(
            f"{config.data.source}: its first {config.matrix.limit} images are of {len(found)} of "
            f"{len(source.classes)} classes; take part of it with `eclipse-ray split`, which keeps all classes"
        )


def _first(images: ImageSet, count: int | None) -> ImageSet:
    if count is None:
        return images
    if count > len(images.ids):
        raise InputError(f"matrix.sparse_limit {count}: the sparse set has {counted(len(images.ids), 'image')}")
    return images.take(range(count))


def open_sweep(config: Config) -> Experiment:
    """Return the experiment of the section `sweep`; only a run writes anything.

    Raises ConfigError for a space that cannot be searched, InputError for unusable sets.
    """
    if config.sweep.search == "optuna":
        search.require_optuna()
    search.check_space(config)
    # Ray Tune gives each trial a working directory of its own, where a relative path leads nowhere.
    places = {"data.output": config.data.output, "purify.denoiser": config.purify.denoiser}
    config = with_overrides(config, {key: Store(place).url for key, place in places.items() if place})
    sets = sweep_sets(config)
    # Not those of a grid in the same file.
    facts = _facts(sets, _given([config.purify.denoiser] if config.purify.denoiser else ()))
    space = search.space_of(config, facts)
    for note in sweep_notes(config, sets):
        say(f"sweep: {note}")
    trials = None
    if config.sweep.search == "optuna":
        for point in search.deepest_points(space):
            search.make_trial(config, point, facts)
    else:
        trials = search.choose_trials(config, space, facts)
    found = trials or []
    recipes = [recipe for trial in found for recipe in trial.recipes]
    grid = Grid([source_column(facts, "data")], [trial.row for trial in found], [], [], recipes)
    return Experiment(config, sets, facts, grid, config.data.output, space, trials)


def sweep_sets(config: Config) -> Sets:
    """Return the sets of a sweep: a labelled sample of data.source, and clean images that trained no denoiser.

    Raises ConfigError for a location that is not set, InputError for missing labels, sets that share images, two
    sizes, and when no clean image is left to score a victim on.
    """
    data, sweep = config.data, config.sweep
    if not data.source or not data.clean or not data.output:
        raise ConfigError("a sweep needs SRC, --clean SRC and --out DIR")
    check_labels(config, data.source)
    check_labels(config, data.clean, partly=True)
    clean = load_images(data.clean, data)
    total = open_source(data.source, data).images
    parts: dict[float | None, ImageSet] = {}
    if config.purify.denoiser:
        known = set(read_card(local_denoiser(config.purify.denoiser)).sparse_hashes)
        trained = np.array([one in known for one in clean.hashes()], np.bool_)
    else:
        trained = _chosen(clean, round((1 - sweep.holdout) * len(clean.ids)), config.run.seed)
        parts = _sparse_parts(config, clean.take(np.flatnonzero(trained)), total)
    if trained.all():
        raise InputError(
            f"{data.clean}: all {len(clean.ids)} images trained {config.purify.denoiser}, so none is left to "
            f"score a victim on; divide them with `eclipse-ray split {data.clean} --clean {len(clean.ids) // 2} "
            f"--out DIR`, train on DIR/clean and sweep with --clean {data.clean}; or leave --denoiser out, and "
            "the sweep trains on a part"
        )
    source = load_sample(data.source, data, sweep.images, config.run.seed)
    scored = of_classes(clean.take(np.flatnonzero(~trained)), source)
    _refuse(f"{data.source}, {data.clean}", set(source.hashes()), set(), set(clean.hashes()))
    _check_scored(config, source, scored)
    return Sets(source, scored, clean, parts, total)


def sweep_notes(config: Config, sets: Sets) -> list[str]:
    """Return what a user should know before the results of these sets are believed."""
    found = []
    assert sets.sparse is not None, "a sweep reads clean images"
    clean = len(sets.sparse.ids)
    sampled, known = len(np.unique(labels_of(sets.source))), len(sets.source.classes or [])
    if sampled < known:
        found.append(f"the sample has images of {sampled} of {known} classes; a victim is scored on those alone")
    percent = 100 * clean / sets.total
    if percent > PERCENT_OF_THREAT_MODEL:
        found.append(f"{clean:,} clean images are {percent:.1f} % of the dataset; results are for such a set")
    error = 50 / np.sqrt(len(sets.test.ids) * config.sweep.seeds)
    found.append(f"{len(sets.test.ids):,} images score a victim: one standard error is up to {error:.1f} points")
    return found


def _sparse_parts(config: Config, pool: ImageSet, total: int) -> dict[float | None, ImageSet]:
    """Return the images of `pool` that train the denoiser of each sparse_percent."""
    found: dict[float | None, ImageSet] = {}
    listed = search.listed(config.sweep.space.get(SPARSE_PERCENT, []))
    for percent in [config.sweep.sparse_percent, *listed]:
        count = len(pool.ids) if percent is None else round(percent * total / 100)
        if not 2 <= count <= len(pool.ids):
            raise InputError(
                f"{config.data.clean}: {percent} % of {total:,} are {count}, but {len(pool.ids)} clean "
                "images may train a denoiser (sweep.holdout keeps the rest); lower sweep.sparse_percent"
            )
        found[percent] = pool.take(np.flatnonzero(_chosen(pool, count, config.run.seed)))
    return found


def _chosen(images: ImageSet, count: int, seed: int) -> NDArray[np.bool_]:
    labels = [None] * len(images.ids) if images.labels is None else images.labels.tolist()
    return choose_clean(list(images.hashes()), labels, count, seed)


def of_classes(clean: ImageSet, sample: ImageSet) -> ImageSet:
    """Return the clean images of the sample's classes, for no victim learns another, and those without a label."""
    if clean.labels is None or sample.labels is None:
        return clean
    return clean.take(np.flatnonzero(np.isin(clean.labels, sample.labels) | (clean.labels < 0)))


def _check_scored(config: Config, source: ImageSet, scored: ImageSet) -> None:
    data = config.data
    if not len(scored.ids):
        raise InputError(
            f"{data.clean}: no image of the sample's classes is left to score with; give more, or raise "
            "sweep.holdout"
        )
    require_one_size(str(data.source), source, str(data.clean), scored)
    if scored.labels is None or int(scored.labels.min()) < 0:
        raise InputError(
            f"{data.clean}: a sweep scores victims on it and needs the labels of clean images; put the images of "
            "each class into a folder of its own, or give a dataset with a label column"
        )
    _same_classes(str(data.source), source, str(data.clean), scored)


def _same_classes(url: str, images: ImageSet, other_url: str, other: ImageSet) -> None:
    # Labels are indices, so a class that one set lacks shifts those behind it.
    if images.classes and other.classes and images.classes != other.classes:
        names, others = (", ".join(each[:20]) for each in (images.classes, other.classes))
        raise InputError(
            f"{url} has the classes {names} and {other_url} has {others}, so a label would mean two things; "
            "give both the same classes in the same order"
        )


def _given(locations: Iterable[str]) -> dict[str, Recommended]:
    """Return what given denoisers say of their use and a digest of their content, by their location."""
    found = {}
    for location in locations:
        folder = local_denoiser(location)
        known = load_denoiser(folder)
        own = {each.name: getattr(known, each.name) for each in fields(Recommended) if each.name != "weights"}
        card = (Path(folder) / CARD_FILE).read_text(encoding="utf-8")
        found[location] = Recommended(**own, weights=digest([weights_digest(folder), card]))
    return found


def _facts(sets: Sets, denoisers: Mapping[str, Recommended]) -> Facts:
    """Return the digests that keys are made of."""
    sparse = {part: _identity(images) for part, images in sets.parts.items()}
    return Facts(_identity(sets.source), _identity(sets.test), sparse, denoisers)


def _identity(images: ImageSet) -> str:
    """Return a digest of ids, contents (as they are trained on, after data.resize) and labels."""
    labels = None if images.labels is None else images.labels.tolist()
    return digest([images.ids, [content_hash(image) for image in images.images], labels])


def _refuse_shared(config: Config, sets: Sets, denoisers: Iterable[str]) -> None:
    """Refuse to measure on images that were trained on, by the victim or by a given denoiser."""
    sparse = set() if sets.sparse is None else set(sets.sparse.hashes())
    for denoiser in denoisers:
        sparse |= set(read_card(local_denoiser(denoiser)).sparse_hashes)
    where = f"{config.data.source}, {config.data.test}"
    _refuse(where, set(sets.source.hashes()), set(sets.test.hashes()), sparse)


def _refuse(where: str, train: set[str], test: set[str], sparse: set[str]) -> None:
    """Raise InputError unless the content hashes of training, test and sparse clean images are disjoint."""
    for name, first, second in (
        ("training and test set", train, test),
        ("sparse clean set and test set", sparse, test),
        ("sparse clean set and training set", sparse, train),
    ):
        shared = len(first & second)
        if shared:
            raise InputError(
                f"{where}: {name} share {counted(shared, 'image')} (by content); they must be disjoint"
            )


def score_of(result: Measured, fidelity_weight: float) -> float:
    """Return the last test accuracy plus what the fidelity is worth, where a recipe asks for it."""
    return result.test_accuracy[-1] + fidelity_weight * (result.psnr or 0.0)
