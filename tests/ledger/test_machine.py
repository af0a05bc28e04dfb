"""Any interleaving of commits, crashes, second drivers and resumes ends with every id exactly once."""

import contextlib
import os
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eclipse_ray.errors import InputError
from eclipse_ray.ledger import Shard, collect, finalise, pending, read_statuses, retriable, summarise, verify
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import (
    CrashError,
    CrashingStore,
    commit,
    complete,
    make_shards,
    memory_store,
    start,
    written,
)

_SHARDS = 4
MEANWHILE = (collect, finalise, Store.probe)
shard_numbers = st.integers(0, _SHARDS - 1)
salts = st.integers(0, 2)
crash_points = st.integers(0, 5)


class Drivers(RuleBasedStateMachine):
    """Two drivers on one output folder; another salt is a retry that gives other bytes."""

    @initialize()
    def claim(self) -> None:
        self.store = memory_store()
        self.shards = make_shards(images=10, shard_images=3)
        assert len(self.shards) == _SHARDS
        self.statuses: dict[str, bytes] = {}

    @precondition(lambda self: not self.store.exists("_eclipse/plan.parquet"))
    @rule(at=st.integers(0, 2), after=st.booleans())
    def crash_at_start(self, at: int, after: bool) -> None:
        try:
            start(CrashingStore(self.store.url, at, after), self.shards)
        except CrashError:
            return

    @rule()
    def resume(self) -> None:
        start(self.store, self.shards)

    @precondition(lambda self: self.store.exists("_eclipse/plan.parquet"))
    @rule(number=shard_numbers, salt=salts)
    def commit_or_recommit(self, number: int, salt: int) -> None:
        shard = self.shards[number]
        before = read_statuses(self.store).get(shard.name)
        status = commit(self.store, shard, salt)
        assert status.generation == 0
        assert before is None or before.generation > 0 or before == status

    @precondition(lambda self: self.store.exists("_eclipse/plan.parquet"))
    @rule(number=shard_numbers, salt=salts, at=crash_points, after=st.booleans())
    def commit_and_crash(self, number: int, salt: int, at: int, after: bool) -> None:
        try:
            commit(CrashingStore(self.store.url, at, after), self.shards[number], salt)
        except CrashError:
            return

    @precondition(lambda self: self.store.exists("_eclipse/plan.parquet"))
    @rule(number=shard_numbers, ours=salts, theirs=salts)
    def second_driver_commits_between_our_objects_and_our_status(
        self, number: int, ours: int, theirs: int
    ) -> None:
        shard, store, machine = self.shards[number], self.store, self

        class Slow(CrashingStore):
            def create(self, key: str, data: bytes) -> bool:
                if key.startswith("_eclipse/status"):
                    machine.between = commit(store, shard, theirs)
                return super().create(key, data)

        self.between = None
        won = commit(Slow(store.url), shard, ours)
        assert self.between in (None, won)

    @precondition(lambda self: self.again())
    @rule(salt=salts, mended=st.booleans(), meanwhile=st.sampled_from(MEANWHILE))
    def retry_while_another_driver_cleans_up(
        self, salt: int, mended: bool, meanwhile: Callable[[Store], object]
    ) -> None:
        shard, store = self.again()[-1], self.store
        generation = read_statuses(store)[shard.name].generation + 1

        class Slow(CrashingStore):
            def create(self, key: str, data: bytes) -> bool:
                if key.startswith("_eclipse/status"):
                    with contextlib.suppress(InputError):  # finalise, before every shard is done
                        meanwhile(store)
                return super().create(key, data)

        won = commit(Slow(store.url), shard, salt, generation, mended)
        assert read_statuses(store)[shard.name] == won

    def again(self) -> list[Shard]:
        planned = self.store.exists("_eclipse/plan.parquet")
        return retriable(self.shards, read_statuses(self.store)) if planned else []

    @precondition(lambda self: self.store.exists("_eclipse/plan.parquet"))
    @rule(idle=st.booleans())
    def clean_up(self, idle: bool) -> None:
        collect(self.store, idle)

    @precondition(lambda self: self.store.exists("_eclipse/plan.parquet"))
    @rule(at=st.none() | crash_points, after=st.booleans())
    def finish(self, at: int | None, after: bool) -> None:
        missing = pending(self.shards, read_statuses(self.store))
        try:
            finalise(CrashingStore(self.store.url, at, after))
        except CrashError:
            return
        except InputError:
            assert missing
            return
        assert not missing
        self.assert_exact()

    @invariant()
    def statuses_never_change_and_name_what_exists(self) -> None:
        if not hasattr(self, "store"):
            return
        now = {e.key: self.store.read(e.key) for e in self.store.list("_eclipse/status")}
        assert self.statuses.items() <= now.items()
        if now.keys() != self.statuses.keys():
            for status in read_statuses(self.store).values():
                for key in (status.object, status.errors_object):
                    assert key is None or self.store.exists(key), "committed before its objects"
        self.statuses = now

    def assert_exact(self) -> None:
        result = verify(self.store)
        assert result.ok, result.mismatched
        ids: list[str] = []
        named = {k for s in read_statuses(self.store).values() for k in (s.object, s.errors_object)}
        for key, data in written(self.store).items():
            assert ".tmp-" not in key
            if key in named and key.startswith(("data/", "_eclipse/errors/")):
                ids += pq.read_table(pa.BufferReader(data)).column("id").to_pylist()
        assert sorted(ids) == sorted(span.key for shard in self.shards for span in shard.spans)
        summary = summarise(self.store)
        assert summary.ok + summary.failed == summary.planned == len(ids)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            complete(self.store, self.shards)
            collect(self.store, idle=True)
            self.assert_exact()
            named = {k for s in read_statuses(self.store).values() for k in (s.object, s.errors_object)}
            assert {k for k in written(self.store) if k.startswith(("data/", "_eclipse/errors/"))} == named - {
                None
            }
            self.store.fs.rm(self.store.root, recursive=True)


Drivers.TestCase.settings = settings(
    max_examples=int(os.environ.get("ECLIPSE_RAY_EXAMPLES", "100")),
    stateful_step_count=14,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestDrivers = pytest.mark.ledger(Drivers.TestCase)
