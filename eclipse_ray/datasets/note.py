"""The note that a written dataset leaves about itself, for layouts that cannot hold everything."""

from __future__ import annotations

import json
from typing import Any

from eclipse_ray.storage.store import Store

NOTE = "_eclipse/dataset.json"
# The keys of its samples are ids with some characters escaped.
ESCAPED_KEYS = "escaped_keys"


def read_note(store: Store) -> dict[str, Any]:
    """Return what is noted in `store`; empty if there is no note, or a damaged one, as it is a courtesy only."""
    try:
        note = json.loads(store.read(NOTE))
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def noted_classes(store: Store) -> list[str] | None:
    """Return the class names noted in `store`, or None."""
    classes = read_note(store).get("classes")
    return [str(name) for name in classes] if isinstance(classes, list) and classes else None
