"""Faults for worker processes: Python imports this file at its start where PYTHONPATH names its folder.

ECLIPSE_RAY_TEST_FAULT is a JSON object: `function` ("package.module.name") misbehaves as `how` says (kill, exit,
sleep, memory; slow: late, but right) when one of its arguments holds `when`, or `when` is "always", at most
`times` times; each time adds a line to file `log`.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time

FAULT = json.loads(os.environ.get("ECLIPSE_RAY_TEST_FAULT", "{}"))


def misbehave() -> None:
    with open(FAULT["log"], "a") as log:
        log.write(f"{os.getpid()}\n")
    if FAULT["how"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif FAULT["how"] == "exit":
        sys.exit(0)
    elif FAULT["how"] == "sleep":
        time.sleep(3600)
    elif FAULT["how"] == "slow":
        time.sleep(10)
        return
    raise MemoryError("no memory left, says the test")


def fired() -> int:
    return len(open(FAULT["log"]).readlines()) if os.path.exists(FAULT["log"]) else 0


def is_due(arguments) -> bool:
    if fired() >= FAULT["times"]:
        return False
    when = FAULT["when"]
    return when == "always" or any(
        when.encode() in value if isinstance(value, bytes) else isinstance(value, list | tuple) and when in value
        for value in arguments
    )


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module as ever, and wraps the function once the module has been run."""

    def find_spec(self, name, path, target=None):
        module, _, function = FAULT["function"].rpartition(".")
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_wrap(loaded):
            run(loaded)
            genuine = getattr(loaded, function)

            def faulty(*arguments, **named):
                if is_due([*arguments, *named.values()]):
                    misbehave()
                return genuine(*arguments, **named)

            setattr(loaded, function, faulty)

        spec.loader.exec_module = run_and_wrap
        return spec


if FAULT:
    sys.meta_path.insert(0, Finder())
