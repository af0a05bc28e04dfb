"""The command line: one command for each function of the API, same names, same defaults."""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import typer

from eclipse_ray.cli import audit, check, datasets, method, proof, reports, runs, submit, sweep
from eclipse_ray.cli.common import app, reserve_standard_output
from eclipse_ray.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RUN_AGAIN, EclipseError, InterruptedRunError
from eclipse_ray.log import say
from eclipse_ray.progress import close_all

# Importing a module registers its commands; PANELS says in which order --help lists them.
__all__ = ["app", "audit", "check", "datasets", "main", "method", "proof", "reports", "runs", "submit", "sweep"]

STOPPED = "stopped; run the same command again to resume"
STOP_SECONDS = 1.0
"""Ray kills a job 3 s after it asked it to stop; by then it must have ended."""
_SAYING, _SAID = threading.Lock(), threading.Event()

# In which group --help lists a command, and in which order; one that is not here comes last.
PANELS = {
    "doctor": "Start here",
    "demo": "Start here",
    "train": "Purify",
    "purify": "Purify",
    "status": "Purify",
    "verify": "Purify",
    "gc": "Purify",
    "audit": "Judge and tune",
    "evaluate": "Judge and tune",
    "sweep": "Judge and tune",
    "report": "Judge and tune",
    "convert": "Datasets and weights",
    "split": "Datasets and weights",
    "poison": "Datasets and weights",
    "import-checkpoint": "Datasets and weights",
    "submit": "On a cluster",
}

# Typer carries a click of its own in some versions; this is its UsageError wherever it lies.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _arrange() -> None:
    order = list(PANELS)
    for info in app.registered_commands:
        info.rich_help_panel = PANELS.get(_name(info), "More")
    app.registered_commands.sort(key=lambda info: [*order, _name(info)].index(_name(info)))


def _name(info: Any) -> str:
    return info.name or (info.callback.__name__ if info.callback else "")


_arrange()


def _stop(number: int, frame: FrameType | None) -> None:
    threading.Thread(target=_leave, daemon=True).start()
    raise InterruptedRunError(STOPPED)


def _leave() -> None:
    # It is said at once: where a whole process group is told to stop, by `timeout` or Slurm, the cluster of this
    # machine is, too, and Ray ends a driver that has lost it.
    _say_stopped()
    time.sleep(STOP_SECONDS)
    # Ray drops what a signal handler raises while the driver waits in it.
    os._exit(EXIT_RUN_AGAIN)


def _say_stopped() -> None:
    with _SAYING:
        if not _SAID.is_set():
            _SAID.set()
            say(f"error: {STOPPED}", level="error", exit_code=EXIT_RUN_AGAIN)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (of this process, or `arguments`) and exit with a documented code: 0, 1, 2, 3 or 75."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _SAID.clear()
    if "--json" in words:
        reserve_standard_output()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        # Bare `eclipse-ray` is a question, not a mistake.
        code = app(words or ["--help"], prog_name="eclipse-ray", standalone_mode=False)
    except EclipseError as error:
        _end(str(error), error.exit_code)
    except UsageError as error:
        _end(usage_sentence(error), EXIT_BAD_INPUT)
    except typer.Abort:
        _end(STOPPED, EXIT_RUN_AGAIN)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_OK)
    sys.exit(code or EXIT_OK)


def usage_sentence(error: Any) -> str:
    """Return one sentence for a command line that cannot be parsed, with the nearest right spelling."""
    context = error.ctx
    option = getattr(error, "option_name", None)
    if option and context is not None and "No such option" in error.message:
        known = [name for one in context.command.params for name in one.opts if name.startswith("--")]
        close = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
        text = f"no such option: {option}" + (f"; did you mean {close[0]}?" if close else "")
    else:
        text = error.format_message().replace("Value error, ", "").rstrip(".")
        text = text[:1].lower() + text[1:] + _nearest_choice(text)
    path = context.command_path if context is not None else "eclipse-ray"
    return text if not text else f"{text}{'' if text.endswith('?') else ';'} see {path} --help"


def _nearest_choice(text: str) -> str:
    found = re.search(r"'([^']*)' is not one of (.*)", text)
    close = found and difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _end(message: str, code: int) -> None:
    close_all()
    if message == STOPPED:
        _say_stopped()
    elif message:
        say(f"error: {message}", level="error", exit_code=code)
    if code == EXIT_RUN_AGAIN:
        # Ray's own orderly end takes longer than a cluster waits, and its threads complain; workers and a cluster
        # of this process end with it.
        os._exit(code)
    sys.exit(code)
