"""The end of the process: signals at any moment, and an orderly end that no thread can disturb."""

import signal
import sys
import textwrap
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from eclipse_ray.errors import EXIT_RUN_AGAIN, STOPPED, _descendants

SLOW_IMPORT = """
class Slow:
    def find_spec(self, name, *_):
        if name == "eclipse_ray.cli":
            print("ready", flush=True)
            time.sleep(3600)
sys.meta_path.insert(0, Slow())
"""
DEAF = """
def work(_):
    while True:
        try:
            print("ready", flush=True)
            time.sleep(3600)
        except BaseException as error:
            print("lost", error, flush=True)
cli.main = work
"""
DONE = """
atexit.register(lambda: (print("ready", flush=True), time.sleep(3600)))
cli.main = lambda _: sys.exit(3)
"""
IN_RAYS_HANDS = """
def work(_):
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    print("ready", flush=True)
    time.sleep(3600)
cli.main = work
"""


def start(work: str) -> Popen:
    """Start the process of the command line with its work replaced by `work`."""
    load = "" if work is SLOW_IMPORT else "from eclipse_ray import cli\n"
    code = f"import atexit, signal, sys, threading, time\n{load}{textwrap.dedent(work)}\n"
    # A test that fails leaves it behind, but not for ever.
    code += "signal.alarm(600)\n"
    code += "from eclipse_ray.__main__ import main\nmain([])\n"
    return Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)


def stopped(work: str, number: int) -> tuple[int, str, str]:
    """Send a signal to work that is ready for it; return exit code and what was printed after that."""
    process = start(work)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    process.send_signal(number)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", [SLOW_IMPORT, DEAF, IN_RAYS_HANDS], ids=["while it imports", "deaf", "of Ray"])
def test_a_signal_ends_the_process_with_75_and_one_sentence(work, number):
    assert stopped(work, number) == (75, "", f"error: {STOPPED}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_result_changes_no_exit_code(number):
    assert stopped(DONE, number) == (3, "", "")


def test_what_is_due_at_the_end_is_done_and_threads_are_not_waited_for():
    process = start("""
        atexit.register(lambda: print("due"))
        threading.Thread(target=time.sleep, args=(3600,)).start()
        cli.main = lambda _: sys.exit(2)
    """)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (2, "due\n", "")


def test_a_terminal_that_takes_no_more_words_does_not_hold_up_the_end():
    process = start("""
        def work(_):
            print("ready", flush=True)
            sys.stderr.write("x" * 10_000_000)
        cli.main = work
    """)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75


def test_a_reader_that_has_gone_does_not_make_a_finished_run_a_failed_one():
    process = start("""
        from eclipse_ray import results
        def work(_):
            print("ready", file=sys.stderr, flush=True)
            sys.stdin.readline()
            cli.show(results.GcResult(1, 0, "x" * 100_000), False, {})
            sys.exit(0)
        cli.main = work
    """)
    assert process.stderr.readline() == "ready\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait() == 0
    assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "InterruptedRunError")]
)
def test_a_verb_that_decides_itself_what_a_signal_means_is_told_of_it(number, raised):
    work = """
        def work(_):
            try:
                with cli._interruptible():
                    try:
                        print("ready", flush=True)
                        time.sleep(3600)
                    except BaseException as error:
                        print(type(error).__name__, flush=True)
            finally:
                sys.exit(0)
        cli.main = work
    """
    assert stopped(work, number) == (0, f"{raised}\n", "")


def test_what_a_stopped_run_has_started_ends_with_it():
    """Children and theirs, also those that do not mind signals; nobody else's."""
    work = """
    def work(_):
        import subprocess
        deaf = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        leaf = deaf + "print('leaf', flush=True); time.sleep(600)"
        code = deaf + f"subprocess.Popen([sys.executable, '-c', {leaf!r}]); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        print(child.pid, *_descendants(child.pid), flush=True)
        time.sleep(3600)
    from eclipse_ray.errors import _descendants
    cli.main = work
    """
    process, other = start(work), Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = [int(word) for word in process.stdout.readline().split()]
    assert len(started) == 2
    assert _descendants(process.pid) == started
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == EXIT_RUN_AGAIN
    deadline = time.monotonic() + 10
    while any(_running(number) for number in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [number for number in started if _running(number)] == []
    assert other.poll() is None
    other.kill()
    other.wait()


def _running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
