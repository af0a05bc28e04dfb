"""The recipes of an experiment: which there are, the key of each, and the order in which they are measured.

A recipe is one cell: a victim trained with one seed on the images of a column under a defense. `evaluate` of one
dataset has one column and one row, a matrix has many, and a sweep has one column whose rows are searched. A key is
a digest of everything that decides the number of a cell and of nothing else, so a grid that grows, or is searched
in another way, finds what it has measured before. No Ray in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from eclipse_ray.config import TILES, CompensationConfig, Config, MatrixItem, VictimConfig, digest, with_overrides
from eclipse_ray.defenses import DEFENSES, PURIFICATIONS, combine, resolved_defense
from eclipse_ray.defenses.eclipse import Avatar, avatar_depth
from eclipse_ray.defenses.interface import Defense
from eclipse_ray.diffusion.process import cosine_alphas_cumprod
from eclipse_ray.diffusion.sampling import ENGINE_VERSION, check_purification
from eclipse_ray.errors import ConfigError
from eclipse_ray.inversion import METHOD
from eclipse_ray.poisons import OPTIMISED, attacks_denoiser, cost_of, resolved_poison
from eclipse_ray.poisons.adp import Adp, check_attacked
from eclipse_ray.purification.plan import PURIFY_IN_FINGERPRINT

VERSION = 2
"""Increased when a change of the code makes old cells, poisons or transformed sets wrong."""
CLEAN = "clean"
PUBLISHED = "published"
"""Name of a poison that is read from the `source` of its entry, not made here."""

# An experiment purifies whole sets in memory, so how a run is cut into shards does not matter.
PURIFY_IN_KEY = PURIFY_IN_FINGERPRINT - {"shard_images", "shard_bytes"}
RESERVED = ("name", "label", "published")
DEFENSE_SECTIONS = ("defense", "purify", "compensation", "denoiser", "matrix.sparse_limit")
"""What a defense entry may override, sections or settings; a setting without a section belongs to the first."""
NAMED = ("poison.name", "victim.arch", "compensation.mode")
"""What no entry overrides: the name of the entry says it, or the name of its defense."""


@dataclass(frozen=True)
class Entry:
    """One poison, defense or victim of the config: its label, its name, and the settings that are its own.

    `source` is the location of a poisoned copy of data.source that others published; empty for all other entries.
    `against` is a defense whose denoiser is trained against the images of each column.
    """

    label: str
    name: str
    published: str
    settings: dict[str, Any]
    source: str = ""
    against: bool = False


# Asked for each row and point.
_schedule = lru_cache(maxsize=8)(cosine_alphas_cumprod)


@dataclass
class Recommended:
    """What a denoiser says of its use, whether it is there or is still to be trained (`sampling.Trained`).

    `weights` is a digest of a given one, and empty of one that is trained here.
    """

    t_max: int
    t_star: int
    num_inference_steps: int
    sampler: str
    tile: int
    int8: bool
    alphas_cumprod: Tensor = field(repr=False, compare=False)
    weights: str = ""


@dataclass(frozen=True)
class Facts:
    """Digests of the images that an experiment reads.

    `sparse` are the images that train a denoiser, by the setting that chooses them (matrix.sparse_limit, or
    sweep.sparse_percent); None stands for all of them. `denoisers` are those that are given, `published` sets that
    take the place of a poison, both by their location.
    """

    source: str
    test: str
    sparse: Mapping[float | None, str]
    denoisers: Mapping[str, Recommended] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)

    def of_denoiser(self, config: Config) -> Recommended:
        """Return what the denoiser says, the given one or the one that `config` trains."""
        if config.purify.denoiser:
            return self.denoisers[config.purify.denoiser]
        own = config.denoiser
        return Recommended(
            int(own.t_max or 0),
            own.t_star,
            own.num_inference_steps,
            own.sampler,
            TILES[own.network],
            own.network == "shuffled",
            _schedule(own.num_train_timesteps),
        )


@dataclass(frozen=True)
class Column:
    """A poison, or the images of data.source as they are; `key` identifies the images.

    `config` is None unless the poison is made here.
    """

    entry: Entry
    config: Config | None
    key: str

    @property
    def poisoned(self) -> bool:
        """Whether the images are others than those of data.source."""
        return self.config is not None or self.entry.source != ""


@dataclass(frozen=True)
class Row:
    """A defense with its settings; `denoiser` is the key of the denoiser that it needs, or empty.

    `compensation` is what a victim trains with.
    """

    entry: Entry
    config: Config
    compensation: CompensationConfig
    denoiser: str = ""

    @property
    def defense(self) -> Defense:
        """The functions of the defense."""
        return combine(self.entry.name)


@dataclass(frozen=True)
class Victim:
    """A classifier and how it is trained."""

    entry: Entry
    config: VictimConfig


@dataclass(frozen=True)
class Need:
    """A transformed set that has to be made: the images of `column`, or the test images (None), under `row`."""

    key: str
    row: Row
    column: Column | None


@dataclass(frozen=True)
class Recipe:
    """One cell, whose result has the key `key`; `training` identifies the images that the victim is trained on.

    `scored` identifies the test images under the same defense, which tell its fidelity; empty: nobody asks for it.
    """

    key: str
    title: str
    column: Column
    row: Row
    victim: Victim
    seed: int
    training: str
    scored: str = ""

    @property
    def needs(self) -> list[Need]:
        """The transformed sets that the cell needs."""
        own = [Need(self.training, self.row, self.column)] if self.training != self.column.key else []
        return own + ([Need(self.scored, self.row, None)] if self.scored else [])


@dataclass(frozen=True)
class Measured:
    """The result of a recipe: test accuracy (0-100) and training loss after each epoch, and how it was measured.

    `psnr` is the fidelity in dB where a recipe asks for it. `stopped` results were ended early by ASHA. `point`
    holds the settings of the row that are its own.
    """

    title: str
    test_accuracy: list[float]
    train_loss: list[float]
    seconds: float
    device: str
    threads: int
    images: int
    seed: int
    victim: dict[str, Any]
    compensation: dict[str, Any]
    point: dict[str, Any]
    psnr: float | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Grid:
    """All recipes in the order in which they are measured, and the axes in the order in which they are printed."""

    columns: list[Column]
    rows: list[Row]
    victims: list[Victim]
    seeds: list[int]
    recipes: list[Recipe]


def single_grid(config: Config, compensation: CompensationConfig) -> Grid:
    """Return the grid of one dataset that is judged as it is, with one recipe per seed."""
    facts = Facts("source", "test", {})
    column, row = source_column(facts, CLEAN), Row(_plain("none"), config, compensation)
    victim = Victim(_plain(config.victim.arch), config.victim)
    seeds = _seeds(config)
    recipes = [make_recipe(column, row, victim, seed, facts, f"seed {seed}") for seed in seeds]
    return Grid([column], [row], [victim], seeds, recipes)


def build_grid(config: Config, facts: Facts) -> Grid:
    """Return the grid of the section `matrix`. Raises ConfigError for unknown names and for two equal labels."""
    matrix = config.matrix
    columns = _columns(config, facts)
    rows = [_row(entry, chosen, facts) for entry, chosen in row_configs(config)]
    if not rows:
        raise ConfigError("matrix: no defense is listed; name at least one")
    named = entries(matrix.victims or (config.victim.arch,), ("victim",))
    chosen = [with_overrides(config, {"victim.arch": entry.name, **entry.settings}) for entry in named]
    victims = [Victim(entry, own.victim) for entry, own in zip(named, chosen, strict=True)]
    seeds = _seeds(config)
    _check_first("first_poisons", matrix.first_poisons, [column.entry for column in columns])
    _check_first("first_defenses", matrix.first_defenses, [row.entry for row in rows])
    recipes = [
        make_recipe(column, row, victim, seed, facts, _title(column, row, victim, seed))
        for first in (True, False)
        for seed in seeds
        for column in columns
        for victim in victims
        for row in rows
        if first == _comes_first(config, column, row)
    ]
    return Grid(columns, rows, victims, seeds, recipes)


def make_recipe(
    column: Column,
    row: Row,
    victim: Victim,
    seed: int,
    facts: Facts,
    title: str,
    *,
    scored: str = "",
    rungs: Sequence[int] | None = None,
) -> Recipe:
    """Return the recipe of a cell; `rungs` are the numbers of ASHA that decide when a victim is stopped."""
    row = facing(row, column)
    training = defended_key(column.key, row)
    loader = [part for part in row.entry.name.split("+") if DEFENSES[part].augmentation or DEFENSES[part].privacy]
    compensation = row.compensation.model_dump(mode="json") if row.compensation.mode != "none" else None
    parts = [
        ["cell", VERSION, training, facts.test, seed, victim.config.model_dump(mode="json")],
        [loader, row.config.defense.model_dump(mode="json") if loader else None],
        compensation,
        sparse_of(facts, row.config.matrix.sparse_limit, row.entry.label) if row.defense.dilution else None,
        [scored, rungs] if scored else None,
    ]
    return Recipe(digest(parts), title, column, row, victim, seed, training, scored)


def entries(items: Sequence[MatrixItem], sections: Sequence[str]) -> list[Entry]:
    """Return names and mappings as entries; a setting without a section belongs to the first of `sections`.

    Raises ConfigError for an entry without a name, a setting of another section, and two equal labels.
    """
    found = [_entry(item, sections) for item in items]
    labels = [entry.label for entry in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"matrix: two {sections[0]} entries are called {label}; give each a label of its own"
            )
    return found


def _entry(item: MatrixItem, sections: Sequence[str]) -> Entry:
    if isinstance(item, str):
        return _plain(item)
    if sections[0] == "poison" and ("source" in item or item.get("name") == PUBLISHED):
        return _published(item)
    name = item.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"matrix: {item!r} has no name; an entry is a name or a mapping with `name`")
    own = {key: value for key, value in item.items() if key not in RESERVED}
    words = ", ".join(f"{key}={value}" for key, value in own.items())
    against = own.pop("against", False) if sections[0] == "defense" else False
    if not isinstance(against, bool):
        raise ConfigError(f"matrix: {name}: against is {against!r}; it is true or false")
    settings = {key if "." in key else f"{sections[0]}.{key}": value for key, value in own.items()}
    for key in settings:
        if key in NAMED:
            raise ConfigError(f"matrix: {name} cannot set {key}, which its name says; choose another name")
        if not {key, key.split(".")[0]} & set(sections):
            raise ConfigError(f"matrix: {name} cannot set {key}; an entry sets keys of {', '.join(sections)}")
    label = _text(item, "label", f"{name} ({words})" if words else name)
    # A variant is compared with no number of the paper unless its entry names one.
    return Entry(label, name, _text(item, "published", "" if words else name), settings, against=against)


def _text(item: dict[str, Any], key: str, default: str) -> str:
    value = item.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ConfigError(f"matrix: {item['name']}: {key} is {value!r}; write a text, in quotes, or leave it out")
    return default if value is None else value


def _published(item: dict[str, Any]) -> Entry:
    source = item.get("source")
    known = item.keys() <= {*RESERVED, "source"} and item.get("name") == PUBLISHED
    if not known or not isinstance(source, str) or not source:
        raise ConfigError(
            f"matrix.poisons: {item!r}: a poison that others published is written as `name: published` and "
            "`source: SRC`, with an optional `label` and `published`; it is read as it is and has no settings"
        )
    label = _text(item, "label", PurePosixPath(source).name)
    return Entry(label, PUBLISHED, _text(item, "published", ""), {}, source)


def _plain(name: str) -> Entry:
    return Entry(name, name, name, {})


def source_column(facts: Facts, label: str) -> Column:
    """Return the column of the images of data.source as they are."""
    return Column(_plain(label), None, images_key(facts.source))


def images_key(identity: str) -> str:
    """Return the key of images that nothing has changed."""
    return digest(["clean", VERSION, identity])


def _columns(config: Config, facts: Facts) -> list[Column]:
    columns = [source_column(facts, CLEAN)] if config.matrix.clean else []
    for entry, chosen in column_configs(config):
        if entry.label == CLEAN:
            raise ConfigError("matrix.poisons: `clean` is no poison; set matrix.clean: true")
        if entry.source:
            # With the clean images, because the distance to them is kept under the key.
            parts = ["published", VERSION, facts.source, facts.published[entry.source]]
            columns.append(Column(entry, None, digest(parts)))
            continue
        denoised = attacked(chosen)
        # That of the section is for the poisons that attack one.
        own = {} if denoised else {"denoiser": None}
        poison = resolved_poison(chosen.poison.model_copy(update=own))
        kept = {
            "denoiser": denoised is not None,
            "cost": cost_of(poison),
            "save_seconds": entry.name in OPTIMISED,
        }
        kept["chunk_images"] = kept["save_seconds"]
        _refuse_unused(entry, {f"poison.{key}" for key in poison.model_dump() if kept.get(key, True)})
        numbers = poison.model_dump(mode="json", exclude=set(poison.OF_A_RUN))
        parts = ["poison", VERSION, facts.source, numbers, config.run.seed]
        if denoised:
            with _named(f"matrix: {entry.label}"):
                check_attacked(Adp.model_validate(poison.own()), facts.of_denoiser(denoised).t_max)
            parts.append(denoiser_key(denoised, facts, chosen.matrix.sparse_limit))
        columns.append(Column(entry, chosen.model_copy(update={"poison": poison}), digest(parts)))
    return columns


def column_configs(config: Config) -> list[tuple[Entry, Config]]:
    """Return the poisons of a matrix, each with all its settings; one that others published has none."""
    found = entries(config.matrix.poisons, ("poison",))
    named = [{} if entry.source else {"poison.name": entry.name, **entry.settings} for entry in found]
    return [(entry, with_overrides(config, own)) for entry, own in zip(found, named, strict=True)]


def published_sources(config: Config) -> list[str]:
    """Return the locations of the poisons of a matrix that others published."""
    return [entry.source for entry in entries(config.matrix.poisons, ("poison",)) if entry.source]


def attacked(config: Config) -> Config | None:
    """Return the settings of the denoiser that a poison is made against, which must be there first; None if none.

    It is that of poison.denoiser, else the defender's own.
    """
    if not attacks_denoiser(config.poison):
        return None
    purify = config.purify.model_copy(update={"denoiser": config.poison.denoiser or config.purify.denoiser})
    return config.model_copy(update={"purify": purify})


def row_configs(config: Config) -> list[tuple[Entry, Config]]:
    """Return the rows of a matrix, each with all its settings. Raises ConfigError that names the row."""
    found = []
    for entry in entries(config.matrix.defenses, DEFENSE_SECTIONS):
        with _named(f"matrix: {entry.label}"):
            found.append((entry, with_overrides(config, entry.settings)))
    return found


def _row(entry: Entry, chosen: Config, facts: Facts) -> Row:
    defense = combine(entry.name)
    chosen = chosen.model_copy(update={"defense": resolved_defense(chosen.defense)})
    denoiser = ""
    if any(DEFENSES[one].transform in PURIFICATIONS for one in transforms(entry.name)):
        denoiser = denoiser_key(chosen, facts, chosen.matrix.sparse_limit)
        # Here, because a grid would learn it from the denoiser only after that is trained.
        with _named(f"matrix: {entry.label}"):
            known, purify = facts.of_denoiser(chosen), chosen.purify
            if "avatar" in transforms(entry.name):
                # It has a depth and steps of its own.
                purify = purify.model_copy(update={"t_star": None, "num_inference_steps": None})
                avatar_depth(Avatar.of(chosen.defense), known)
            check_purification(known, purify)
    if entry.against and (not denoiser or chosen.purify.denoiser):
        raise ConfigError(
            f"matrix: {entry.label}: against is for a defense that purifies, without purify.denoiser"
        )
    if defense.dilution:
        sparse_of(facts, chosen.matrix.sparse_limit, entry.label)
    compensation = defense.compensation(chosen) if defense.compensation else CompensationConfig(mode="none")
    row = Row(entry, chosen, compensation, denoiser)
    _refuse_unused(entry, _used(row))
    return row


def _used(row: Row) -> set[str]:
    """Return the settings that decide how the images of a row are made, and how its victim is trained on them."""
    own, used = row.config, transforms(row.entry.name)
    parts = [DEFENSES[name].settings for name in row.entry.name.split("+")]
    found = {f"defense.{key}" for part in parts if part for key in part.model_fields}
    if row.denoiser:
        # Avatar has a depth and steps of its own.
        depth = {"t_star", "num_inference_steps", "sampler"} if "avatar" in used else set()
        found |= {f"purify.{key}" for key in (PURIFY_IN_KEY | {"denoiser"}) - depth}
    if row.denoiser and not own.purify.denoiser:
        found |= {f"denoiser.{key}" for key in own.denoiser.model_dump() if key != "output"}
    if row.defense.dilution or (row.denoiser and not own.purify.denoiser):
        found.add("matrix.sparse_limit")
    added = own.compensation if "eclipse-baked" in used else row.compensation
    if "eclipse-baked" in used or row.defense.compensation:
        # What an ablation leaves out is 0 in `added`, and without coarse noise there is no grid of it.
        same = {key for key, value in own.compensation if getattr(added, key) == value}
        found |= {f"compensation.{key}" for key in same - ({"coarse_grid"} if not added.coarse_sigma else set())}
    return found


def _refuse_unused(entry: Entry, used: set[str]) -> None:
    """Raise ConfigError for a setting of an entry that changes nothing: its label would tell of it."""
    for key in entry.settings:
        if key not in used:
            raise ConfigError(f"matrix: {entry.label}: {key} has no effect on {entry.name} here; leave it out")


@contextmanager
def _named(who: str) -> Iterator[None]:
    """Let the sentence of a ConfigError begin with whose setting it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{who}: {error}") from None


def facing(row: Row, column: Column) -> Row:
    """Return the row as it meets a column: a denoiser trained against the column's images has a key of its own."""
    if not row.entry.against:
        return row
    return replace(row, denoiser=digest(["against", METHOD, row.denoiser, column.key]))


def transforms(name: str) -> list[str]:
    """Return the names of the transforms of a defense, in order.

    A transform is named after the first of DEFENSES that has it, wherever its code is: keys are made of the names.
    """
    used = [found for part in name.split("+") if (found := DEFENSES[part].transform)]
    return [next(key for key, defense in DEFENSES.items() if defense.transform is one) for one in used]


def denoiser_key(config: Config, facts: Facts, part: float | None) -> str:
    """Return the key of the denoiser of `config`, made of the weights of a given one, else of what trains it.

    `part` is the setting that chooses its sparse images.
    """
    from eclipse_ray.training import deciding_settings

    if config.denoiser.against:
        raise ConfigError("denoiser.against is for train; a row of a grid says `against: true`, a sweep has none")
    if config.purify.denoiser:
        return digest(["weights", facts.of_denoiser(config).weights])
    sparse = sparse_of(facts, part, "the denoiser")
    return digest(
        ["denoiser", VERSION, deciding_settings(config.denoiser), sparse, config.data.resize, config.run.seed]
    )


def sparse_of(facts: Facts, part: float | None, who: str) -> str:
    """Return the digest of sparse images. Raises ConfigError if there are none; `who` needs them."""
    if part not in facts.sparse:
        raise ConfigError(f"{who} needs the sparse clean set; name it in data.clean")
    return facts.sparse[part]


def sparse_counts(config: Config) -> set[int | None]:
    """Return every number of sparse images that a row of the matrix asks for; None stands for all."""
    return {config.matrix.sparse_limit, *(chosen.matrix.sparse_limit for _, chosen in row_configs(config))}


def given_denoisers(config: Config) -> set[str]:
    """Return the location of every denoiser that the config or a row of the matrix names."""
    own = [chosen for _, chosen in row_configs(config)]
    return {one.purify.denoiser for one in (config, *own) if one.purify.denoiser}


def attacked_denoisers(config: Config) -> set[str]:
    """Return the location of every given denoiser that a poison of the matrix attacks."""
    found = [attacked(chosen) for entry, chosen in column_configs(config) if not entry.source]
    return {one.purify.denoiser for one in found if one and one.purify.denoiser}


def defended_key(images: str, row: Row) -> str:
    """Return the key of the images `images` under the transforms of a row: the same key when nothing changes them.

    Rows with the same transforms, such as ECLIPSE and its ablations A, AB and AC, share one set.
    """
    used = transforms(row.entry.name)
    if not used:
        return images
    config = row.config
    settings: list[Any] = [used, config.run.seed]
    # These two do not read the section `defense`.
    if any(one not in ("eclipse", "eclipse-baked") for one in used):
        settings.append(config.defense.model_dump(mode="json"))
    if row.denoiser:
        purify = config.purify.model_dump(mode="json", include=PURIFY_IN_KEY)
        settings += [row.denoiser, purify, ENGINE_VERSION]
    if "eclipse-baked" in used:
        settings.append(config.compensation.model_dump(mode="json"))
    return digest(["defended", VERSION, images, settings])


def _title(column: Column, row: Row, victim: Victim, seed: int) -> str:
    return f"{column.entry.label}, {row.entry.label}, {victim.entry.label}, seed {seed}"


def _seeds(config: Config) -> list[int]:
    return [config.run.seed + index for index in range(config.evaluate.seeds)]


def _comes_first(config: Config, column: Column, row: Row) -> bool:
    poisons, defenses = config.matrix.first_poisons, config.matrix.first_defenses
    early = not column.poisoned or not poisons or column.entry.label in poisons
    return early and (not defenses or row.entry.label in defenses)


def _check_first(name: str, first: Sequence[str], found: Sequence[Entry]) -> None:
    labels = [entry.label for entry in found]
    for label in first:
        if label not in labels:
            raise ConfigError(f"matrix.{name}: {label} is not listed; it has {', '.join(labels)}")
