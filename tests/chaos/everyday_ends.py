"""How commands end on a terminal: done, and stopped by Ctrl-C at every moment of a short run.

    python -m tests.chaos.everyday_ends --runs 200 --step 0.5 [--only status,purify]

Prints a table, and counts bad ends by their kind; none is the aim. Every command has a pseudo-terminal of its own.
"""

import argparse
import os
import pty
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from eclipse_ray.errors import EXIT_RUN_AGAIN, STOPPED
from tests.chaos.everyday import Trial, table
from tests.support import DEBUG, World, assignments, make_world

LIMIT = 240
"""Seconds after which a command is taken for one that hangs."""
LATE = 5
"""Seconds within which a stopped command must have ended."""
LEFT = 20
"""Seconds within which what a command has started, such as Ray's processes, must have ended after it."""
MARK = "ECLIPSE_RAY_EVERYDAY"


class End(NamedTuple):
    """How a command ended: seconds from its start and from Ctrl-C to its end, and all that the terminal showed."""

    code: int
    seconds: float
    after_stop: float
    shown: str
    left: int


def on_terminal(words: list[str], stop_after: float | None = None) -> End:
    """Run `eclipse-ray WORDS` on a terminal of its own; type Ctrl-C after some seconds."""
    mark = uuid.uuid4().hex
    process, terminal = pty.fork()
    if process == 0:
        environment = {**os.environ, MARK: mark, "COLUMNS": "140", "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-m", "eclipse_ray", *words], environment)
    started, stopped, shown = time.monotonic(), None, b""
    while True:
        now = time.monotonic() - started
        if now > LIMIT:
            os.kill(process, signal.SIGKILL)
        if stopped is None and stop_after is not None and now >= stop_after:
            os.write(terminal, b"\x03")
            stopped = now
        if select.select([terminal], [], [], 0.02)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:
                # The last process that had the terminal is gone.
                break
        elif os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
    _, status = os.waitpid(process, 0)
    seconds = time.monotonic() - started
    os.close(terminal)
    left = still_there(mark)
    text = shown.decode("utf-8", "replace").replace("\r\n", "\n")
    return End(os.waitstatus_to_exitcode(status), seconds, seconds - (stopped or seconds), text, left)


def still_there(mark: str) -> int:
    """Return how many processes with this mark in their environment do not end."""
    deadline = time.monotonic() + LEFT
    while (found := sum(1 for _ in marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def marked(mark: str) -> Iterator[str]:
    """Yield the processes that have this mark in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                yield folder.name
        except OSError:
            continue


def lines_of(shown: str) -> list[str]:
    """Return the lines that stay on a terminal: what a bar has painted over is gone."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    lines = [line.rpartition("\r")[2].replace("^C", "").strip() for line in plain.split("\n")]
    return [line for line in lines if line]


def faults(end: End, stopped: bool) -> list[str]:
    """Return what is bad about an end, each kind in a few words."""
    lines = lines_of(end.shown)
    sentence = f"error: {STOPPED}"
    words = [line for line in lines if line == sentence]
    done = end.code == 0 and not words and lines and not lines[-1].startswith(("error", "Traceback"))
    found = {
        "stack trace": "Traceback" in end.shown or "Exception ignored" in end.shown,
        "abort": "terminate called" in end.shown or "Fatal Python error" in end.shown or end.code < 0,
        "Ray's own words at the end": stopped and ".cc:" in end.shown.partition("^C")[2],
        "left processes": end.left > 0,
        "late": end.after_stop > LATE,
    }
    if not stopped:
        found["code"] = not done
    elif not done:
        found["code"] = end.code != EXIT_RUN_AGAIN
        found["no word, or more than one"] = len(words) != 1
        found["words after stopped"] = bool(words) and lines[-1] != sentence
    return [kind for kind, bad in found.items() if bad]


SCRATCH = "SCRATCH"
"""Stands in words for a folder that is new for every command."""
SHORT = {
    "status": ["status", "PURIFIED"],
    "verify": ["verify", "PURIFIED"],
    "convert": ["convert", "PURIFIED", f"{SCRATCH}/converted"],
}
"""Commands that start no cluster, on a folder of purified images."""
LONG = ["purify", "train", "evaluate", "sweep"]


def words_of(world: World) -> dict[str, list[str]]:
    """Return short runs of the verbs that work on a cluster."""
    search = ["--set", "sweep.space={purify.t_star: [2, 3]}", "--set", "sweep.images=60"]
    search += ["--denoiser", world.denoiser, "--clean", world.test, "--out", f"{SCRATCH}/sweep"]
    verbs = {
        "purify": ["purify", world.poisoned, f"{SCRATCH}/purified", "--denoiser", world.denoiser],
        "train": ["train", "--clean", world.clean, "--out", f"{SCRATCH}/denoiser"],
        "evaluate": ["evaluate", world.poisoned, "--test", world.test, "--set", "evaluate.seeds=1"],
        "sweep": ["sweep", world.poisoned, *search],
    }
    settings = {**DEBUG, "victim.epochs": 3, "purify.shard_images": 60, "denoiser.num_workers": 1}
    return {name: [*words, *assignments(settings)] for name, words in verbs.items()}


class Count:
    """Runs commands, prints a row for each, and counts bad ends."""

    def __init__(self, root: Path) -> None:
        self.root, self.trials, self.bad = root, list[Trial](), Counter[str]()

    def run(self, name: str, words: list[str], stop_after: float | None = None) -> End:
        """Run a command, with a folder of its own, and write down how it ended."""
        folder = tempfile.mkdtemp(dir=self.root)
        end = on_terminal([word.replace(SCRATCH, folder) for word in words], stop_after)
        shutil.rmtree(folder, ignore_errors=True)
        kinds, lines = faults(end, stop_after is not None), lines_of(end.shown)
        self.bad.update(kinds)
        done = name if stop_after is None else f"{name}, Ctrl-C at {stop_after:.1f} s"
        sentence = (f"BAD ({', '.join(kinds)}) " if kinds else "") + (lines[-1] if lines else "")
        trial = Trial(done, end.code, end.after_stop if stop_after else end.seconds, sentence)
        self.trials.append(trial)
        shown = [f"    > {line[:300]}" for line in lines[-25:]] if kinds else []
        print("\n".join([table([trial]).splitlines()[-1], *shown]), flush=True)
        return end

    def summary(self) -> str:
        """Return how many ends there were, and the bad ones by their kind."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.bad.most_common()) or "none"
        return f"{len(self.trials)} ends; bad: {kinds}"


def measure(root: Path, runs: int, step: float, only: list[str], at_once: int = 1) -> Count:
    """Run every short command `runs` times, and stop every run on a cluster at each step of its time."""
    world, count, work = make_world(root / "world"), Count(root), list[tuple[str, list[str], float | None]]()
    long = words_of(world)
    purified = str(root / "purified")
    if set(only) & set(SHORT):
        count.run("purify", [word.replace(f"{SCRATCH}/purified", purified) for word in long["purify"]])
    for name, words in SHORT.items():
        words = [word.replace("PURIFIED", purified) for word in words]
        work += [(name, words, None)] * (runs if name in only else 0)
    for name in set(LONG) & set(only):
        seconds = count.run(name, long[name]).seconds
        work += [(name, long[name], step * number) for number in range(1, int(seconds / step) + 2)]
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda one: count.run(*one), work))
    return count


def main() -> None:
    """Measure, and end with 1 if an end was bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--step", type=float, default=0.5)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--only", type=lambda words: words.split(","), default=[*SHORT, *LONG])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="everyday-ends-") as folder:
        count = measure(Path(folder), given.runs, given.step, given.only, given.at_once)
    print(table(count.trials), count.summary(), sep="\n\n")
    sys.exit(1 if count.bad else 0)


if __name__ == "__main__":
    main()
