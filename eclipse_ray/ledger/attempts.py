"""Word left before work that may kill its worker, so that the image which does it is found and recorded.

Ray starts a dead worker's shard again for ever. So each start is counted, and after a few of them every image is
tried alone, its row written down first: the row that stands there when a worker has died is the one it died of.
A row is blamed after the second such death, since machines also disappear on their own. Trying images one by one
costs two deaths for each killer; halving the shard would cost one for each halving.

Starts are counted for each driver anew: one that is killed ten times takes the same innocent shards with it each
time. Only after a driver that a hanging worker stopped does the next one count on, or it would hang as well.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import IntEnum

from eclipse_ray.ledger import layout
from eclipse_ray.storage.store import Store

# Starts of a shard before its images are tried one by one, and again before the next remedy.
PATIENCE = 3
DEATHS_TO_BLAME = 2
_SESSION = re.compile(rb"[0-9a-f]{8}")


class Care(IntEnum):
    """How a shard that has killed its workers is to be treated."""

    USUAL = 0
    ONE_BY_ONE = 1
    GIVE_UP = 2


@dataclass
class Trial:
    """How far the images of a shard were tried alone: the row in hand, rows tried, deaths by row, last start."""

    row: int | None = None
    tried: int = 0
    deaths: dict[str, int] = field(default_factory=dict)
    finished_at: int | None = None

    @property
    def blamed(self) -> frozenset[int]:
        """Rows that killed their workers."""
        return frozenset(int(row) for row, deaths in self.deaths.items() if deaths >= DEATHS_TO_BLAME)


def session(store: Store) -> str:
    """Return the name under which a driver counts starts: that of one which `hand_over` left, else a new one."""
    left = layout.read_optional(store, layout.HUNG)
    if left is not None:
        store.delete(layout.HUNG)
        if _SESSION.fullmatch(left):
            return left.decode()
    return secrets.token_hex(4)


def hand_over(store: Store, name: str) -> None:
    """Leave the name of a session that a hanging worker ended to the next driver."""
    store.write(layout.HUNG, name.encode())


def begin(store: Store, shard: str, generation: int, stage: str) -> int:
    """Write down that `stage` of a shard starts; return how often it has, this start included."""
    attempt = 1
    while not store.create(layout.attempt_key(shard, generation, stage, str(attempt)), b""):
        attempt += 1
    return attempt


def try_alone(
    store: Store, shard: str, generation: int, stage: str, attempt: int, rows: int, work: Callable[[int], object]
) -> tuple[frozenset[int], Care]:
    """Return the rows that kill their worker, and how to treat the others; nothing is done up to PATIENCE starts.

    `work` is called with each row number from 0 that has not been tried yet, and may kill this process.
    """
    if attempt <= PATIENCE:
        return frozenset(), Care.USUAL
    key = layout.attempt_key(shard, generation, stage, "trial")
    trial = _read(store, key)
    if trial.finished_at is None:
        if trial.row is not None:
            trial.deaths[str(trial.row)] = trial.deaths.get(str(trial.row), 0) + 1
        for row in range(trial.tried, rows):
            if row not in trial.blamed:
                trial.row = row
                _write(store, key, trial)
                work(row)
            trial.tried, trial.row = row + 1, None
        trial.finished_at = attempt
        _write(store, key, trial)
    return trial.blamed, Care(min(Care.GIVE_UP, (attempt - trial.finished_at) // PATIENCE))


def hopeless(store: Store, shard: str, generation: int, stage: str, attempt: int) -> bool:
    """Return whether workers die before images can be tried alone, so that the shard has to be given up."""
    return (
        attempt > 2 * PATIENCE and _read(store, layout.attempt_key(shard, generation, stage, "trial")) == Trial()
    )


def _read(store: Store, key: str) -> Trial:
    data = layout.read_optional(store, key)
    try:
        return Trial(**json.loads(data)) if data else Trial()
    except (ValueError, TypeError):
        # Torn by a crash, or by two drivers at once: the images are tried again from the first.
        return Trial()


def _write(store: Store, key: str, trial: Trial) -> None:
    store.write(key, json.dumps(asdict(trial)).encode())
