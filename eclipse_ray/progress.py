"""Progress of long work for people, on standard error: a bar on a terminal, elsewhere one line per interval."""

from __future__ import annotations

import atexit
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, Any

from eclipse_ray import log

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# The time left follows from the rate of at least these last seconds and reports, so that a growing cluster counts.
WINDOW_SECONDS, WINDOW_REPORTS = 120.0, 30


class ProgressLine:
    """Counts done work and says how far it is, how fast, and how long still by the rate measured lately.

    Before anything is done it says what is going on, the `phase`. A total of 0 is not known yet. Closed by itself
    when all is done; in a `with` block also by what ends the block.
    """

    def __init__(self, what: str, unit: str, total: int, every: float, done: int = 0, phase: str = "") -> None:
        self.what, self.unit, self.total, self.every = what, unit, total, every
        self.failed = 0
        self.note, self.phase = "", phase
        self.task: TaskID | None = None
        self.opened = time.monotonic()
        self.begin(done)
        _screen.open(self)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, done: int) -> None:
        """Start the clock now, with `done` units from before."""
        self.done = self.started_at = done
        self.start = self.last = time.monotonic()
        self.marks: deque[tuple[float, int]] = deque([(self.start, done)])

    @property
    def rate(self) -> float:
        """Units per second since this process began."""
        return (self.done - self.started_at) / max(time.monotonic() - self.start, 1e-9)

    def advance(self, count: int, failed: int = 0, note: str = "") -> None:
        """Count finished units and print when it is time."""
        self.done += count
        self.failed += failed
        self.note = note or self.note
        if count:
            self._mark(time.monotonic())
        if self.done >= self.total > 0:
            self.close()
        else:
            _screen.show(self)

    def reach(self, done: int) -> None:
        """Show work that is done but not yet counted; the line stays open, and nothing shown is taken back."""
        if done > self.done:
            self.done = done
            self._mark(time.monotonic())
            _screen.show(self)

    def close(self) -> None:
        """Show the last of it, and give the screen back."""
        _screen.close(self)

    def seconds_left(self, now: float) -> float | None:
        """Return the rest at the rate measured lately; None before anything is done."""
        recent = self._recent(now)
        return (self.total - self.done) / recent if recent else None

    def _recent(self, now: float) -> float:
        since, before = self.marks[0]
        return (self.done - before) / (now - since) if now > since else 0.0

    def numbers(self) -> str:
        """Return how far, how fast, how long still."""
        now = time.monotonic()
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        if self.done == self.started_at:
            gone = f"{duration(now - self.opened)} gone"
            if self.phase:
                return f"{self.phase}, {gone}"
            parts.append(f"{gone}, none done yet")
        else:
            parts.append(pace(self.rate if self.done >= self.total else self._recent(now)))
            left = self.seconds_left(now)
            if self.done >= self.total:
                parts.append(f"took {duration(now - self.start)}")
            elif left is not None:
                # While the start counts, and nobody knows how much of it was work, the rest takes at most this.
                most = "up to " if self.marks[0][1] == self.started_at else ""
                parts.append(f"{most}{duration(left)} left")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)

    def _mark(self, now: float) -> None:
        marks = self.marks
        marks.append((now, self.done))
        while len(marks) > WINDOW_REPORTS and now - marks[1][0] > WINDOW_SECONDS:
            marks.popleft()
        # What came before the first report is mostly start-up, and counts until as much time has passed again.
        if len(marks) > 3 and marks[0][1] == self.started_at and now - marks[1][0] > marks[1][0] - marks[0][0]:
            marks.popleft()


def close_all() -> None:
    """Take every bar off the terminal, before an error is printed."""
    _screen.close_all()


@contextmanager
def last_words() -> Iterator[None]:
    """Take every bar off the terminal, and keep what others say from now on away from it."""
    with _screen.lock:
        _screen.close_all()
        yield


def duration(seconds: float) -> str:
    """Return seconds in words: 12s, 3m05s, 2h10m, 4d06h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def volume(count: float) -> str:
    """Return a number of bytes in words: 0.4 KiB, 3.2 MiB, 1,234.5 GiB."""
    unit, name = next(
        ((2**power, name) for power, name in ((30, "GiB"), (20, "MiB")) if count >= 2**power), (2**10, "KiB")
    )
    return f"{count / unit:,.1f} {name}"


def pace(per_second: float, unit: str = "") -> str:
    """Return a rate in words, per minute if it is below one per second, and per hour if that is below one, too."""
    span, rate = next(
        ((span, per_second * seconds) for span, seconds in (("s", 1), ("min", 60)) if per_second * seconds >= 1),
        ("h", per_second * 3600),
    )
    return f"{rate:,.1f}{unit and ' '}{unit}/{span}"


class _Screen:
    """All open lines: bars on a terminal, else printed; a thread shows them also while nothing moves."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.lines: list[ProgressLine] = []
        self.bars: Progress | None = None
        self.idle: Event | None = None

    def open(self, line: ProgressLine) -> None:
        with self.lock:
            self.lines.append(line)
            if sys.stderr.isatty() and not log.is_json():
                if self.bars is None:
                    self.bars = _bars()
                    self.bars.start()
                line.task = self.bars.add_task(line.what, total=None, numbers=line.numbers(), note="")
            if self.idle is None:
                self.idle = Event()
                Thread(target=self._tick, args=(self.idle,), daemon=True).start()

    def show(self, line: ProgressLine, last: bool = False) -> None:
        with self.lock:
            if line not in self.lines:
                return
            if self.bars is not None and line.task is not None:
                self.bars.update(
                    line.task,
                    total=line.total or None,
                    completed=line.done,
                    numbers=line.numbers(),
                    note=line.note,
                )
            elif last or time.monotonic() - line.last >= line.every:
                line.last = time.monotonic()
                _report(line)

    def close(self, line: ProgressLine) -> None:
        with self.lock:
            if line.done > line.started_at:
                self.show(line, last=True)
            elif self.bars is not None and line.task is not None and line in self.lines:
                # It never got further than a phase, which is over.
                self.bars.remove_task(line.task)
            if line in self.lines:
                self.lines.remove(line)
            if not self.lines:
                self._stop()

    def close_all(self) -> None:
        with self.lock:
            for line in list(self.lines):
                self.close(line)

    def say(self, text: str) -> None:
        with self.lock:
            if self.bars is not None:
                self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                _print(text)

    def _stop(self) -> None:
        if self.idle is not None:
            self.idle.set()
            self.idle = None
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def _tick(self, idle: Event) -> None:
        while not idle.wait(0.5):
            with self.lock:
                for line in self.lines:
                    self.show(line)


def _report(line: ProgressLine) -> None:
    note = f", {line.note}" if line.note else ""
    text = f"{line.what}: {line.numbers()}{note}"
    if log.is_json():
        counts: dict[str, Any] = {"done": line.done, "total": line.total, "failed": line.failed}
        log.say(text, event="progress", unit=line.unit, per_second=float(f"{line.rate:.4g}"), **counts)
    else:
        _print(text)


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[note]}", markup=False, style="dim"),
        console=Console(stderr=True),
        refresh_per_second=5,
    )


def _print(text: str) -> None:
    # Standard error may be a pipe whose reader has gone, or a full disk; that is no reason to stop days of work.
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


_screen = _Screen()
log.write_through(_screen.say)
atexit.register(close_all)
