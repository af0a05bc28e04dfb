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


def start(work: str, stdout: int = PIPE) -> Popen:
    """Start the process of the command line with its work replaced by `work`."""
    load = "" if work is SLOW_IMPORT else "from eclipse_ray import cli\n"
    code = f"import atexit, signal, sys, threading, time\n{load}{textwrap.dedent(work)}\n"
    # A test that fails leaves it behind, but not for ever.
    code += "signal.alarm(600)\n"
    code += "from eclipse_ray.__main__ import main\nmain([])\n"
    return Popen([sys.executable, "-c", code], stdin=PIPE, stdout=stdout, stderr=PIPE, text=True)


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


FINISHED = """
from contextlib import nullcontext
from eclipse_ray import parameters, results
verb = parameters.Verb(lambda: results.VerifyResult(False, 1, 1, 0, ["o\\udcff"]), "", ())
cli.folder_of = lambda *_: "folder"
cli.conclude = lambda *_: cli.say("report")
def work(_):
    try:
        cli._run("verify", verb, {"json": JSON}, [])
    except cli.typer.Exit as end:
        sys.exit(end.exit_code)
cli.main = work
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_result_that_cannot_be_printed_is_a_note_and_what_follows_it_follows(as_json):
    with open("/dev/full", "w") as full:
        process = start(FINISHED.replace("JSON", str(as_json)), full.fileno())
        _, err = process.communicate()
    note = "note: the result could not be printed: [Errno 28] No space left on device; the run itself is done"
    assert (process.returncode, err.splitlines()) == (1, [note, "report"])


def test_a_result_with_a_name_that_is_not_utf_8_is_printed():
    process = start(FINISHED.replace("JSON", "False"))
    out, err = process.communicate()
    assert (process.returncode, err) == (1, "report\n")
    assert out.splitlines()[0] == "o\\udcff"


@pytest.mark.parametrize("words", [[], ["--help"], ["purify", "--help"]], ids=str)
def test_help_that_is_read_in_part_is_no_failure_and_on_a_full_disk_one_sentence(words):
    command = [sys.executable, "-m", "eclipse_ray", *words]
    process = Popen(command, stdout=PIPE, stderr=PIPE, text=True)
    process.stdout.close()
    assert process.wait() == 0
    assert process.stderr.read() == ""
    process.stderr.close()
    with open("/dev/full", "w") as full:
        process = Popen(command, stdout=full, stderr=PIPE, text=True)
        _, err = process.communicate()
    assert process.returncode == 1
    assert err == "error: the help could not be printed: [Errno 28] No space left on device\n"


def test_words_and_logs_of_jobs_on_a_full_disk_do_not_end_a_command():
    said = "from eclipse_ray import verbs\ncli.main = lambda _: (cli.say('x'), verbs._pass_on('y'), sys.exit(4))"
    code = f"import sys\nfrom eclipse_ray import cli\n{said}\nfrom eclipse_ray.__main__ import main\nmain([])"
    with open("/dev/full", "w") as full:
        process = Popen([sys.executable, "-c", code], stdout=full, stderr=full)
        assert process.wait() == 4


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
