"""The table of everyday trials: what was done, the exit code, seconds until the sentence, the sentence."""

from collections.abc import Iterable
from typing import NamedTuple


class Trial(NamedTuple):
    """One thing that was done, and how it ended; `seconds` until the sentence was there."""

    done: str
    code: int | None
    seconds: float
    sentence: str


def table(trials: Iterable[Trial]) -> str:
    """Return the trials as lines of text under a headline."""
    rows = [("done", "exit", "seconds", "sentence")]
    rows += [(one.done, str(one.code), f"{one.seconds:.1f}", one.sentence) for one in trials]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(" | ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)
