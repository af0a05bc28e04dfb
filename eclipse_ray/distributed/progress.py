"""Progress of long work for people: one rewritten line on a terminal, one line an interval elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import ray

from eclipse_ray import log
from eclipse_ray.log import say

__all__ = ["Board", "BoardWatcher", "ProgressLine", "say", "start_board"]


class ProgressLine:
    """Counts done work and says, on standard error, how far, how fast and how long still."""

    def __init__(self, what: str, unit: str, total: int, every: float, done: int = 0) -> None:
        self.what, self.unit, self.total, self.every = what, unit, total, every
        self.failed = 0
        self.begin(done)

    def begin(self, done: int) -> None:
        """Start the clock now, with `done` units from before."""
        self.done = self.started_at = done
        self.start = self.last = time.monotonic()

    @property
    def rate(self) -> float:
        """Units a second since this process began."""
        return (self.done - self.started_at) / max(time.monotonic() - self.start, 1e-9)

    def advance(self, count: int, failed: int = 0, note: str = "") -> None:
        """Count finished units and print when it is time."""
        self.done += count
        self.failed += failed
        now = time.monotonic()
        if now - self.last >= (0.2 if _rewrites() else self.every) or self.done >= self.total:
            self.last = now
            self._print(note)

    def _print(self, note: str) -> None:
        left = (self.total - self.done) / self.rate if self.rate > 0 else float("inf")
        text = f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {self.rate:,.1f}/s, {_duration(left)} left"
        text += f", {self.failed:,} failed" if self.failed else ""
        text += f", {note}" if note else ""
        if log.is_json():
            counts: dict[str, Any] = {"done": self.done, "total": self.total, "failed": self.failed}
            say(text, event="progress", unit=self.unit, per_second=round(self.rate, 3), **counts)
            return
        terminal = _rewrites()
        end = "\n" if not terminal or self.done >= self.total else ""
        print(f"\r\x1b[K{text}" if terminal else text, end=end, file=sys.stderr, flush=True)


def _rewrites() -> bool:
    return sys.stderr.isatty() and not log.is_json()


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


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
