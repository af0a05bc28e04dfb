"""The command line: one command for each function of the API, same names, same defaults."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from eclipse_ray.cli import audit, datasets, method, proof, reports, runs, submit, sweep
from eclipse_ray.cli.common import app, reserve_standard_output
from eclipse_ray.errors import EXIT_OK, EXIT_RUN_AGAIN, EclipseError, InterruptedRunError
from eclipse_ray.log import say

# Importing a module registers its commands; --help lists them in this order.
__all__ = ["app", "audit", "datasets", "main", "method", "proof", "reports", "runs", "submit", "sweep"]


STOP_SECONDS = 1.0
"""Ray kills a job 3 s after it asked it to stop; by then it must have said that it can go on."""


def _stop(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGTERM:
        last = threading.Timer(STOP_SECONDS, os._exit, [EXIT_RUN_AGAIN])
        last.daemon = True
        last.start()
    raise InterruptedRunError("stopped; run the same command again to resume")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (of this process, or `arguments`) and exit with a documented code: 0, 1, 2, 3 or 75."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--json" in words:
        reserve_standard_output()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(words, prog_name="eclipse-ray")
    except EclipseError as error:
        say(f"error: {error}", level="error", exit_code=error.exit_code)
        if isinstance(error, InterruptedRunError):
            # Ray's own orderly end takes longer than a cluster waits, and its threads complain; workers and a
            # cluster of this process end with it.
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    sys.exit(EXIT_OK)
