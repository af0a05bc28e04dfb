"""The cells of a matrix: which there are, the key of each, and the order in which they are done. No Ray in here.

A key is a digest of everything that decides the number in a cell, and of nothing else: so a grid that grows, or is
told to use other labels, finds what it has measured before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from eclipse_ray.config import Config, MatrixItem, VictimConfig, digest, with_overrides
from eclipse_ray.defenses import DEFENSES, PURIFICATIONS, Defense, combine
from eclipse_ray.diffusion.sampling import ENGINE_VERSION
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.costs import resolved_poison
from eclipse_ray.purification.plan import PURIFY_IN_FINGERPRINT

VERSION = 1
"""Bumped only when a change of ours makes old cells, poisons or transformed sets wrong."""
CLEAN = "clean"

# How a poison is computed and kept does not decide its pixels.
POISON_NOT_IN_KEY = {"store_perturbation", "save_seconds", "chunk_images", "denoiser"}
# A matrix purifies whole sets in memory: how a run is cut into shards does not matter.
PURIFY_IN_KEY = PURIFY_IN_FINGERPRINT - {"shard_images", "shard_bytes"}
RESERVED = ("name", "label", "published")


@dataclass(frozen=True)
class Entry:
    """One poison, defense or victim of the config: its label, its name, and the settings that are its own."""

    label: str
    name: str
    published: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """Digests of what the cells are measured on.

    `sparse` is by number of images (0: all) and empty without a sparse set; `weights` is of a given denoiser, and
    empty when it is trained here.
    """

    source: str
    test: str
    sparse: Mapping[int, str]
    weights: str = ""


@dataclass(frozen=True)
class Column:
    """A poison, or the clean images (`config` None); `key` names what training images it gives."""

    entry: Entry
    config: Config | None
    key: str


@dataclass(frozen=True)
class Row:
    """A defense with its settings; `denoiser` is the key of the denoiser it needs, or empty."""

    entry: Entry
    config: Config
    defense: Defense
    denoiser: str


@dataclass(frozen=True)
class Victim:
    """A classifier and how it is trained."""

    entry: Entry
    config: VictimConfig


@dataclass(frozen=True)
class Cell:
    """One number: a victim trained with `seed` on a column under a defense; `training` keys the images."""

    key: str
    training: str
    column: Column
    row: Row
    victim: Victim
    seed: int

    @property
    def title(self) -> str:
        """The cell in words."""
        return f"{self.column.entry.label}, {self.row.entry.label}, {self.victim.entry.label}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """All cells in the order in which they are done, and the axes in the order in which they are printed."""

    columns: list[Column]
    rows: list[Row]
    victims: list[Victim]
    seeds: list[int]
    cells: list[Cell]


def build_grid(config: Config, facts: Facts) -> Grid:
    """Return the grid of `config`. Raises ConfigError for what cannot be: unknown names, two equal labels."""
    matrix = config.matrix
    columns = _columns(config, facts)
    defenses = _entries(matrix.defenses, "defense", DEFENSE_SECTIONS)
    rows = [_row(config, entry, facts) for entry in defenses]
    victims = [_victim(config, entry) for entry in _victim_entries(config)]
    seeds = [config.run.seed + index for index in range(config.evaluate.seeds)]
    for name, labels in (("first_poisons", columns), ("first_defenses", rows)):
        _check_first(name, getattr(matrix, name), [axis.entry.label for axis in cast(Sequence[Any], labels)])
    cells = [
        _cell(column, row, victim, seed, facts)
        for first in (True, False)
        for seed in seeds
        for column in columns
        for victim in victims
        for row in rows
        if first == _comes_first(config, column, row)
    ]
    return Grid(columns, rows, victims, seeds, cells)


DEFENSE_SECTIONS = ("defense", "purify", "compensation", "denoiser", "matrix")
"""Sections whose settings a defense entry may override; the first one without naming it."""


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


def _entries(items: Sequence[MatrixItem], kind: str, sections: Sequence[str]) -> list[Entry]:
    found = entries(items, sections)
    if not found:
        raise ConfigError(f"matrix: no {kind} is listed; name at least one")
    return found


def _entry(item: MatrixItem, sections: Sequence[str]) -> Entry:
    if isinstance(item, str):
        return Entry(item, item, item, {})
    name = item.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"matrix: {item!r} has no name; an entry is a name or a mapping with `name`")
    own = {key: value for key, value in item.items() if key not in RESERVED}
    settings = {key if "." in key else f"{sections[0]}.{key}": value for key, value in own.items()}
    for key in settings:
        if key.split(".")[0] not in sections:
            raise ConfigError(f"matrix: {name} cannot set {key}; an entry sets keys of {', '.join(sections)}")
    words = ", ".join(f"{key}={value}" for key, value in own.items())
    label = str(item.get("label", f"{name} ({words})" if words else name))
    # A variant answers to no number of the paper unless it says so.
    return Entry(label, name, str(item.get("published", "" if words else name)), settings)


def _columns(config: Config, facts: Facts) -> list[Column]:
    columns = []
    if config.matrix.clean:
        columns.append(Column(Entry(CLEAN, CLEAN, CLEAN, {}), None, digest(["clean", VERSION, facts.source])))
    for entry in entries(config.matrix.poisons, ("poison",)):
        if entry.label == CLEAN:
            raise ConfigError("matrix.poisons: `clean` is no poison; set matrix.clean: true")
        chosen = with_overrides(config, {"poison.name": entry.name, **entry.settings})
        poison = resolved_poison(chosen.poison)
        numbers = poison.model_dump(mode="json", exclude=POISON_NOT_IN_KEY)
        parts = ["poison", VERSION, facts.source, numbers, config.run.seed]
        if attacks_denoiser(chosen):
            parts.append(_attacked(chosen, facts))
        columns.append(Column(entry, chosen.model_copy(update={"poison": poison}), digest(parts)))
    return columns


def attacks_denoiser(config: Config) -> bool:
    """Return whether the poison is made against a denoiser, which must be there first."""
    return config.poison.name == "adp" and config.poison.variant == "strong"


def _attacked(config: Config, facts: Facts) -> str:
    return config.poison.denoiser or denoiser_key(config, facts)


def _row(config: Config, entry: Entry, facts: Facts) -> Row:
    defense = combine(entry.name)
    chosen = with_overrides(config, entry.settings)
    denoiser = ""
    if needs_denoiser(entry.name):
        denoiser = denoiser_key(chosen, facts)
    if defense.dilution:
        _sparse(chosen, facts, entry.label)
    return Row(entry, chosen, defense, denoiser)


def needs_denoiser(name: str) -> bool:
    """Return whether a defense, or a part of it, denoises."""
    return any(DEFENSES[one].transform in PURIFICATIONS for one in transforms(name))


def transforms(name: str) -> list[str]:
    """Return the names of the transforms of a defense, in order.

    A transform is named after the first of DEFENSES that has it, wherever its code is: keys are made of the names.
    """
    used = [found for part in name.split("+") if (found := DEFENSES[part].transform)]
    return [next(key for key, defense in DEFENSES.items() if defense.transform is one) for one in used]


def denoiser_key(config: Config, facts: Facts) -> str:
    """Return the key of the denoiser of `config`: of a given one its weights, else what it is trained with."""
    if config.purify.denoiser:
        return digest(["weights", facts.weights])
    return trained_key(config, _sparse(config, facts, "the denoiser"))


def trained_key(config: Config, sparse: str) -> str:
    """Return the key of a denoiser trained as section `denoiser` says on the images that `sparse` identifies."""
    from eclipse_ray.training import NOT_IN_FINGERPRINT

    settings = config.denoiser.model_dump(mode="json", exclude=NOT_IN_FINGERPRINT)
    return digest(["denoiser", VERSION, settings, sparse, config.data.resize, config.run.seed])


def _sparse(config: Config, facts: Facts, who: str) -> str:
    count = config.matrix.sparse_limit or 0
    if count not in facts.sparse:
        raise ConfigError(f"{who} needs the sparse clean set; name it in data.clean")
    return facts.sparse[count]


def sparse_counts(config: Config) -> set[int]:
    """Return every number of sparse images that some row asks for; 0 stands for all."""
    own = [entry.settings for entry in entries(config.matrix.defenses, DEFENSE_SECTIONS)]
    return {config.matrix.sparse_limit or 0, *(int(one.get("matrix.sparse_limit") or 0) for one in own)}


def _victim_entries(config: Config) -> list[Entry]:
    return entries(config.matrix.victims or (config.victim.arch,), ("victim",))


def _victim(config: Config, entry: Entry) -> Victim:
    return Victim(entry, with_overrides(config, {"victim.arch": entry.name, **entry.settings}).victim)


def _cell(column: Column, row: Row, victim: Victim, seed: int, facts: Facts) -> Cell:
    training = _training_key(column, row)
    names, config, defense = row.entry.name, row.config, row.defense
    loader = [part for part in names.split("+") if DEFENSES[part].augmentation or DEFENSES[part].privacy]
    compensation = defense.compensation(config) if defense.compensation else None
    parts = [
        ["cell", VERSION, training, facts.test, seed, victim.config.model_dump(mode="json")],
        [loader, _defense_settings(config) if loader else None],
        compensation.model_dump(mode="json") if compensation and compensation.mode == "augment" else None,
        _sparse(config, facts, row.entry.label) if defense.dilution else None,
    ]
    return Cell(digest(parts), training, column, row, victim, seed)


def _training_key(column: Column, row: Row) -> str:
    """Return the key of the images that the victim trains on: the column's own when nothing changes them.

    Rows whose transforms are the same, such as ECLIPSE and its ablations A, AB and AC, share one set.
    """
    used = transforms(row.entry.name)
    if not used:
        return column.key
    config = row.config
    settings: list[Any] = [used, config.run.seed]
    # These two do not read the section `defense`.
    if any(one not in ("eclipse", "eclipse-baked") for one in used):
        settings.append(_defense_settings(config))
    if row.denoiser:
        settings += purification(config, row.denoiser)
    if "eclipse-baked" in used:
        settings.append(config.compensation.model_dump(mode="json"))
    return digest(["defended", VERSION, column.key, settings])


def purification(config: Config, denoiser: str) -> list[Any]:
    """Return what decides purified pixels, beside the images and the seed."""
    return [denoiser, config.purify.model_dump(mode="json", include=PURIFY_IN_KEY), ENGINE_VERSION]


def _defense_settings(config: Config) -> dict[str, Any]:
    return config.defense.model_dump(mode="json")


def _comes_first(config: Config, column: Column, row: Row) -> bool:
    poisons, defenses = config.matrix.first_poisons, config.matrix.first_defenses
    early = column.config is None or not poisons or column.entry.label in poisons
    return early and (not defenses or row.entry.label in defenses)


def _check_first(name: str, first: Sequence[str], labels: Sequence[str]) -> None:
    for label in first:
        if label not in labels:
            raise ConfigError(f"matrix.{name}: {label} is not listed; it has {', '.join(labels)}")
