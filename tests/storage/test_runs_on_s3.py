"""Whole runs on a real S3 server: two drivers at once, a driver that dies, and a purification from S3 to S3."""

import json
import subprocess
import sys

import pytest

from eclipse_ray import verbs
from eclipse_ray.ledger import finalise, pending, read_statuses, summarise, verify
from eclipse_ray.storage import retries as transient
from eclipse_ray.storage.retries import Patience
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import complete, make_shards, written
from tests.storage.proxy import Fault
from tests.storage.servers import point_at
from tests.support import DEBUG, object_names, run_cli, wait_until

SHARDS = make_shards(24, 2)


CONTENDER = """
import json, sys, time
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import commit, make_shards, start
url, salt = sys.argv[1], int(sys.argv[2])
signs, out, shards = Store(url + "/signs"), Store(url + "/out"), make_shards(24, 2)

def meet(place):
    signs.write(f"{place}/{salt}", b"")
    while not signs.exists(f"{place}/{3 - salt}"):
        time.sleep(0.01)

meet("start")
start(out, shards)
won = []
for shard in shards:
    meet(shard.name)
    if commit(out, shard, salt=salt).seconds == 0.5 + salt:
        won.append(shard.name)
print(json.dumps(won))
"""


def test_two_drivers_at_once_have_one_winner_a_shard(s3_url):
    """Two drivers commit every shard at once with different bytes, so that the winner can be recognised."""
    drivers = {}
    try:
        for salt in (1, 2):
            command = [sys.executable, "-c", CONTENDER, s3_url, str(salt)]
            drivers[salt] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        winners = {salt: json.loads(driver.communicate()[0]) for salt, driver in drivers.items()}
    finally:
        for driver in drivers.values():
            driver.kill()
    assert sorted(winners[1] + winners[2]) == [shard.name for shard in SHARDS]
    store = Store(f"{s3_url}/out")
    manifest = finalise(store)
    assert (manifest.ok, manifest.failed) == (18, 6)
    assert verify(store).ok
    statuses = read_statuses(store)
    assert all(statuses[name].seconds == 0.5 + salt for salt, names in winners.items() for name in names)
    data = {entry.key for entry in store.list("data")}
    assert data == {status.object for status in statuses.values() if status.object}
    assert store.abort_uploads() == 0


DRIVER = """
import sys
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import complete, make_shards
complete(Store(sys.argv[1]), make_shards(24, 2))
"""


def done_as_if_undisturbed(store: Store) -> None:
    """Do what is left of a run; its bytes must be those of one without faults."""
    complete(store, SHARDS)
    assert verify(store).ok
    undisturbed = Store(store.url + "-undisturbed")
    complete(undisturbed, SHARDS)
    assert written(store) == written(undisturbed)


def test_a_driver_killed_in_the_middle_is_resumed_exactly(proxy, faulty_url):
    # The write of the sixth status is never answered. Five shards are committed before it.
    proxy.faults.append(Fault("stall", "^PUT .*/status/000005/", seconds=60))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, faulty_url])
    wait_until(lambda: proxy.fired["stall"], "the sixth status", process=driver)
    driver.kill()
    assert driver.wait(30) == -9
    store = Store(faulty_url)
    assert summarise(store).shards_done == 5
    assert len(pending(SHARDS, read_statuses(store))) == 7
    done_as_if_undisturbed(store)


def test_a_run_through_faults_gives_the_bytes_of_one_without(proxy, faulty_url, monkeypatch):
    monkeypatch.setattr(transient, "PATIENCE", Patience(tries=8, first_wait=0.01))
    for kind in ("reset", "lose", "error"):
        proxy.faults += [Fault(kind, "^PUT", times=3), Fault(kind, "^GET", times=3)]
    store = Store(faulty_url)
    complete(store, SHARDS)
    assert all(proxy.fired[kind] == 6 for kind in ("reset", "lose", "error"))
    done_as_if_undisturbed(store)


@pytest.fixture
def poisoned_on_s3(world, s3_url) -> str:
    """The poisoned set of `world`, copied to S3."""
    source, target = Store(world.poisoned), Store(f"{s3_url}/poisoned")
    for entry in source.list(hidden=True):
        target.write(entry.key, source.read(entry.key))
    return target.url


@pytest.mark.chaos
def test_purify_from_s3_to_s3_through_faults_gives_the_bytes_of_a_run_on_disk(
    world, poisoned_on_s3, proxy, tmp_path, monkeypatch
):
    """The environment points to the proxy, which breaks every third request for a while."""
    settings = [f"--set={key}={value}" for key, value in {**DEBUG, "purify.shard_images": 60}.items()]
    output = poisoned_on_s3 + "-purified"
    for number in range(3):
        proxy.faults += [
            Fault("cut", f"^GET .*part-0000{number}.parquet", times=1),
            Fault("reset", f"^PUT .*/data/00000{number}", times=2),
            Fault("lose", f"^PUT .*/status/00000{number}", times=1),
        ]
    result = run_cli("purify", poisoned_on_s3, output, "--denoiser", world.denoiser, *settings)
    assert (result["planned"], result["ok"], result["failed"]) == (240, 240, 0)
    assert result["output"] == output
    assert proxy.fired["reset"] == 6
    assert proxy.fired["lose"] == 3
    assert proxy.fired["cut"] >= 1
    disk = str(tmp_path / "disk")
    run_cli("purify", poisoned_on_s3, disk, "--denoiser", world.denoiser, *settings)
    assert object_names(output) == object_names(disk)
    point_at(monkeypatch, proxy.server_port)
    assert verbs.verify(output).ok
    assert verbs.status(output).shards_done == 4
    assert Store(output).abort_uploads() == 0
