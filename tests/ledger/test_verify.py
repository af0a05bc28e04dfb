"""`verify` finds every kind of damage and reports it without raising."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.ledger import finalise, plan_shards, read_statuses, verify
from eclipse_ray.ledger.layout import table_bytes
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import commit, commit_ids, complete, make_shards, memory_store, part, start, table

_FLIPS = 200


def test_every_bit_flip_is_found():
    store = memory_store()
    complete(store, make_shards())
    key = read_statuses(store)["000000"].object
    whole = store.read(key)
    generator = random.Random(5)
    for number in range(_FLIPS):
        flipped = bytearray(whole)
        flipped[len(whole) * number // _FLIPS] ^= 1 << generator.randrange(8)
        store.write(key, bytes(flipped))
        result = verify(store)
        assert not result.ok, number
        assert result.mismatched == [sentence for sentence in result.mismatched if key in sentence]
        assert result.images == 5
    store.write(key, whole)
    assert verify(store).ok


@pytest.mark.parametrize("name", ["plan.parquet", "manifest.parquet", "fingerprint.json"])
def test_truncated_or_missing_records_are_found(name):
    store = memory_store()
    complete(store, make_shards())
    key = f"_eclipse/{name}"
    whole = store.read(key)
    for torn in (whole[:-2], whole[: len(whole) // 2], b""):
        store.write(key, torn)
        assert any(name in sentence for sentence in verify(store).mismatched)
    store.delete(key)
    assert not verify(store).ok


def test_plan_of_another_run_is_found():
    store, other = memory_store(), memory_store()
    complete(store, make_shards())
    start(other, make_shards(12))
    store.write("_eclipse/plan.parquet", other.read("_eclipse/plan.parquet"))
    assert any("fingerprint" in sentence for sentence in verify(store).mismatched)


@pytest.mark.parametrize("which", ["object", "errors_object"])
def test_missing_or_damaged_object_is_found_and_can_be_redone(tmp_path, which):
    store, shards = Store(str(tmp_path)), make_shards()
    complete(store, shards)
    key = getattr(read_statuses(store)["000001"], which)
    store.delete(key)
    for words in (f"{key}: missing; delete _eclipse/status/000001 and run", key):
        (found,) = verify(store).mismatched
        assert words in found
        if words != key:
            with pytest.raises(StorageError, match=words):
                finalise(store)
            assert not store.exists("_eclipse/manifest.parquet")
        store.delete("_eclipse/status/000001/0.json")
        complete(store, shards)
        assert verify(store).ok
        store.write(key, b"x")


@pytest.mark.parametrize(
    "key", ["object", "errors_object", "manifest.parquet", "plan.parquet", "fingerprint.json"]
)
def test_a_folder_in_the_place_of_a_file_is_found_and_can_be_mended(tmp_path, key):
    store, shards = Store(str(tmp_path)), make_shards()
    complete(store, shards)
    file = tmp_path / (getattr(read_statuses(store)["000001"], key, None) or f"_eclipse/{key}")
    kept = file.read_bytes()
    file.unlink()
    file.mkdir()
    said = f"{file}: is a folder where a file should be; name a file, or move the folder elsewhere (EISDIR"
    (found,) = (sentence for sentence in verify(store).mismatched if sentence.startswith(said))
    assert ("then delete _eclipse/status/000001 and run the same command again" in found) == ("object" in key)
    file.rmdir()
    file.write_bytes(kept)
    assert verify(store).ok


def test_a_folder_in_the_place_of_a_status_is_named_by_verify_and_by_the_run(tmp_path):
    store, shards = Store(str(tmp_path)), make_shards()
    complete(store, shards)
    (tmp_path / "_eclipse/status/000001/0.json").unlink()
    (tmp_path / "_eclipse/status/000001/0.json").mkdir()
    missing, named, _ = verify(store).mismatched
    assert "the first of them 000001; run the same command again" in missing
    assert "000001/0.json: is a folder where a file should be" in named
    with pytest.raises(InputError, match=r"000001/0\.json: is a folder where a file should be; name a file"):
        complete(store, shards)


def test_an_object_that_cannot_be_read_is_found_and_said_once(tmp_path, monkeypatch):
    store, shards = Store(str(tmp_path)), make_shards()
    complete(store, shards)
    keys = {read_statuses(store)["000001"].object, "_eclipse/status/000002/0.json"}
    genuine = Store.read

    def read(self, key=""):
        if key in keys:
            raise OSError(5, "the server is away")
        return genuine(self, key)

    monkeypatch.setattr(Store, "read", read)
    for key in keys:
        (found,) = (sentence for sentence in verify(store).mismatched if key in sentence)
        assert found.startswith(f"{tmp_path}/{key}: cannot be read: [Errno 5] the server is away; check the store")


def test_extra_object_is_found():
    store = memory_store()
    complete(store, make_shards())
    store.write("data/000000-0123456789abcdef.parquet", table(["img-0000.png"]))
    result = verify(store)
    assert len(result.mismatched) == 1
    assert "no status names" in result.mismatched[0]
    assert result.images == 9


def test_status_of_an_unplanned_shard_is_found():
    store, shards = memory_store(), make_shards()
    complete(store, shards)
    commit(store, make_shards(30)[-1])
    assert any("no such shard" in sentence for sentence in verify(store).mismatched)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (["a", "a"], ["c"]),  # within the object
        (["a", "b"], ["a"]),  # both purified and failed
        (["a", "x"], ["c"]),  # in another shard, see below
    ],
)
def test_doubled_id_is_found(good, bad):
    store = memory_store()
    shards = plan_shards([part(name) for name in "abcx"], 3)
    start(store, shards)
    commit_ids(store, shards[0], good, bad)
    commit_ids(store, shards[1], ["x"])
    finalise(store)
    result = verify(store)
    assert (result.planned, result.images, result.failed) == (4, 3, 1)
    assert len(result.mismatched) == 1
    assert "1 ids occur elsewhere" in result.mismatched[0]


def test_unreadable_table_with_the_right_hash_is_found():
    store = memory_store()
    shards = plan_shards([part("a"), part("b")], 2)
    start(store, shards)
    whole = table(["a", "b"])
    damaged = bytearray(whole)
    damaged[pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(0).column(0).data_page_offset + 40] ^= 1
    commit_ids(store, shards[0], bytes(damaged))
    finalise(store)
    assert any("not a readable table" in sentence for sentence in verify(store).mismatched)


def test_table_without_ids_is_found():
    store = memory_store()
    shards = plan_shards([part("a"), part("b")], 2)
    start(store, shards)
    nameless = table_bytes(pq.read_table(pa.BufferReader(table(["a", "b"]))).drop(["id"]))
    tables = [(nameless, "`id` column"), (table(["a", None]), "1 image without an id")]
    for generation, (ok, words) in enumerate(tables):
        commit_ids(store, shards[0], ok, generation=generation)
        finalise(store)
        assert any(words in sentence for sentence in verify(store).mismatched)
