"""The claim of a run on its output folder: started once, resumed by the same settings and input only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from eclipse_ray.config import difference, digest
from eclipse_ray.errors import InputError, ResumeError
from eclipse_ray.ledger import layout
from eclipse_ray.ledger.plan import Plan, Shard, plan_bytes, plan_digest, read_plan
from eclipse_ray.storage.store import Store

_EXAMPLES = 5


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides the pixels: settings, weights, input (see `plan_digest`), engine version."""

    config: dict[str, Any]
    weights: str
    input: str
    engine_version: int

    @property
    def value(self) -> str:
        """16 hex digits over all of it."""
        return digest(self._tree())

    def to_json(self) -> str:
        """Return JSON that `parse_fingerprint` reads back."""
        return json.dumps({**self._tree(), "value": self.value}, indent=2, sort_keys=True) + "\n"

    def differences(self, other: Fingerprint) -> list[str]:
        """Return one line "a.b: old -> new" for everything in which `other` differs from this one."""
        old, new = self._tree(), other._tree()
        return [*difference(old.pop("config"), new.pop("config")), *difference(old, new)]

    def _tree(self) -> dict[str, Any]:
        tree = {
            "config": self.config,
            "weights": self.weights,
            "input": self.input,
            "engine_version": self.engine_version,
        }
        # As it will be read back: a tuple, say, is a list in JSON and must not count as a difference.
        loaded: dict[str, Any] = json.loads(json.dumps(tree))
        return loaded


@dataclass(frozen=True)
class Run:
    """A run that owns its output folder; `fingerprint` is the one that the first caller wrote."""

    store: Store
    plan: Plan
    fingerprint: Fingerprint
    resumed: bool


def open_run(store: Store, plan: Plan, fingerprint: Fingerprint, config_yaml: str) -> Run:
    """Claim the output folder for a plan, or resume the run that did; raises what `claim` raises.

    Raises ResumeError too if an extension of the stored plan differs from this one's.
    """
    if fingerprint.input != plan_digest(plan.base):
        raise ValueError("fingerprint.input must be plan_digest(plan.base)")
    claimed, resumed = claim(store, fingerprint, config_yaml, plan.shards)
    if not store.exists(layout.PLAN):
        store.create(layout.PLAN, plan_bytes(plan.base, plan.shard_images, plan.classes))
    for number, piece in enumerate(plan.later, 1):
        key = layout.extension_key(number)
        if piece and not store.exists(key):
            # Before the plan grows: whoever reads the folder meanwhile must not take it for finished.
            store.delete(layout.MANIFEST)
            store.create(key, plan_bytes(piece, plan.shard_images, plan.classes))
    if plan.later and read_plan(store).later != plan.later:
        raise ResumeError(
            f"{store.url}: the source no longer holds what was planned; undo the changes below to resume it, or "
            "choose another output:\n" + "\n".join(f"  {line}" for line in _input_changes(store, plan.shards))
        )
    return Run(store, plan, claimed, resumed)


def claim(
    store: Store, fingerprint: Fingerprint, config_yaml: str, shards: Sequence[Shard] = ()
) -> tuple[Fingerprint, bool]:
    """Make the folder this run's, or find it so; return the fingerprint there and whether it was there before.

    Raises ResumeError if the folder belongs to a run with another fingerprint or to somebody else (naming the
    source objects in which `shards` differ), InputError if it is a file or its fingerprint is damaged, and
    StorageError if the store cannot create an object only if it is absent.
    """
    if store.is_file():
        raise InputError(f"{store.url}: this is a file; choose a folder as output")
    found = layout.read_optional(store, layout.FINGERPRINT)
    if found is None:
        _refuse_foreign(store)
        store.probe()
        if not store.create(layout.FINGERPRINT, fingerprint.to_json().encode()):
            found = store.read(layout.FINGERPRINT)
    claimed = fingerprint if found is None else parse_fingerprint(store, found)
    _refuse_difference(store, claimed, fingerprint, shards)
    if not store.exists(layout.CONFIG):
        store.create(layout.CONFIG, config_yaml.encode())
    return claimed, found is not None


def read_fingerprint(store: Store) -> Fingerprint:
    """Return the fingerprint of the run in `store`. Raises InputError if it is missing or damaged."""
    data = layout.read_optional(store, layout.FINGERPRINT)
    if data is None:
        raise InputError(f"{store.path(layout.FINGERPRINT)}: missing; the folder does not say what made it")
    return parse_fingerprint(store, data)


def recorded_settings(store: Store) -> dict[str, Any]:
    """Return the settings of the finished run that made the folder, empty if none did or it is not finished."""
    if store.is_file() or not store.exists(layout.MANIFEST):
        return {}
    tree = yaml.safe_load(store.read(layout.CONFIG))
    return tree if isinstance(tree, dict) else {}


def parse_fingerprint(store: Store, data: bytes) -> Fingerprint:
    """Return the fingerprint in `data`. Raises InputError if it is damaged."""
    try:
        tree = json.loads(data)
        value = tree.pop("value")
        fingerprint = Fingerprint(**tree)
        intact = bool(fingerprint.value == value) and isinstance(fingerprint.config, dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise InputError(
            f"{store.path(layout.FINGERPRINT)}: damaged; restore it from a copy or choose another output"
        )
    return fingerprint


def _refuse_foreign(store: Store) -> None:
    found = [*store.list(), *(e for e in store.list(layout.PRIVATE) if not e.key.startswith(layout.PROBES))]
    # A run that claimed the folder while it was being listed is not foreign: the comparison comes next.
    if found and layout.read_optional(store, layout.FINGERPRINT) is None:
        raise ResumeError(
            f"{store.url}: holds data that this command did not write ({found[0].key} and "
            f"{len(found) - 1} more objects); choose an empty folder as output"
        )


def _refuse_difference(store: Store, old: Fingerprint, new: Fingerprint, shards: Sequence[Shard]) -> None:
    lines = old.differences(new)
    if not lines:
        return
    if old.input != new.input:
        lines += _input_changes(store, shards)
    raise ResumeError(
        f"{store.url}: belongs to a run with other settings, weights or input; undo the changes below to "
        "resume it, or choose another output:\n" + "\n".join(f"  {line}" for line in lines)
    )


def _input_changes(store: Store, shards: Sequence[Shard]) -> list[str]:
    try:
        old, new = _objects(read_plan(store).shards), _objects(shards)
    except InputError:
        return []
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [f"input {key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in changed[:_EXAMPLES]]
    more = len(changed) - len(lines)
    return [*lines, f"and {more} more source objects"] if more > 0 else lines


def _objects(shards: Sequence[Shard]) -> dict[str, str]:
    rows: dict[str, int] = {}
    text: dict[str, str] = {}
    for shard in shards:
        for span in shard.spans:
            rows[span.key] = rows.get(span.key, 0) + span.stop - span.start
            text[span.key] = f"{rows[span.key]} rows in {span.size} bytes, version {span.version}"
    return text
