"""SIGTERM or Ctrl-C to a driver while it waits in Ray: it says that it can go on, and leaves with 75 at once."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.chaos.everyday import table
from tests.chaos.everyday_ends import LONG, SHORT, measure
from tests.support import DEBUG, assignments

PATIENCE = 300

ENDLESS = {"cost": "reduced", "rounds": 100_000, "round_batches": 1, "stop_error": 0.0, "surrogate_batch_size": 32}


def words(world, output) -> dict[str, list[str]]:
    """Return work of each verb that would take hours, to be stopped as soon as some of it is done."""
    sets = assignments({"victim.epochs": 100_000, "evaluate.seeds": 1})
    endless = assignments({"denoiser.iterations": 1_000_000})
    grid = {
        "data": {"source": world.poisoned, "test": world.test},
        "matrix": {"clean": True, "defenses": ["none"]},
    }
    grid["data"]["output"] = f"{output}/grid"
    fit = {"data": {**grid["data"], "source": world.rest, "output": f"{output}/fit"}}
    fit |= {"matrix": {"poisons": ["em"], "defenses": ["none"]}, "poison": ENDLESS}
    configs = {name: output / f"{name}.yaml" for name in ("grid", "fit")}
    configs["grid"].write_text(json.dumps(grid))
    configs["fit"].write_text(json.dumps(fit))
    return {
        "train": ["train", "--clean", world.clean, "--out", f"{output}/out", *endless],
        "evaluate": ["evaluate", world.poisoned, "--test", world.test, *sets],
        "matrix": ["evaluate", "--config", str(configs["grid"]), *sets],
        "fit of a poison": ["evaluate", "--config", str(configs["fit"]), *sets],
    }


@pytest.mark.chaos
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("verb", ["train", "evaluate", "matrix", "fit of a poison"])
@pytest.mark.parametrize(
    ("stop", "group"),
    # `timeout` and Slurm tell the whole group: the driver, and the cluster that it has started.
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)],
    ids=["SIGTERM", "Ctrl-C", "SIGTERM to the group"],
)
def test_a_driver_that_is_asked_to_stop_says_so_and_exits_75(world, tmp_path, verb, stop, group):
    command = [sys.executable, "-m", "eclipse_ray", *words(world, tmp_path)[verb]]
    command += assignments({**DEBUG, "run.progress_seconds": 0.5, "denoiser.num_workers": 1})
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    said = []
    for line in driver.stderr:
        said.append(line)
        # Not before the first epoch or iteration is through: Ray then waits for the next.
        if re.search("/(s|min|h), ", line):
            break
    assert driver.poll() is None, said
    os.killpg(driver.pid, stop) if group else driver.send_signal(stop)
    _, rest = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 75, [*said, rest]
    assert rest.count("error: stopped; run the same command again to resume") == 1, rest


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", [*SHORT, *LONG])
def test_every_end_on_a_terminal_is_a_good_one(tmp_path, verb):
    count = measure(tmp_path, 10, 3.0, [verb])
    assert len(count.trials) >= 4
    assert not count.bad, table(count.trials)
