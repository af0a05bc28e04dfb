"""Nodes that disappear, are cut off, or come late: the same bytes, little done twice, and new nodes get work.

The machines are several Ray nodes on this one; GPUs are counted but not there, so that a node holds one actor and
that of a lost node finds no other place. Purifying a shard takes ten seconds more than it has to. The partition
needs network namespaces, hence root.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from eclipse_ray import verbs
from eclipse_ray.diffusion.checkpoint import read_card
from tests.chaos.test_workers import PURIFY, command, fault
from tests.reports.material import purify_here
from tests.support import DEBUG, assignments, object_names, shards_done

SETTINGS = {
    "purify.shard_images": 8,
    "purify.batch_size": 8,
    "purify.num_gpus": 1,
    # One more than there are at the start: the pool waits for it, as for a node that an autoscaler adds.
    "purify.actors": "null",
    "run.max_gpus": 3,
}
SHARDS = 30
PATIENCE = 600


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The same work in this process, one shard after another, without Ray."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    settings = {**DEBUG, **{key: yaml.safe_load(str(value)) for key, value in SETTINGS.items()}}
    purify_here(world.poisoned, str(output), world.denoiser, **settings)
    found = object_names(output)
    assert len(found) == SHARDS
    return found


def join(cluster: Any, **resources: float) -> Any:
    """Add a node; Ray gives one 30 s to start, which a busy machine may need more than once."""
    for _ in range(4):
        try:
            return cluster.add_node(object_store_memory=100 * 2**20, **resources)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    pytest.fail("no node starts within 30 s here")


def wait_for(what: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        if driver.poll() is not None:
            pytest.fail(f"ended too early: {driver.communicate()}")
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.1)


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env={**os.environ, **environment}, **streams)


def started(output: Path) -> set[str]:
    """Return the shards that some worker has begun."""
    return {path.name for path in (output / "_eclipse/attempts").iterdir() if path.is_dir()}


def committed(output: Path) -> set[str]:
    return {path.parent.name for path in (output / "_eclipse/status").glob("*/*.json")}


def redone(output: Path) -> set[str]:
    """Return the shards of which a stage was begun more than once."""
    return {path.parent.name for path in (output / "_eclipse/attempts").glob("*/*-2")}


def working_actors(raylet: int) -> list[int]:
    """Return the process ids of actors below this raylet that have a shard in hand."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == raylet and title.startswith(b"ray::MapWorker") and b"submit" in title:
            found.append(int(folder.name))
    return found


@pytest.mark.chaos
@pytest.mark.timeout(3 * PATIENCE)
def test_one_node_is_lost_and_another_comes_late(world, tmp_path, undisturbed, monkeypatch):
    from ray.cluster_utils import Cluster

    for name, value in fault(tmp_path / "slow", PURIFY, "slow", "always").items():
        # Before the cluster: workers inherit from their node, not from the driver.
        monkeypatch.setenv(name, value)

    output = tmp_path / "out"
    cluster = Cluster()
    try:
        join(cluster, num_cpus=1)
        join(cluster, num_cpus=3, num_gpus=1)
        lost = join(cluster, num_cpus=3, num_gpus=1)
        cluster.wait_for_nodes()
        driver = start(command(world, output, **SETTINGS), RAY_ADDRESS=cluster.address)
        wait_for(lambda: shards_done(output) >= 4, driver)
        in_flight = started(output) - committed(output)
        cluster.remove_node(lost, allow_graceful=False)
        lost_at = shards_done(output)
        in_flight |= started(output) - committed(output)
        late = join(cluster, num_cpus=3, num_gpus=1)
        raylet = late.all_processes["raylet"][0].process.pid
        wait_for(lambda: bool(working_actors(raylet)), driver)
        came_at = shards_done(output)
        _, said = driver.communicate(timeout=PATIENCE)
    finally:
        cluster.shutdown()
    assert driver.returncode == 0, said
    assert 4 <= lost_at < SHARDS, "no node was lost"
    assert came_at < SHARDS, "the late node came too late"
    assert object_names(output) == undisturbed
    assert verbs.verify(str(output)).ok
    assert redone(output) <= in_flight, "a shard that nobody had in hand was done again"


@pytest.mark.chaos
@pytest.mark.timeout(3 * PATIENCE)
def test_training_goes_on_with_the_workers_that_are_left(world, tmp_path):
    from ray.cluster_utils import Cluster

    output = tmp_path / "denoiser"
    settings = {
        **DEBUG,
        "denoiser.num_workers": 2,
        "denoiser.use_gpu": False,
        "denoiser.iterations": 1500,
        "denoiser.checkpoint_every": 50,
        "denoiser.report_every": 50,
    }
    words = [sys.executable, "-m", "eclipse_ray", "train", "--json"]
    words += ["--clean", world.clean, "--out", str(output), *assignments(settings)]
    cluster = Cluster()
    try:
        join(cluster, num_cpus=1)
        lost = join(cluster, num_cpus=1)
        cluster.wait_for_nodes()
        driver = start(words, RAY_ADDRESS=cluster.address)
        wait_for(lambda: any((output / "_eclipse/train").glob("*/checkpoint_*/state.pt")), driver)
        unfinished = not (output / "eclipse.json").exists()
        cluster.remove_node(lost, allow_graceful=False)
        _, said = driver.communicate(timeout=PATIENCE)
    finally:
        cluster.shutdown()
    assert driver.returncode == 0, said
    assert unfinished, "no fault fired"
    card = read_card(output)
    assert card.iterations == 1500
    # Every report once: what was trained before the loss was not begun again from the start.
    assert [entry["iteration"] for entry in card.history] == list(range(50, 1501, 50))
    assert card.denoise_psnr > card.noisy_psnr


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@contextmanager
def namespaces(count: int) -> Iterator[list[str]]:
    """Join `count` network namespaces by a bridge, 10.77.0.2 and so on; skip where that is not permitted."""
    tag = f"er{os.getpid() % 10**6}"
    names = [f"{tag}n{number}" for number in range(count)]
    try:
        ip(f"netns add {names[0]}")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    try:
        ip(f"link add {tag}b type bridge")
        ip(f"link set {tag}b up")
        for number, name in enumerate(names):
            if number:
                ip(f"netns add {name}")
            ip(f"link add {tag}v{number} type veth peer name eth0 netns {name}")
            ip(f"link set {tag}v{number} master {tag}b up")
            ip(f"-n {name} addr add 10.77.0.{number + 2}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield names
    finally:
        for command_ in [f"netns del {name}" for name in names] + [f"link del {tag}b"]:
            subprocess.run(["ip", *command_.split()], capture_output=True)


def ray_node(name: str, number: int, folder: Path, *more: str) -> subprocess.Popen[str]:
    ray = str(Path(sys.executable).parent / "ray")
    words = ["ip", "netns", "exec", name, ray, "start", "--block", "--node-ip-address", f"10.77.0.{number + 2}"]
    words += ["--object-store-memory", str(100 * 2**20), *more]
    log = (folder / f"{name}.log").open("w")
    slow = fault(folder / "slow", PURIFY, "slow", "always")
    environment = {**os.environ, **slow, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(words, stdout=log, stderr=log, text=True, env=environment)


@pytest.mark.chaos
@pytest.mark.timeout(3 * PATIENCE)
def test_a_node_cut_off_for_twenty_seconds_changes_nothing(world, tmp_path, undisturbed):
    output, address = tmp_path / "out", "10.77.0.2:6379"
    temporary = f"/tmp/ray-cut-{os.getpid()}"
    nodes: list[subprocess.Popen[str]] = []
    with namespaces(3) as names:
        try:
            head = ["--head", "--port", "6379", "--num-cpus", "1", "--temp-dir", temporary]
            nodes.append(ray_node(names[0], 0, tmp_path, *head, "--include-dashboard", "false"))
            time.sleep(15)
            for number in (1, 2):
                more = ["--address", address, "--num-cpus", "3", "--num-gpus", "1"]
                nodes.append(ray_node(names[number], number, tmp_path, *more))
            time.sleep(15)
            for node in nodes:
                assert node.poll() is None, "a node did not start: see its log"
            words = ["ip", "netns", "exec", names[0], *command(world, output, **SETTINGS)]
            driver = start(words, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
            wait_for(lambda: shards_done(output) >= 4, driver)
            cut = names[2].replace("n2", "v2")
            ip(f"link set {cut} down")
            at = shards_done(output)
            time.sleep(20)
            ip(f"link set {cut} up")
            _, said = driver.communicate(timeout=PATIENCE)
        finally:
            for node in nodes:
                node.terminate()
            for node in nodes:
                node.wait(timeout=60)
    assert driver.returncode == 0, said
    assert 4 <= at < SHARDS, "no fault fired"
    assert object_names(output) == undisturbed
    assert verbs.verify(str(output)).ok
