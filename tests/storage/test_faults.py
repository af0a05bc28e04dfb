"""Broken connections: three faults in a row are retried, more are an error, and no read is ever short."""

import os

import pytest

from eclipse_ray.errors import StorageError
from eclipse_ray.storage import retries as transient
from eclipse_ray.storage.retries import Patience
from eclipse_ray.storage.store import Store
from tests.storage.proxy import Fault

SIZE = 300_000
CUTS = [0, 1, 0.5, -1]
GET = "^GET .*/data/x"


@pytest.fixture
def data(faulty_url) -> bytes:
    content = os.urandom(SIZE)
    Store(faulty_url).write("data/x", content)
    return content


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(transient, "PATIENCE", Patience(tries=4, seconds=60, first_wait=0.01))


def whole(store: Store) -> bytes:
    return store.read("data/x")


def piece(store: Store) -> bytes:
    with store.open("data/x") as file:
        file.seek(1000)
        return file.read(200_000)


@pytest.mark.parametrize("keep", CUTS)
@pytest.mark.parametrize("read", [whole, piece])
def test_what_is_cut_three_times_is_read_whole_and_what_is_always_cut_is_an_error(
    proxy, faulty_url, data, keep, read, impatient
):
    store = Store(faulty_url)
    proxy.faults.append(Fault("cut", GET, times=3, keep=keep))
    assert read(store) == (data if read is whole else data[1000:201_000])
    assert proxy.fired["cut"] == 3
    proxy.faults.append(Fault("cut", GET, times=99, keep=keep))
    with pytest.raises(StorageError, match=r"data/x: could not read it at http://.*: 4 tries in .* failed"):
        read(store)
    assert proxy.fired["cut"] == 7


@pytest.mark.parametrize("kind", ["reset", "error"])
@pytest.mark.parametrize("operation", ["read", "entry", "list", "exists", "write", "create", "delete"])
def test_three_faults_are_waited_out_by_every_operation(proxy, faulty_url, data, kind, operation, impatient):
    store = Store(faulty_url)
    proxy.faults.append(Fault(kind, times=3))
    if operation == "list":
        assert [entry.key for entry in store.list()] == ["data/x"]
    elif operation in ("write", "create"):
        getattr(store, operation)("data/y", b"1")
        assert store.read("data/y") == b"1"
    else:
        getattr(store, operation)("data/x")
    assert proxy.fired[kind] == 3


@pytest.mark.parametrize("code", ["InternalError", "ServiceUnavailable"])
def test_a_server_that_stays_ill_is_named_with_operation_and_key(proxy, faulty_url, code, impatient):
    proxy.faults.append(Fault("error", times=99, code=code, status=500))
    with pytest.raises(
        StorageError, match=rf"/data/y: could not write it at http://.*: 4 tries in .* {code}, HTTP 500"
    ):
        Store(faulty_url).create("data/y", b"1")
    assert proxy.fired["error"] == 4


def test_a_silent_server_is_given_up_and_asked_again(proxy, faulty_url, data, impatient):
    proxy.faults.append(Fault("stall", GET, seconds=10))
    assert Store(faulty_url).read("data/x") == data
    assert proxy.fired["stall"] == 1


@pytest.mark.chaos
def test_a_server_that_stays_silent_is_an_error(proxy, faulty_url, data, impatient):
    proxy.faults.append(Fault("stall", GET, seconds=10, times=99))
    with pytest.raises(StorageError, match=r"4 tries in .*[Tt]imeout"):
        Store(faulty_url).read("data/x")
    assert proxy.fired["stall"] == 4


@pytest.mark.chaos
def test_with_default_patience_a_missing_server_is_an_error_within_bounds(proxy, faulty_url):
    store = Store(faulty_url)
    proxy.faults.append(Fault("reset", times=99))
    with pytest.raises(StorageError, match=f"{transient.PATIENCE.tries} tries"):
        store.read("data/x")
    # aiohttp itself repeats a request once if its connection is reset, also a PUT.
    assert proxy.fired["reset"] in (transient.PATIENCE.tries, 2 * transient.PATIENCE.tries)
