"""Plan, claim, commit and manifest lose nothing and do nothing twice, whichever process dies at any time.

An output folder of another version is reported as such, with advice, and never called damaged.
"""

import json
import threading

import pyarrow as pa
import pytest

from eclipse_ray import __version__
from eclipse_ray.errors import InputError, ResumeError, StorageError
from eclipse_ray.ledger import (
    CHANGES_SCHEMA,
    ImageFailure,
    Status,
    commit_shard,
    finalise,
    layout,
    open_run,
    plan_digest,
    plan_shards,
    read_changes,
    read_plan,
    read_statuses,
    summarise,
    verify,
    write_changes,
)
from eclipse_ray.ledger.plan import SCHEMA, plan_bytes
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import (
    CONFIG,
    CrashError,
    CrashingStore,
    commit,
    complete,
    make_fingerprint,
    make_shards,
    memory_store,
    part,
    plan_of,
    start,
    table,
    written,
)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "out")) if request.param == "local" else memory_store()


def test_plan_cuts_tables_and_groups_images():
    parts = [part("a"), part("b"), part("t1", 5), part("empty", 0), part("t2", 2), part("c"), part("d"), part("e")]
    shards = plan_shards(parts, 2)
    cut = [(s.name, [(p.key, p.start, p.stop) for p in s.spans]) for s in shards]
    assert cut == [
        ("000000", [("a", 0, 1), ("b", 0, 1)]),
        ("000001", [("t1", 0, 2)]),
        ("000002", [("t1", 2, 4)]),
        ("000003", [("t1", 4, 5)]),
        ("000004", [("t2", 0, 2)]),
        ("000005", [("c", 0, 1), ("d", 0, 1)]),
        ("000006", [("e", 0, 1)]),
    ]
    assert sum(shard.rows for shard in shards) == sum(part.rows for part in parts)


def test_plan_refuses_doubled_names():
    with pytest.raises(InputError, match=r"^a.png: "):
        plan_shards([part("a.png"), part("a.png")], 2)
    with pytest.raises(ValueError, match="shard_images"):
        plan_shards([], 0)


def test_plan_round_trips(store):
    shards = plan_shards([part("ä 'q\"\n%2F.png"), part("t", 9, 77, "etag"), *map(part, "xyz")], 2)
    start(store, shards)
    assert read_plan(store) == plan_of(shards)
    assert plan_digest(read_plan(store).shards) == plan_digest(shards)


def test_complete_run_is_proved_and_finalise_is_idempotent(store):
    shards = make_shards()
    manifest = complete(store, shards)
    before = written(store)
    assert (manifest.ok, manifest.failed) == (9, 1)
    assert finalise(store) == manifest
    assert complete(store, shards) == manifest
    assert written(store) == before
    result = verify(store)
    assert (result.ok, result.planned, result.images, result.failed) == (True, 10, 9, 1), result
    named = {status.object for status in read_statuses(store).values() if status.object}
    assert named == {k for k in before if k.startswith("data/")}


def test_summary_while_running(store):
    shards = make_shards()
    with pytest.raises(InputError, match="no purified dataset"):
        summarise(store)
    start(store, shards)
    assert summarise(store).shards_done == 0
    commit(store, shards[1])
    now = summarise(store)
    assert (now.planned, now.ok, now.failed, now.shards, now.shards_done) == (10, 3, 1, 3, 1)
    with pytest.raises(InputError, match="2 of 3 shards"):
        finalise(store)
    result = verify(store)
    assert not result.ok
    assert "2 of 3 shards are not done" in result.mismatched[0]


def test_shard_without_ok_images(store):
    shards = plan_shards([part("a"), part("b")], 2)
    start(store, shards)
    errors = [ImageFailure(i, i, f"bad name caf\udce9 {i}") for i in "ab"]
    commit_shard(store, shards[0], ok=None, ok_count=0, errors=errors, input_sha256="0", seconds=1)
    finalise(store)
    assert verify(store).ok
    assert all(status.object is None for status in read_statuses(store).values())


def test_counts_must_add_up():
    store, shards = memory_store(), make_shards()
    start(store, shards)
    ids = [span.key for span in shards[0].spans]
    for ok, count in [(table(ids[1:]), 3), (table(ids[1:]), 4), (None, 4), (table([]), 0), (table(ids), 5)]:
        with pytest.raises(ValueError, match="shard 000000"):
            commit_shard(store, shards[0], ok=ok, ok_count=count, errors=[], input_sha256="0", seconds=1)
    assert not [key for key in written(store) if key.startswith(("data/", "_eclipse/status"))]


def test_status_refuses_names_that_lead_elsewhere():
    store, shards = memory_store(), make_shards()
    start(store, shards)
    tree = commit(store, shards[0]).model_dump()
    assert Status.model_validate_json(Status(**tree).model_dump_json()) == Status(**tree)
    for change in [{"object": "../../etc/passwd"}, {"object": None}, {"ok": 0}, {"shard": "../x"}, {"extra": 1}]:
        with pytest.raises(ValueError, match="validation error"):
            Status(**{**tree, **change})


def test_second_generation_wins_and_the_first_is_swept_away(store):
    shards = make_shards()
    first = complete(store, shards)
    second = commit(store, shards[1], salt=7, generation=10)
    commit(store, shards[1], salt=9, generation=2)
    assert read_statuses(store)["000001"] == second
    assert not verify(store).ok, "the manifest is of the first generation"
    assert finalise(store).statuses[1] == second
    assert verify(store).ok
    assert not store.exists(str(first.statuses[1].object))
    assert store.exists("_eclipse/status/000001/0.json"), "statuses are kept"
    mended = commit(store, shards[1], generation=11, mended=True)
    assert (mended.ok, mended.failed) == (4, 0)
    finalise(store)
    assert verify(store).ok
    assert not store.exists(str(second.errors_object))


class Gate(Store):
    """Makes every thread wait before it writes the status until all threads have arrived."""

    barrier: threading.Barrier

    def create(self, key: str, data: bytes) -> bool:
        if key.startswith("_eclipse/status"):
            self.barrier.wait(30)
        return super().create(key, data)


def test_racing_committers_agree_on_one_status(store):
    shards = make_shards()
    start(store, shards)
    gate, found = Gate(store.url), []
    gate.barrier = threading.Barrier(8)
    threads = [
        threading.Thread(target=lambda salt=salt: found.append(commit(gate, shards[0], salt))) for salt in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len([key for key in written(store) if key.startswith("data/")]) == 8
    complete(store, shards)
    assert verify(store).ok
    assert len([key for key in written(store) if key.startswith("data/")]) == 3


def test_committed_shard_is_not_written_again():
    store, shards = memory_store(), make_shards()
    start(store, shards)
    won = commit(store, shards[0])
    before = written(store)
    assert commit(store, shards[0], salt=3) == won
    assert written(store) == before


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_crash_at_every_change_then_resume(kind, after, tmp_path):
    def fresh(number):
        return str(tmp_path / str(number)) if kind == "local" else memory_store().url

    shards = make_shards()
    undisturbed = Store(fresh("whole"))
    counter = CrashingStore(undisturbed.url)
    complete(counter, shards)
    expected = written(undisturbed)
    assert counter.changes >= 11
    for at in range(counter.changes):
        store = Store(fresh(at))
        with pytest.raises(CrashError):
            complete(CrashingStore(store.url, at, after), shards)
        complete(store, shards)
        assert written(store) == expected, at
        assert verify(store).ok, at


def test_finalise_leaves_what_others_put_there():
    store, shards = memory_store(), make_shards()
    complete(store, shards)
    store.write("data/readme.txt", b"mine")
    finalise(store)
    assert store.read("data/readme.txt") == b"mine"
    assert any("readme.txt" in sentence for sentence in verify(store).mismatched)


@pytest.mark.parametrize("key", ["photo.png", "data/x.parquet", "_eclipse/plan.parquet"])
def test_foreign_folder_is_refused(store, key):
    store.write(key, b"mine")
    with pytest.raises(ResumeError, match="did not write"):
        start(store, make_shards())
    assert list(written(store)) == [key]


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_bytes(b"x")
    with pytest.raises(InputError, match="this is a file"):
        start(Store(str(tmp_path / "out")), make_shards())


def test_changes_are_refused_with_a_readable_difference(store):
    shards = make_shards()
    start(store, shards)
    before = written(store)
    config = {"purify": {"t_star": 150, "levels": [1, 2]}, "run": {"seed": 0}}
    for change, line in [
        ({"config": config}, "purify.t_star: 100 -> 150"),
        ({"weights": "w2"}, "weights: 'w1' -> 'w2'"),
        ({"engine_version": 2}, "engine_version: 1 -> 2"),
    ]:
        with pytest.raises(ResumeError) as refused:
            open_run(store, plan_of(shards), make_fingerprint(shards, **change), "")
        assert str(refused.value).splitlines()[1:] == [f"  {line}"]
    assert written(store) == before


def test_changed_input_is_refused_naming_the_objects():
    store = memory_store()
    start(store, plan_shards([part("a"), part("b"), part("c", 4)], 2))
    changed = plan_shards([part("a", version="v2"), part("c", 3), part("d")], 2)
    with pytest.raises(ResumeError) as refused:
        start(store, changed)
    lines = str(refused.value).splitlines()[1:]
    assert lines[0].startswith("  input: ")
    assert lines[1:] == [
        "  input a: 1 rows in 10 bytes, version v1 -> 1 rows in 10 bytes, version v2",
        "  input b: 1 rows in 10 bytes, version v1 -> absent",
        "  input c: 4 rows in 10 bytes, version v1 -> 3 rows in 10 bytes, version v1",
        "  input d: absent -> 1 rows in 10 bytes, version v1",
    ]


def test_resume_keeps_the_first_config(store):
    shards = make_shards()
    for config, text in ((CONFIG, "run: {progress_seconds: 1}\n"), (dict(CONFIG), "run: {}\n")):
        open_run(store, plan_of(shards), make_fingerprint(shards, config=config), text)
    assert store.read("_eclipse/config.yaml") == b"run: {progress_seconds: 1}\n"


def test_fingerprint_must_be_of_the_plan():
    shards = make_shards()
    with pytest.raises(ValueError, match="plan_digest"):
        open_run(memory_store(), plan_of(shards), make_fingerprint(shards, input="other"), "")


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"value": 1}', b"\xff"])
def test_damaged_records_are_named(damage):
    store, shards = memory_store(), make_shards()
    complete(store, shards)
    store.write("_eclipse/status/000001/0.json", damage)
    with pytest.raises(StorageError, match=r"000001/0\.json: damaged"):
        read_statuses(store)
    store.write("_eclipse/fingerprint.json", damage)
    with pytest.raises(InputError, match="damaged"):
        start(store, shards)
    store.write("_eclipse/plan.parquet", damage)
    with pytest.raises(InputError, match="damaged"):
        read_plan(store)
    assert len(verify(store).mismatched) >= 3


def test_the_changes_of_a_shard_are_those_of_all_its_generations(tmp_path):
    store = Store(str(tmp_path))
    status = {"object": None, "sha256": None, "bytes": 0, "ok": 0, "failed": 0, "seconds": 1}
    status |= {"errors_object": None, "errors_sha256": None, "input_sha256": ""}
    statuses = [Status(shard=f"00000{shard}", generation=1, **status) for shard in (0, 1)]

    def write(shard: str, generation: int, **decibels: float | None) -> None:
        rows = [{"id": name, "label": 3, "psnr": value} for name, value in decibels.items()]
        write_changes(store, shard, generation, pa.Table.from_pylist(rows, CHANGES_SCHEMA))

    write("000000", 0, a=30.0, b=None, c=None)
    write("000000", 1, b=20.0, c=None)
    # Generation 0 of this shard is of a version that recorded nothing, so that half of it would mislead.
    write("000001", 1, d=10.0)
    found = read_changes(store, statuses)
    assert list(zip(*(found[name].to_pylist() for name in ("shard", "id", "psnr")), strict=True)) == [
        ("000000", "a", 30.0),
        ("000000", "b", 20.0),
        ("000000", "c", None),
    ]
    store.write("_eclipse/changes/000000/1.parquet", b"cut off")
    with pytest.raises(StorageError, match=r"000000/1.parquet: cannot be read .*; delete it"):
        read_changes(store, statuses)


def test_a_plan_from_before_versions_were_noted(tmp_path):
    store = Store(str(tmp_path))
    rows = [["000000"], ["a.png"], [0], [1], [9], ["v"]]
    bare = pa.table([pa.array(row, field.type) for row, field in zip(rows, SCHEMA, strict=True)], schema=SCHEMA)
    store.write(layout.PLAN, layout.table_bytes(bare))
    with pytest.raises(InputError, match=r"made by an eclipse_ray older than 0\.1\.0") as caught:
        read_plan(store)
    assert "another folder" in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_a_plan_of_a_later_version_names_it(tmp_path):
    store = Store(str(tmp_path))
    note = json.dumps({"shard_images": 4, "classes": None, "made_by": "9.1"})
    later = pa.table({"shard": ["000000"], "blob": ["x"]}).replace_schema_metadata({b"eclipse_ray": note.encode()})
    store.write(layout.PLAN, layout.table_bytes(later))
    with pytest.raises(InputError, match=rf"made by eclipse_ray 9\.1, .*{__version__} cannot read"):
        read_plan(store)


def test_a_plan_notes_who_made_it():
    data = plan_bytes(make_shards(), 2)
    note = json.loads(layout.open_parquet(data).schema_arrow.metadata[b"eclipse_ray"])
    assert note["made_by"] == __version__
