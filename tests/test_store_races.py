"""Put-if-absent between processes, another run's clean-up, and honest listings on a local disk."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from eclipse_ray.data.store import Store


def _contend(url, name, barrier, winners):
    barrier.wait(30)
    if Store(url).create("claim", str(name).encode()):
        winners.put(name)


def test_put_if_absent_between_processes_has_one_winner(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, winners = context.Barrier(16), context.Queue()
    processes = [context.Process(target=_contend, args=(str(tmp_path), i, barrier, winners)) for i in range(16)]
    for process in processes:
        process.start()
    winner = winners.get(timeout=60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert winners.empty()
    assert (tmp_path / "claim").read_bytes() == str(winner).encode()
    assert os.listdir(tmp_path) == ["claim"]


class Sweeping(Store):
    """Another run's clean-up takes the first temporary away."""

    swept = 0

    def _write_temporary(self, key: str, data: bytes) -> str:
        path = super()._write_temporary(key, data)
        if not self.swept:
            self.swept += 1
            os.unlink(path)
        return path


@pytest.mark.parametrize("operation", ["create", "write"])
def test_write_survives_another_runs_clean_up(tmp_path, operation):
    store = Sweeping(str(tmp_path))
    getattr(store, operation)("data/x", b"1")
    assert store.swept == 1
    assert store.read("data/x") == b"1"
    assert os.listdir(tmp_path / "data") == ["x"]


def test_local_listing_follows_links_but_not_in_circles(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.png").write_bytes(b"12")
    (tmp_path / "src" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "src" / "a" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    found = list(Store(str(tmp_path / "src")).list())
    assert [(entry.key, entry.size) for entry in found] == [("linked/1.png", 2)]
