import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from eclipse_ray.data.store import Store
from eclipse_ray.errors import InputError


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://store-{tmp_path.name}")


def test_one_of_many_creates_a_key(store):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.create("status/1", str(n).encode()), range(16)))
    assert won.count(True) == 1
    assert store.read("status/1") == str(won.index(True)).encode()
    store.probe()


def test_listing_is_sorted_and_passes_over_private_names(store):
    for key in ("b/2", "a", "b/1", "_eclipse/plan", "b/.tmp-1"):
        store.write(key, key.encode())
    assert [entry.key for entry in store.list()] == ["a", "b/1", "b/2"]
    assert [entry.key for entry in store.list("_eclipse")] == ["_eclipse/plan"]
    assert list(store.list("absent")) == []
    assert store.entry("b/1") == list(store.list())[1]
    assert store.entry("b/1").size == 3
    with pytest.raises(FileNotFoundError):
        store.entry("absent")


def test_objects_come_and_go(store):
    store.write("x/y", b"1")
    store.write("x/y", b"22")
    assert pickle.loads(pickle.dumps(store)).read("x/y") == b"22"
    with store.open("x/y") as file:
        assert file.read() == b"22"
    store.delete("x/y")
    store.delete("x/y")
    assert not store.exists("x/y")


def test_unknown_locations_are_refused():
    with pytest.raises(InputError, match="cannot open"):
        Store("nosuchscheme://bucket")
