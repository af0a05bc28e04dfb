"""Notes that workers write before each attempt, so that an image that kills its worker is found and recorded.

Ray restarts the shard of a dead worker without limit. So every start of a shard is counted. After `PATIENCE`
starts the images are tried one by one, and before each image its row number is written down. If the worker dies,
that row is the suspect. A row is blamed after its second death, because machines also disappear for other reasons.
Trying one by one costs two deaths per harmful image; bisecting the shard would cost one death per bisection.

Each driver counts under a session name of its own, because a driver that is killed kills all shards in flight,
which are innocent. Only if a driver stopped because a worker hung does the next driver continue its count, because
it would otherwise hang at the same image again.
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

# Number of starts of a shard after which its images are tried one by one, and again after which it is given up.
PATIENCE = 3
# Number of deaths at one row after which the row is blamed.
DEATHS_TO_BLAME = 2
_SESSION = re.compile(rb"[0-9a-f]{8}")


class Care(IntEnum):
    """How to process a shard whose workers have died."""

    USUAL = 0
    ONE_BY_ONE = 1
    GIVE_UP = 2


@dataclass
class Trial:
    """Progress of trying the images of a shard one by one.

    `row` is the row being tried, `tried` the number of rows already tried, `deaths` the number of deaths by row,
    and `finished_at` the attempt in which the last row was tried.
    """

    row: int | None = None
    tried: int = 0
    deaths: dict[str, int] = field(default_factory=dict)
    finished_at: int | None = None

    @property
    def blamed(self) -> frozenset[int]:
        """The rows that are blamed for the death of their workers."""
        return frozenset(int(row) for row, deaths in self.deaths.items() if deaths >= DEATHS_TO_BLAME)


def session(store: Store) -> str:
    """Return the session name under which a driver counts starts: the one that `hand_over` left, or a new one."""
    left = layout.read_optional(store, layout.HUNG)
    if left is not None:
        store.delete(layout.HUNG)
        if _SESSION.fullmatch(left):
            return left.decode()
    return secrets.token_hex(4)


def hand_over(store: Store, name: str) -> None:
    """Leave the session name to the next driver, because this one stops at a hanging worker."""
    store.write(layout.HUNG, name.encode())


def begin(store: Store, shard: str, generation: int, stage: str) -> int:
    """Record that `stage` of a shard starts and return the number of its starts, including this one."""
    attempt = 1
    while not store.create(layout.attempt_key(shard, generation, stage, str(attempt)), b""):
        attempt += 1
    return attempt


def try_alone(
    store: Store, shard: str, generation: int, stage: str, attempt: int, rows: int, work: Callable[[int], object]
) -> tuple[frozenset[int], Care]:
    """Return the rows that kill their worker, and how to process the others.

    Up to PATIENCE starts nothing is tried. Later, `work` is called with the number of each row that has not been
    tried yet, counted from 0; it may kill this process.
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
    """Return whether workers die before any image can be tried alone, so that the shard must be given up."""
    return (
        attempt > 2 * PATIENCE and _read(store, layout.attempt_key(shard, generation, stage, "trial")) == Trial()
    )


def _read(store: Store, key: str) -> Trial:
    data = layout.read_optional(store, key)
    try:
        return Trial(**json.loads(data)) if data else Trial()
    except (ValueError, TypeError):
        # A crash or two concurrent drivers damaged the note, so the images are tried again from the first.
        return Trial()


def _write(store: Store, key: str, trial: Trial) -> None:
    store.write(key, json.dumps(asdict(trial)).encode())
