"""The rule of repetition: 1, 75 and death by a signal are tried again, everything else is final."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import wait_until

AGAIN = Path(__file__).resolve().parents[2] / "cluster" / "again.py"


def again(tmp_path: Path, program: str, *options: str) -> tuple[int, int]:
    """Run `program`, which knows its start's number as n from 1; return the last exit code and the starts."""
    log = tmp_path / "starts"
    head = f"import os, sys; open({str(log)!r}, 'a').write('x'); n = os.path.getsize({str(log)!r}); "
    command = [sys.executable, str(AGAIN), "--wait", "0.01", *options, "--", sys.executable, "-c", head + program]
    done = subprocess.run(command, capture_output=True)
    return done.returncode, log.stat().st_size


@pytest.mark.parametrize(
    ("program", "options", "expected"),
    [
        *((f"sys.exit({code})", "", (code, 1)) for code in (0, 2, 3)),
        *((f"sys.exit({code} if n < 3 else 0)", "", (0, 3)) for code in (1, 75)),
        ("sys.exit(75 if n < 2 else 3)", "", (3, 2)),
        ("n < 2 and os.kill(os.getpid(), 9)", "", (0, 2)),
        ("sys.exit(75)", "--tries 3", (75, 3)),
        # Progress counts the tries anew.
        ("sys.exit(75 if n < 6 else 0)", "--tries 3 --progress 0", (0, 6)),
    ],
)
def test_what_can_be_resumed_is_repeated_until_it_is_done_or_tries_run_out(tmp_path, program, options, expected):
    assert again(tmp_path, program, *options.split()) == expected


def test_sigterm_is_passed_on_and_ends_it(tmp_path):
    log = tmp_path / "log"
    program = (
        "import signal, sys, time\n"
        f"log = open({str(log)!r}, 'a', buffering=1)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('term', file=log), sys.exit(75)))\n"
        "print('start', file=log)\n"
        "time.sleep(3600)\n"
    )
    process = subprocess.Popen([sys.executable, str(AGAIN), "--wait", "0.01", "--", sys.executable, "-c", program])
    wait_until(lambda: log.exists() and log.read_text(), "a start", 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert log.read_text() == "start\nterm\n"
