"""Progress that workers report: they post it on a board, which the driver reads and shows."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import ray


class Board:
    """A place where workers leave their latest progress and the driver looks at it."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def post(self, entry: dict[str, Any]) -> None:
        """Add an entry."""
        self.entries.append(entry)

    def since(self, index: int) -> list[dict[str, Any]]:
        """Return the entries from `index` on."""
        return self.entries[index:]


def start_board() -> Any:
    """Return the handle of a Board that runs as an actor and takes no CPU."""
    return ray.remote(num_cpus=0)(Board).remote()


class BoardWatcher:
    """Hands each new entry of a board to a function, on a thread, while a `with` block runs."""

    def __init__(self, board: Any, on_entry: Callable[[dict[str, Any]], None], every: float = 0.5) -> None:
        self.board, self.on_entry, self.every = board, on_entry, every
        self.stop = Event()
        self.seen = 0
        self.thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> BoardWatcher:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        # Who is stopped has no time for the last entries.
        self.thread.join(timeout=10 if exception[0] is None else 0)

    def _watch(self) -> None:
        finished = False
        while not finished:
            # One look after the end, so that the last entries are seen too.
            finished = self.stop.wait(self.every)
            for entry in ray.get(self.board.since.remote(self.seen)):
                self.seen += 1
                self.on_entry(entry)
