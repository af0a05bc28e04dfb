"""status --watch: follows a run to its end, and being stopped is no failure of the run."""

from eclipse_ray import ledger, verbs
from eclipse_ray.results import StatusResult
from eclipse_ray.storage.store import Store
from tests.support import call


def looks(monkeypatch, *done: int) -> list[int]:
    """Let verbs.status see so many of four shards done, look by look; return the list of what is left to see."""
    left = list(done)

    def summarise(store: Store) -> StatusResult:
        shards = left.pop(0)
        return StatusResult(40, 10 * shards - bool(shards), int(bool(shards)), 4, shards)

    monkeypatch.setattr(ledger, "summarise", summarise)
    monkeypatch.setattr(verbs.time, "sleep", lambda seconds: None)
    return left


def test_it_looks_until_all_shards_are_done(monkeypatch, capfd):
    left = looks(monkeypatch, 1, 1, 3, 4)
    code, _, err = call(monkeypatch, capfd, "status", "somewhere", "--watch", "--every", "0.1")
    assert code == 0
    assert left == []
    assert "status: 40/40 images" in err
    assert "1 failed" in err


def test_without_watch_it_looks_once(monkeypatch, capfd):
    left = looks(monkeypatch, 1, 2)
    code, _, err = call(monkeypatch, capfd, "status", "somewhere")
    assert (code, err) == (0, "")
    assert left == [2]


def test_whoever_has_seen_enough_leaves_with_the_last_look(monkeypatch):
    looks(monkeypatch, 1, 2)
    calls = []

    def sleep(seconds: float) -> None:
        calls.append(seconds)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(verbs.time, "sleep", sleep)
    assert verbs.status("somewhere", watch=True, every=0.1).shards_done == 2
