"""Damage, odd names and wrong labels are noticed before or during reading, never silently ignored."""

import unicodedata
import uuid
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eclipse_ray import ledger
from eclipse_ray.datasets import published
from eclipse_ray.datasets.formats import open_source, read_parts
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.table import canonical_table, image_bytes, table_to_parquet
from eclipse_ray.datasets.write import convert
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import CONFIG, dump, fill, noise, read_all, refused, save, table_of, time_out
from tests.ledger.helpers import start

NOISE = noise(24)


def flipped(data: bytes, rng: np.random.Generator, low: int, high: int) -> bytes:
    """Return `data` with one random bit between the bytes `low` and `high` flipped."""
    damaged = bytearray(data)
    damaged[rng.integers(low, high)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def test_no_flipped_bit_of_an_input_parquet_goes_unnoticed(tmp_path):
    table = table_of(NOISE, [n % 3 for n in range(24)], classes=["a", "b", "c"])
    whole = table_to_parquet(table)
    file = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(400):
        file.write_bytes(flipped(whole, rng, 0, len(whole)))
        try:
            assert read_all(tmp_path).equals(table)
        except InputError:
            noticed += 1
    assert noticed > 350


NAMES = [
    unicodedata.normalize("NFC", "é.png"),
    unicodedata.normalize("NFD", "é.png"),
    "🙂.png",
    "a b.png",
    "a%2Fb.png",
    'it\'s "it".png',
    "new\nline.png",
    "A.png",
    "a.png",
    "x" * 251 + ".png",
    "ü" * 125 + "x.png",
    "#1?&=*[0].png",
    "back\\slash.png",
    " .png",
]


@pytest.fixture
def named(tmp_path):
    return fill(tmp_path / "src", *(f"k l'%/{name}" for name in NAMES), "z/0.png", images=NOISE)


def test_odd_names_keep_their_images(named, tmp_path):
    def contents(url):
        loaded = load_images(url, CONFIG)
        return dict(zip(loaded.ids, loaded.hashes(), strict=True))

    expected = contents(named)
    assert sorted(expected) == sorted([*(f"k l'%/{name}" for name in NAMES), "z/0.png"])
    assert len(set(expected.values())) == len(NAMES) + 1
    for layout in ("parquet", "webdataset", "npz"):
        convert(named, str(tmp_path / layout), CONFIG, layout)
        assert contents(str(tmp_path / layout)) == expected
    convert(str(tmp_path / "parquet"), str(tmp_path / "folder"), CONFIG, "folder")
    assert sorted(contents(str(tmp_path / "folder")).values()) == sorted(expected.values())


# Not of zip archives: where Python looks for their end, it takes any failure for another kind of file.
@pytest.mark.parametrize("name", ["a.npy", "a.pt", "a.pkl", "a.parquet"])
def test_a_time_out_is_no_damage(monkeypatch, tmp_path, name):
    file = tmp_path / name
    if name == "a.npy":
        np.save(file, NOISE)
    elif name == "a.parquet":
        file.write_bytes(table_to_parquet(table_of(NOISE)))
    elif name == "a.pt":
        save(file, torch.tensor(NOISE), zipped=False)
    else:
        dump(file, NOISE)
    store = Store(f"memory://time-outs-{tmp_path.name}")
    store.write(name, file.read_bytes())
    for reads in range(6):  # Of the header or footer, or of the pickle and the values behind it.
        with monkeypatch.context() as patched, suppress(TimeoutError):
            time_out(patched, 1, after=reads)
            published._open.cache_clear()
            assert read_all(store.url).num_rows == 24


def test_odd_names_survive_the_plan(named):
    source = open_source(named, CONFIG)
    store = Store(f"memory://names-{uuid.uuid4().hex}")
    shards = ledger.plan_shards(source.parts, 3)
    start(store, shards)
    assert ledger.read_plan(store).shards == shards
    for shard in shards:
        spans = [(span.key, span.start, span.stop) for span in shard.spans]
        rows = read_parts(source, spans)
        assert rows["id"].to_pylist() == [key for key, _, _ in spans]


def write_labels(folder, labels, **options):
    table = table_of(NOISE[:2], [0, 0], ["a", "b"], classes=["x", "y"])
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels, pa.int64())
    pq.write_table(table.set_column(2, "label", labels), folder / "x.parquet", **options)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 2], "x.parquet: label 2 is out of range, there are 2 classes"),
        ([-2, 1], "label -2 is out of range"),
        (pa.array([0, 1.5]), "labels are not whole numbers: Float value 1.5"),
    ],
)
def test_wrong_labels_are_named_before_a_run(tmp_path, labels, words):
    write_labels(tmp_path, labels)
    refused(tmp_path, words)


def test_labels_out_of_range_without_statistics_are_named_by_their_reader(tmp_path):
    write_labels(tmp_path, [0, 7], write_statistics=False)
    refused(tmp_path, "x.parquet: label 7 is out of range, there are 2 classes", reading=True)


def test_page_checksums_are_what_notices(tmp_path):
    # Without checksums most flips in uncompressed pixels go unnoticed. So it is they that the first test checks.
    encoded = [NOISE[n].tobytes() for n in range(8)]
    table = canonical_table([f"{n}" for n in range(8)], encoded)
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    whole = (tmp_path / "x.parquet").read_bytes()
    rng = np.random.default_rng(0)
    silent = 0
    for _ in range(30):
        (tmp_path / "x.parquet").write_bytes(flipped(whole, rng, 2000, len(whole) - 4000))
        with suppress(InputError):
            silent += image_bytes(read_all(tmp_path)) != encoded
    assert silent > 20
