"""The store on a real S3 server: races, names, parts, listings, leftovers."""

import os
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclipse_ray.errors import StorageError
from eclipse_ray.storage import s3
from eclipse_ray.storage.store import Store
from tests.storage.proxy import Fault
from tests.storage.servers import BUCKET, race
from tests.support import wait_until

MIB = 2**20


def prefix_of(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/")


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 5 MiB, the smallest size that S3 allows."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)


def test_a_real_server_passes_the_probe(s3_url):
    Store(s3_url).probe()
    assert list(Store(s3_url).list(hidden=True)) == []


def contend(store: Store, size: int) -> list[bool]:
    """Let 16 threads create one key with different bytes; return the winners."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda number: store.create("claim", bytes([number]) * size), range(16)))


@pytest.mark.parametrize("size", [10, 4 * MIB])
def test_one_of_sixteen_threads_creates_a_key(s3_url, small_parts, size):
    store = Store(s3_url)
    won = contend(store, size)
    assert won.count(True) == 1
    assert store.read("claim") == bytes([won.index(True)]) * size


@pytest.mark.chaos
def test_objects_in_parts_are_never_mixed_in_a_race(s3_url, small_parts):
    """SeaweedFS 4.48 checks the condition of a multipart upload first and completes it in a second step."""
    store = Store(s3_url)
    won = contend(store, 6 * MIB)
    data = store.read("claim")
    assert won[data[0]]
    assert data == bytes([data[0]]) * 6 * MIB
    assert not any(contend(store, 6 * MIB))
    assert store.abort_uploads() == 0


@pytest.mark.chaos
def test_one_of_eight_processes_creates_a_key(s3_url):
    race(s3_url, 8, "spawn")


NAMES = {
    "nfc": unicodedata.normalize("NFC", "é.png"),
    "nfd": unicodedata.normalize("NFD", "é.png"),
    "emoji": "🙂/🦎.png",
    "space": "a b/ c .png",
    "percent": "a%2Fb.png",
    "plus": "a+b&c=d?e#f.png",
    "newline": "a\nb.png",
    "lower": "case.png",
    "upper": "CASE.png",
    "long": "/".join(["0123456789" * 19] * 6)[: 1024 - 13],
    "hidden": "x/_y/.z",
    "folder": "o/1.png",
    "before": "o-p/1.png",
    "after": "o0/1.png",
}


def test_every_name_keeps_its_own_object(s3_url):
    store = Store(s3_url)
    assert len(f"{prefix_of(s3_url)}/{NAMES['long']}".encode()) == 1024
    for word, name in NAMES.items():
        assert store.create(name, word.encode()), word
    for word, name in NAMES.items():
        assert not store.create(name, b"second"), word
        assert store.read(name) == word.encode()
        assert store.entry(name).size == len(word)
    assert [entry.key for entry in store.list(hidden=True)] == sorted(NAMES.values())
    for name in NAMES.values():
        store.delete(name)
    assert list(store.list(hidden=True)) == []


def test_a_large_object_in_parts_is_read_back_whole_and_in_pieces(s3_url, small_parts):
    store = Store(s3_url)
    data = os.urandom(12 * MIB + 1)
    assert store.create("large", data)
    assert not store.create("large", b"small")
    assert not store.create("large", data)
    assert store.read("large") == data
    store.write("large", data[::-1])
    with store.open("large") as file:
        for start, size in ((0, 10), (5 * MIB - 3, 7), (12 * MIB - 5, 100), (12 * MIB + 1, 5), (100, 6 * MIB)):
            file.seek(start)
            assert file.read(size) == data[::-1][start : start + size]
    assert store.abort_uploads() == 0


def test_a_parquet_footer_costs_two_requests(proxy, faulty_url):
    store = Store(faulty_url)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": list(range(100_000))}), sink)
    store.write("t.parquet", sink.getvalue().to_pybytes())
    proxy.seen.clear()
    with store.open("t.parquet") as file:
        file.seek(-8, os.SEEK_END)
        file.read(8)
        assert pq.ParquetFile(file).metadata.num_rows == 100_000
    assert (proxy.count("^HEAD"), proxy.count("^GET")) == (1, 1)


def test_an_object_that_changes_while_it_is_read_is_not_mixed(s3_url):
    store = Store(s3_url)
    store.write("x", bytes(2 * MIB))
    with store.open("x") as file:
        file.read(10)
        store.write("x", b"1" * 2 * MIB)
        file.seek(MIB)
        with pytest.raises(StorageError, match="changed while it was read"):
            file.read(10)


def test_a_listing_takes_one_request_a_page(proxy, faulty_url, monkeypatch):
    monkeypatch.setattr(s3, "PAGE_ITEMS", 10)
    store = Store(faulty_url)
    keys = [f"{i % 7}/{i:05d}" for i in range(25)]
    for key in keys:
        store.write(key, b"")
    proxy.seen.clear()
    assert [entry.key for entry in store.list()] == sorted(keys)
    assert proxy.count("list-type=2") == 3
    # A transient error in the middle is retried, a permanent one is raised. A listing never ends early.
    proxy.faults.append(Fault("error", "continuation-token"))
    assert len(list(Store(faulty_url).list())) == len(keys)
    proxy.faults.append(Fault("error", "continuation-token", status=403, code="AccessDenied", times=9))
    with pytest.raises(StorageError, match="s3:ListBucket"):
        list(Store(faulty_url).list())
    assert proxy.fired["error"] >= 2


def test_our_own_success_whose_answer_was_lost_is_a_success(proxy, faulty_url, small_parts):
    store = Store(faulty_url)
    proxy.faults += [Fault("lose", "^PUT .*/small "), Fault("lose", "^POST .*/large.uploadId")]
    assert store.create("small", b"ours")
    assert store.create("large", bytes(6 * MIB))
    assert proxy.fired["lose"] == 2
    assert proxy.count("^PUT .*/small ") == 2
    assert store.read("large") == bytes(6 * MIB)
    assert not store.create("small", b"ours")
    assert store.abort_uploads() == 0


def test_another_writer_s_same_bytes_are_not_ours(proxy, faulty_url, seaweed):
    seaweed.client().put_object(Bucket=BUCKET, Key=f"{prefix_of(faulty_url)}/x", Body=b"same")
    proxy.faults.append(Fault("reset", "^PUT"))
    assert not Store(faulty_url).create("x", b"same")
    assert proxy.fired["reset"] == 1


def test_a_conflict_between_two_writers_is_tried_again(proxy, faulty_url):
    proxy.faults.append(Fault("error", "^PUT", times=2, status=409, code="ConditionalRequestConflict"))
    assert Store(faulty_url).create("x", b"1")
    assert proxy.fired["error"] == 2


def test_an_upload_that_somebody_aborts_is_begun_anew(proxy, faulty_url, small_parts):
    proxy.faults.append(Fault("error", "^PUT .*partNumber=2", status=404, code="NoSuchUpload"))
    store = Store(faulty_url)
    assert store.create("x", bytes(11 * MIB))
    assert proxy.fired["error"] == 1
    assert store.read("x") == bytes(11 * MIB)
    assert store.abort_uploads() == 0


UPLOAD = """
import sys
from eclipse_ray.storage import s3
from eclipse_ray.storage.store import Store
s3.PART_BYTES = 5 << 20
Store(sys.argv[1]).create("data/x", bytes(16 << 20))
"""


def test_an_upload_killed_in_the_middle_leaves_nothing_once_aborted(proxy, faulty_url, seaweed):
    proxy.faults.append(Fault("stall", "partNumber=3", seconds=30))
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, faulty_url])
    parts = ("partNumber=1", "partNumber=2")
    wait_until(lambda: proxy.fired["stall"] and all(map(proxy.count, parts)), "two of three parts", 60, process)
    process.kill()
    assert process.wait(30) == -9
    store = Store(faulty_url)
    assert list(store.list(hidden=True)) == []
    assert not store.exists("data/x")
    elsewhere = Store(faulty_url + "-elsewhere")
    assert elsewhere.abort_uploads() == 0
    assert store.abort_uploads("data") == 1
    uploads = seaweed.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert [upload for upload in uploads if upload["Key"].startswith(prefix_of(faulty_url))] == []
    assert store.abort_uploads() == 0
    assert store.create("data/x", b"1")
