"""An output that is extended, retried and cleaned up after its first run, also by two drivers at once."""

import pytest

from eclipse_ray.datasets.table import Part
from eclipse_ray.errors import InputError, ResumeError
from eclipse_ray.ledger import (
    Fingerprint,
    Plan,
    collect,
    finalise,
    open_run,
    pending,
    plan_digest,
    plan_source,
    read_plan,
    read_statuses,
    summarise,
    verify,
)
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import commit, complete, make_fingerprint, make_shards, memory_store, part, written

CLASSES = ("cat", "dog")


def parts(*names: str) -> list[Part]:
    return [part(name) for name in names]


def run(store: Store, listed: list[Part], extend: bool = False, classes=CLASSES, shard_images: int = 2) -> Plan:
    """Do what a driver does with a listing, from the plan to the manifest."""
    plan = plan_source(store, listed, shard_images, classes, extend)
    fingerprint: Fingerprint = make_fingerprint(list(plan.base))
    open_run(store, plan, fingerprint, "run: {}\n")
    for shard in pending(plan.shards, read_statuses(store)):
        commit(store, shard)
    finalise(store)
    return plan


def names(plan: Plan) -> list[list[str]]:
    return [[span.key for span in shard.spans] for shard in plan.shards]


def test_a_grown_source_is_refused_then_extended_then_resumed():
    store = memory_store()
    run(store, parts("b", "c", "d"))
    before = written(store)
    with pytest.raises(ResumeError, match="2 objects that the plan lacks, such as a; add --extend"):
        run(store, parts("a", "b", "c", "d", "e"))
    assert written(store) == before
    grown = run(store, parts("a", "b", "c", "d", "e"), extend=True, shard_images=9)
    assert names(grown) == [["b", "c"], ["d"], ["a", "e"]]
    assert grown.shard_images == 2, "an extension is cut as the plan was"
    assert verify(store).ok
    assert summarise(store).planned == 5
    assert {k: v for k, v in written(store).items() if k in before and "manifest" not in k} == {
        k: v for k, v in before.items() if "manifest" not in k
    }
    for extend in (False, True):
        assert run(store, parts("a", "b", "c", "d", "e"), extend) == grown
    again = run(store, parts("a", "b", "c", "d", "e", "f"), extend=True)
    assert names(again)[3:] == [["f"]]
    assert read_plan(store) == again


def test_an_extended_run_is_unfinished_until_its_shards_are_done():
    store = memory_store()
    run(store, parts("a", "b"))
    plan = plan_source(store, parts("a", "b", "c"), 2, CLASSES, extend=True)
    open_run(store, plan, make_fingerprint(list(plan.base)), "")
    assert not store.exists("_eclipse/manifest.parquet")
    with pytest.raises(InputError, match="1 of 2 shards"):
        finalise(store)
    assert not verify(store).ok


def test_a_changed_object_is_refused_in_the_plan_and_in_its_extension():
    store = memory_store()
    run(store, parts("a", "b"))
    run(store, parts("a", "b", "c"), extend=True)
    for changed in ("a", "c"):
        listed = [part(name, version="v2" if name == changed else "v1") for name in "abc"]
        with pytest.raises(ResumeError, match=f"input {changed}: .*v1 -> .*v2"):
            run(store, listed, extend=True)
    with pytest.raises(ResumeError, match=r"input c: .* -> absent"):
        run(store, parts("a", "b"), extend=True)


def test_an_extension_that_renumbers_labels_is_refused():
    store = memory_store()
    run(store, parts("a", "b"))
    with pytest.raises(ResumeError, match="classes are now cat, cow, dog, not cat, dog: labels would change"):
        run(store, parts("a", "b", "c"), extend=True, classes=("cat", "cow", "dog"))


def test_two_drivers_that_extend_at_once_do_it_once():
    store = memory_store()
    run(store, parts("a", "b"))
    listed = parts("a", "b", "c", "d", "e")
    plans = [plan_source(store, listed, 2, CLASSES, extend=True) for _ in range(2)]
    for plan in plans:
        open_run(store, plan, make_fingerprint(list(plan.base)), "")
    other = plan_source(memory_store(), parts("c", "d"), 2, CLASSES)
    assert read_plan(store) == plans[0]
    late = Plan(plans[0].base, 2, CLASSES, (other.base,))
    with pytest.raises(ResumeError, match="no longer holds what was planned"):
        open_run(store, late, make_fingerprint(list(late.base)), "")
    assert run(store, listed) == plans[0]
    assert verify(store).ok


def test_a_damaged_extension_is_named():
    store = memory_store()
    run(store, parts("a"))
    run(store, parts("a", "b"), extend=True)
    store.write("_eclipse/plan-000001.parquet", b"PAR1")
    with pytest.raises(InputError, match=r"plan-000001\.parquet: damaged"):
        read_plan(store)
    assert any("plan-000001" in sentence for sentence in verify(store).mismatched)


def test_cleaning_up_spares_what_a_retry_may_be_about_to_commit():
    store, shards = memory_store(), make_shards()
    complete(store, shards)
    lost_race, in_flight = "data/000001-0123456789abcdef.parquet", "data/000001-1-0123456789abcdef.parquet"
    for key in (lost_race, in_flight):
        store.create(key, b"in flight or left by the dead")
    assert collect(store) == 1
    assert [store.exists(key) for key in (lost_race, in_flight)] == [False, True]
    assert verify(store).mismatched == [
        f"{store.path(in_flight)}: no status names this object; have leftovers removed with "
        f"`eclipse-ray gc --idle {store.url}`, or move it elsewhere if it is yours"
    ]
    assert collect(store, idle=True) == 1
    assert verify(store).ok
    assert collect(store, idle=True) == 0


def test_cleaning_up_an_unfinished_run_touches_no_shard_in_flight():
    store, shards = memory_store(), make_shards()
    open_run(store, Plan(tuple(shards), 4), make_fingerprint(shards), "")
    commit(store, shards[0])
    store.create("data/000002-0123456789abcdef.parquet", b"in flight")
    assert collect(store) == 0
    assert collect(store, idle=True) == 1
    assert plan_digest(read_plan(store).shards) == plan_digest(shards)


def test_finalise_writes_again_when_a_retry_was_committed_meanwhile():
    store, shards = memory_store(), make_shards()
    complete(store, shards)
    store.delete("_eclipse/manifest.parquet")

    class Slow(Store):
        def write(self, key: str, data: bytes) -> None:
            super().write(key, data)
            if key.endswith("manifest.parquet"):
                commit(store, shards[1], generation=1, mended=True)

    manifest = finalise(Slow(store.url))
    assert manifest.statuses[1].generation == 1
    assert verify(store).ok


@pytest.mark.parametrize("idle", [False, True])
def test_cleaning_up_a_folder_that_holds_no_run_is_refused_and_takes_nothing(idle):
    store = memory_store()
    store.create("data/000001-0123456789abcdef.parquet", b"somebody else's table")
    # As evaluate leaves one.
    store.create("_eclipse/config.yaml", b"")
    with pytest.raises(InputError, match=r"no purified dataset here \(_eclipse/plan.parquet is missing\); name"):
        collect(store, idle)
    assert store.exists("data/000001-0123456789abcdef.parquet")
