"""What a run counts on: the nodes there are, or those that an autoscaler may add."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress

import pytest
import ray

from eclipse_ray import contact
from eclipse_ray.cluster import connect as room
from eclipse_ray.cluster.connect import NICENESS, PREEMPTION, _counted, connect
from eclipse_ray.config import load_config
from eclipse_ray.errors import ConfigError, EclipseError, InterruptedRunError
from eclipse_ray.purification.run import pool

EMPTY: dict[str, float] = {"node:__internal_head__": 1.0}
LIMITS = {"run.max_gpus": 8, "run.max_cpus": 64}


def test_a_cluster_that_starts_from_nothing_gets_a_pool_of_what_it_may_grow_to():
    config = load_config(None, LIMITS)
    resources = _counted(EMPTY, (), config, cores=2, local=False)
    assert (resources.cpus, resources.gpus) == (64, 8)
    assert pool(config, resources, shards=1000) == (8, 1.0)
    assert pool(config, resources, shards=3) == (3, 1.0)


def test_an_empty_cluster_without_limits_or_with_lower_ones_is_refused_instead_of_a_hang():
    for settings, words in ({}, "add nodes"), ({**LIMITS, "purify.num_gpus": 9}, "num_gpus"):
        config = load_config(None, settings)
        with pytest.raises(ConfigError, match=words):
            pool(config, _counted(EMPTY, (), config, cores=2, local=False), shards=10)


def test_a_larger_cluster_counts_and_a_local_one_cannot_grow():
    config = load_config(None, LIMITS)
    assert _counted({"CPU": 128.0, "GPU": 16.0}, (), config, cores=2, local=False).gpus == 16
    local = _counted({"CPU": 4.0}, (), config, cores=2, local=True)
    assert (local.cpus, local.gpus) == (4, 0)


@pytest.fixture
def fake_ray(monkeypatch):
    """Return what puts a function in the place of `ray.init`, on a machine of 4 CPUs without a cluster."""

    def put(init):
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
        monkeypatch.setattr(ray, "nodes", list)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    return put


def test_threads_that_connect_together_start_one_cluster(fake_ray, monkeypatch):
    started = []

    def slow_init(**_):
        time.sleep(0.2)
        started.append(1)

    fake_ray(slow_init)
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(started))
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(connect, [load_config(None, {})] * 3))
    assert (started, [each.cpus for each in found]) == ([1], [4, 4, 4])


@contextmanager
def server(answer: bytes):
    """A port that takes connections and sends `answer`, then stays silent."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        kept = []

        def serve():
            with suppress(OSError):
                while True:
                    kept.append(listening.accept()[0])
                    kept[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a server of HTTP/2 sends first."""


@pytest.mark.parametrize(
    ("answer", "reason", "asked"),
    [
        (b"", "timed out", 0),
        (b"HTTP/1.1 400 Bad Request", "a web server answers; Ray's port is mostly 6379", 0),
        (SETTINGS, "nothing answered within 0 s", 1),
        (SETTINGS, "a server answers, but does not let this command in; does it need RAY_AUTH_TOKEN?", 1),
    ],
)
@pytest.mark.parametrize("variable", [False, True])
def test_a_cluster_that_stays_silent_is_given_up_with_its_name_and_its_source(
    fake_ray, monkeypatch, answer, reason, asked, variable
):
    left, tried = threading.Event(), []

    def init(**options):
        tried.append(options["address"])
        if "RAY_AUTH_TOKEN" in reason:
            raise ConnectionError(f"Failed to connect to Ray cluster at {options['address']}. Check the token.")
        left.wait(30)

    fake_ray(init)
    monkeypatch.setattr(contact, "CONTACT_SECONDS", 0.4)
    monkeypatch.setattr(room, "ANSWER_SECONDS", 0.2)
    with server(answer) as address:
        monkeypatch.setenv("RAY_ADDRESS", address if variable else "10.9.9.9:1")
        with pytest.raises(InterruptedRunError) as caught:
            connect(load_config(None, {} if variable else {"run.address": address}))
    named = f"RAY_ADDRESS={address} in your environment" if variable else f"run.address={address}"
    here = "`unset RAY_ADDRESS`" if variable else "add `--set run.address=local`"
    assert str(caught.value).startswith(f"{named}: no Ray cluster answers there ({reason}")
    assert f"to run on this machine instead, {here}; or" in str(caught.value)
    assert tried == asked * [address]
    left.set()


def test_the_last_cluster_of_this_machine_is_knocked_at_before_ray_waits_for_it(fake_ray, monkeypatch):
    fake_ray(lambda **_options: pytest.fail("Ray would wait for minutes"))
    monkeypatch.setattr(room, "canonicalize_bootstrap_address", lambda _: "127.0.0.1:9")
    with pytest.raises(InterruptedRunError, match=r"run\.address=auto: no Ray cluster answers there .*refused"):
        connect(load_config(None, {"run.address": "auto"}))


@pytest.mark.parametrize(
    ("message", "failures", "tries"),
    [
        ("a stack\nThe current node timed out during startup. This", 2, 3),
        ("timed out during startup", 9, 3),
        ("full", 9, 1),
    ],
)
def test_a_cluster_that_starts_too_slowly_is_started_again(fake_ray, capsys, message, failures, tries):
    tried = []

    def init(**_options):
        tried.append(1)
        if len(tried) <= failures:
            raise RuntimeError(message)

    fake_ray(init)
    with nullcontext() if failures < tries else pytest.raises(EclipseError, match="could not be started here"):
        connect(load_config(None, {}))
    assert len(tried) == tries
    assert capsys.readouterr().err.count("trying again") == tries - 1


TOO_SLOW = """
import os
from pathlib import Path
from ray._private import services
from eclipse_ray.cluster import connect
from eclipse_ray.config import load_config
from eclipse_ray.errors import EclipseError

def names():
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{child}/comm").read_text().strip() for child in children]

def get_node(*arguments):
    print("raylet" in names(), "gcs_server" in names())
    raise Exception("The current node timed out during startup.")

services.get_node, connect.STARTS = get_node, 1
try:
    connect.connect(load_config(None, {"run.address": "local"}))
except EclipseError:
    print("raylet" in names(), "gcs_server" in names(), flush=True)
os._exit(0)
"""


def test_nothing_is_left_of_a_cluster_that_started_too_slowly():
    done = subprocess.run([sys.executable, "-c", TOO_SLOW], capture_output=True, text=True)
    assert done.stdout == "True True\nFalse False\n", done.stderr


@pytest.mark.parametrize(("load", "words"), [(0.5, ""), (9.75, ", with a load of 9.8 on 2 cores")])
def test_a_cluster_that_starts_too_slowly_says_how_busy_the_machine_is(fake_ray, monkeypatch, capsys, load, words):
    def init(**_options):
        raise RuntimeError("a stack\nThe current node timed out during startup. This")

    fake_ray(init)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    with pytest.raises(EclipseError, match=rf"\(The current node timed out during startup{words}\)"):
        connect(load_config(None, {}))
    said = capsys.readouterr().err
    assert said.splitlines() == 2 * [f"note: Ray did not start within 0s{words}; trying again"]


@pytest.mark.parametrize("variable", [NICENESS, PREEMPTION])
def test_our_own_cluster_gives_workers_the_priority_of_the_command_and_no_watcher(fake_ray, monkeypatch, variable):
    found = []
    fake_ray(lambda **_: found.append(os.environ[variable]))
    monkeypatch.delenv(variable, raising=False)
    connect(load_config(None, {}))
    monkeypatch.setenv(variable, "7")
    connect(load_config(None, {}))
    assert found == ["0", "7"]
