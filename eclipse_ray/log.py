"""Messages on standard error: sentences for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any


def _write(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_STATE: dict[str, Any] = {"format": "text", "fields": {}, "write": _write}


def write_through(write: Callable[[str], None]) -> None:
    """Write lines by `write` from now on: bars on a terminal have to be moved out of the way."""
    _STATE["write"] = write


def set_format(name: str) -> None:
    """Write messages from now on as `text` or as `json`."""
    _STATE["format"] = name


def is_json() -> bool:
    """Return whether messages are JSON lines."""
    return bool(_STATE["format"] == "json")


def set_run(verb: str, run: str) -> None:
    """Name the verb and the run, its fingerprint, in every JSON line from now on."""
    _STATE["fields"] = {"verb": verb, "run": run}


def say(text: str, level: str = "info", **fields: Any) -> None:
    """Write one line on standard error; `fields` (JSON values) are shown in the JSON form only."""
    if is_json():
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level}
        text = json.dumps({**entry, **_STATE["fields"], **fields, "message": text})
    _STATE["write"](text)


def counted(count: int, noun: str) -> str:
    """Return a number of things in words: 1 image, 1,234 images, 2 classes."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


@lru_cache(maxsize=256)
def say_once(text: str) -> None:
    """Write one line, once per process."""
    say(text)


def event(name: str, **fields: Any) -> None:
    """Write a JSON line about something that people need no sentence for; nothing in the text form."""
    if is_json():
        say(name, event=name, **fields)


class _Library(logging.Handler):
    """Passes on what a library logs: all of it as JSON lines, errors alone to people."""

    def emit(self, record: logging.LogRecord) -> None:
        # Ray hides what it says once more elsewhere.
        if (is_json() or record.levelno >= logging.ERROR) and not getattr(record, "hide", False):
            say(record.getMessage(), level=record.levelname.lower(), logger=record.name)


def listen(*names: str) -> None:
    """Let the loggers of libraries write through this module, from INFO on, instead of to the terminal.

    Their log files stay as they are.
    """
    for name in names:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            # Ray writes to files through a handler of another class.
            if isinstance(handler, _Library) or type(handler).__name__ == "PlainRayHandler":
                logger.removeHandler(handler)
        logger.addHandler(_Library(logging.INFO))
        logger.propagate = False
