"""The errors a user can cause or mend; each message says what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
import json
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_TOO_MANY_FAILED = 3
EXIT_RUN_AGAIN = 75

STOPPED = "stopped; run the same command again to resume"


def end_at_once(code: int) -> NoReturn:
    """End this process with `code`, and before it all that it has started, such as a Ray cluster of its own.

    Left alone, Ray's agents would look for their cluster for a minute. Without /proc, as on macOS, they do.
    """
    for process in _descendants(os.getpid()):
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    os._exit(code)


def _descendants(process: int) -> list[int]:
    """Return the processes that `process` has started, and those that these have."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        # One that has just ended cannot be read. Its name, in brackets, may hold anything.
        with suppress(OSError):
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = children.get(process, [])
    for child in found:
        # The list grows while it is read.
        found += children.get(child, [])
    return found


class EclipseError(Exception):
    """A condition reported to people as one sentence, without a stack trace; exits with `exit_code`."""

    exit_code = EXIT_FAILURE


class ConfigError(EclipseError):
    """A setting is unknown, malformed or contradicts another one."""

    exit_code = EXIT_BAD_INPUT


class InputError(EclipseError):
    """A dataset, image or denoiser folder is missing, unreadable or not what the command needs."""

    exit_code = EXIT_BAD_INPUT


class ResumeError(EclipseError):
    """An output folder belongs to a run with another config, weights or input."""

    exit_code = EXIT_BAD_INPUT


class StorageError(EclipseError):
    """A store cannot do what the commit protocol needs, or refused an operation."""

    exit_code = EXIT_FAILURE


class InterruptedRunError(EclipseError):
    """A run stopped on the way. What was finished is kept, and the same command continues it."""

    exit_code = EXIT_RUN_AGAIN


def note_of_error(error: EclipseError) -> str:
    """Return an error as text that crosses processes; `error_of_note` makes the same error of it again."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == __name__)
    return json.dumps([kind.__name__, str(error)])


def error_of_note(note: str) -> EclipseError:
    """Return the error that a worker wrote down, of its own class and hence with its exit code."""
    name, text = json.loads(note)
    return {kind.__name__: kind for kind in EclipseError.__subclasses__()}.get(name, EclipseError)(text)


def unknown(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence on a name that is none of `known`, with the nearest if one is near."""
    close = difflib.get_close_matches(name, known := list(known), n=1)
    return f"is unknown; {f'did you mean {close[0]}? There' if close else 'there'} are: {', '.join(known)}"


def did_you_mean(path: str) -> str:
    """Return "; did you mean X?" for a local path whose first wrong part resembles a name there, else ""."""
    if "://" in path:
        return ""
    folder, rest = os.path.split(path.rstrip("/"))
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)
    first, _, below = rest.partition("/")
    try:
        close = difflib.get_close_matches(first, os.listdir(folder or "."), n=1, cutoff=0.6)
    except OSError:
        return ""
    # The same name once more means that what is below it is missing, or that it cannot be read.
    if not close or close[0] == first:
        return ""
    return f"; did you mean {os.path.join(folder, close[0], below).rstrip('/')}?"
