"""The process of `eclipse-ray VERB ...` and `python -m eclipse_ray VERB ...`: how it is stopped, and how it ends.

Signals count from the first line of `main`: what takes time to import is imported after it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STOP_SECONDS = 1.0
"""Ray kills a job 3 s after it asked it to stop; by then it must have ended, also if nobody reads what it says."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (of this process, or `arguments`), and end the process with a documented code."""
    signals, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Nothing is raised in the main thread: what it waits in would lose that, or show a stack trace.
        signal.signal(number, lambda *_: None)

    from functools import partial
    from threading import Thread

    from eclipse_ray.errors import EXIT_RUN_AGAIN, end_at_once

    # What a signal does: the last one counts.
    stops: list[Callable[[], object]] = [_stop]
    obeying = Thread(target=_obey, args=(signals, stops), daemon=True)
    obeying.start()

    from eclipse_ray import cli

    stops.append(cli.stop)
    try:
        cli.main(arguments)
    except SystemExit as end:
        if end.code == signal.SIGTERM:
            # Ray takes this signal over while it starts, and then raises this.
            obeying.join()
        code = end.code if isinstance(end.code, int) else 0
    # The result stands: a signal only hastens the end.
    stops.append(partial(end_at_once, code))
    if code == EXIT_RUN_AGAIN:
        # A run that was stopped has no time for Ray's orderly end.
        end_at_once(code)
    _finish()
    os._exit(code)


def _obey(signals: int, stops: Sequence[Callable[[], object]]) -> None:
    """Wait for SIGINT or SIGTERM and end the process, whatever its other threads are doing."""
    from threading import Timer

    from eclipse_ray.errors import EXIT_RUN_AGAIN, end_at_once

    os.read(signals, 1)
    limit = Timer(STOP_SECONDS, end_at_once, (EXIT_RUN_AGAIN,))
    limit.daemon = True
    limit.start()
    stops[-1]()


def _stop() -> None:
    """Say that the command was stopped, before there are bars and formats, and end the process."""
    from eclipse_ray.errors import EXIT_RUN_AGAIN, STOPPED

    os.write(2, f"error: {STOPPED}\n".encode())
    os._exit(EXIT_RUN_AGAIN)


def _finish() -> None:
    """Do what is due at the end, such as the shutdown of Ray.

    Python would do more: threads of Arrow and Ray that run while it takes the process apart abort it.
    """
    import atexit
    from contextlib import suppress

    atexit._run_exitfuncs()
    # Python has None for one that was closed before it started.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError):
            stream.flush()


if __name__ == "__main__":
    main()
