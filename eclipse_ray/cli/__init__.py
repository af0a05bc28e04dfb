"""The command line: one command for each function of the API, same names, same defaults."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from eclipse_ray.cli import datasets, method, proof, reports, runs
from eclipse_ray.cli.common import app, reserve_standard_output
from eclipse_ray.errors import EXIT_OK, EclipseError, InterruptedRunError

# Importing a module registers its commands; --help lists them in this order.
__all__ = ["app", "datasets", "main", "method", "proof", "reports", "runs"]


def _stop(number: int, frame: FrameType | None) -> None:
    raise InterruptedRunError("stopped; run the same command again to resume")


def main() -> None:
    """Run the command line and exit with a documented code: 0, 1, 2, 3 or 75."""
    if "--json" in sys.argv:
        reserve_standard_output()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except EclipseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(EXIT_OK)
