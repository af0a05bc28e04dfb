"""Run a command again as long as its exit code says that the next start resumes it.

    python again.py [--tries 10] [--wait 30] [--progress 600] -- COMMAND ...

After exit code 1 (something went wrong, such as the network), 75 (stopped) or death by a signal that was not sent
to this script, the command is started again. 0, 2 (bad input or settings) and 3 (too many images failed) are
final, because another start would end the same way. Waits double from --wait seconds to ten minutes. A start that
lasted at least --progress seconds counts as progress: the tries are counted again from zero, so that a run of days
survives any number of lost nodes. It needs only Python.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from types import FrameType

AGAIN = (1, 75)
LONGEST_WAIT = 600.0


class Stopped(Exception):
    """This script was asked to end."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def once(command: list[str]) -> tuple[int, bool]:
    """Run the command; return its exit code, and whether it ended because this script was asked to."""
    process = subprocess.Popen(command)
    try:
        return process.wait(), False
    except Stopped:
        process.terminate()
        return process.wait(), True


def main() -> int:
    """Run until done, until it is no use, or until the tries are used up; return the last exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--wait", type=float, default=30.0, help="seconds before the second try")
    parser.add_argument("--progress", type=float, default=600.0, help="seconds that count as progress")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    failed = 0
    while True:
        started = time.monotonic()
        code, stopped = once(options.command)
        # A negative code is a signal: the kernel was short of memory, say.
        if stopped or not (code in AGAIN or code < 0):
            break
        failed = 1 if time.monotonic() - started >= options.progress else failed + 1
        if failed >= options.tries:
            break
        wait = min(options.wait * 2 ** (failed - 1), LONGEST_WAIT)
        said = f"exit code {code}; again in {wait:.0f} s ({failed} of {options.tries})"
        print(said, file=sys.stderr, flush=True)
        try:
            time.sleep(wait)
        except Stopped:
            break
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
