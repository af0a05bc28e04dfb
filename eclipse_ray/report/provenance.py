"""How to get the same again: command, settings, fingerprint, versions."""

from __future__ import annotations

from typing import Any

from eclipse_ray.errors import InputError
from eclipse_ray.ledger import layout, read_fingerprint
from eclipse_ray.report.blocks import Block, Code, Section, Table, Text
from eclipse_ray.report.folders import COMMAND, Folder, now, read_json, software, without_credentials

VERBS = {"purify": "purify", "train": "train", "matrix": "evaluate", "evaluate": "evaluate", "sweep": "sweep"}
"""Commands that do the same again when they are given the settings in the folder."""


def provenance(folder: Folder, *parts: Folder) -> Section:
    """Return the section that says what made the folder, and each of its `parts`."""
    blocks: list[Block] = []
    for each in (folder, *parts):
        blocks += _commands(each)
    rows = [row for each in (folder, *parts) for row in _fingerprint(each)]
    if rows:
        blocks.append(Table("Fingerprints", ["", "value"], rows, numeric=False))
    for each in (folder, *parts):
        blocks += _settings(each)
    versions = software()
    rows = [[name, value] for name, value in versions["versions"].items()]
    caption = f"Versions that made this report, {now()}, on {versions['platform']}"
    blocks.append(Table(caption, ["", "version"], rows, numeric=False))
    return Section("provenance", "To get the same again", blocks)


def _commands(folder: Folder) -> list[Block]:
    settings = f"{without_credentials(folder.store.url)}/{layout.CONFIG}"
    if not folder.store.exists(COMMAND):
        verb = VERBS.get(folder.kind)
        if verb is None or not folder.store.exists(layout.CONFIG):
            return []
        text = f"eclipse-ray {verb} --config {settings}"
        return [Code(f"{folder.name}: the command was not recorded; this one does the same", text, open=True)]
    note = read_json(folder.store, COMMAND)
    made = note.get("versions")
    found: list[Block] = [
        Code(f"{folder.name}: command, finished {note.get('finished')}", str(note.get("command")), open=True)
    ]
    if isinstance(made, dict):
        words = ", ".join(f"{name} {value}" for name, value in made.items())
        found.append(Text(f"Versions of that run: {words}; {note.get('platform')}."))
    return found


def _fingerprint(folder: Folder) -> list[list[str]]:
    if not folder.store.exists(layout.FINGERPRINT):
        return []
    try:
        found: Any = read_fingerprint(folder.store)
    except InputError as error:
        return [[folder.name, str(error)]]
    parts = [["fingerprint", found.value], ["input", found.input], ["weights", found.weights or "-"]]
    return [[f"{folder.name}: {name}", value] for name, value in parts]


def _settings(folder: Folder) -> list[Block]:
    data = layout.read_optional(folder.store, layout.CONFIG)
    if data is None:
        return []
    text = without_credentials(data.decode("utf-8", "replace"))
    return [Code(f"{folder.name}: all settings ({layout.CONFIG})", text)]
