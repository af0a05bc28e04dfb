"""Damage, odd names and wrong labels are noticed before or during reading, never silently ignored."""

import unicodedata
import uuid
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclipse_ray import ledger
from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source, read_parts, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import load_images, require_classes
from eclipse_ray.datasets.table import canonical_table, image_bytes, table_to_parquet
from eclipse_ray.datasets.write import convert, write_dataset
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store
from tests.ledger.helpers import part, start

CONFIG = DataConfig()
NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
PNG = encode_image(NOISE[0, :2, :2], "png")


def flipped(data: bytes, rng: np.random.Generator, low: int, high: int) -> bytes:
    """Return `data` with one random bit between the bytes `low` and `high` flipped."""
    damaged = bytearray(data)
    damaged[rng.integers(low, high)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def test_no_flipped_bit_of_an_input_parquet_goes_unnoticed(tmp_path):
    encoded = [encode_image(image, "png") for image in NOISE]
    table = canonical_table(
        [f"{n}" for n in range(24)], encoded, [n % 3 for n in range(24)], classes=["a", "b", "c"]
    )
    whole = table_to_parquet(table)
    file = tmp_path / "x.parquet"
    rng = np.random.default_rng(0)
    noticed = silent = 0
    for _ in range(400):
        file.write_bytes(flipped(whole, rng, 0, len(whole)))
        try:
            (rows,) = read_tables(open_source(str(tmp_path), CONFIG), CONFIG)
        except InputError:
            noticed += 1
            continue
        silent += not rows.equals(table)
    assert silent == 0
    assert noticed > 350


@pytest.mark.parametrize("encoding", ["jpeg:90", "png"])
def test_verify_notices_every_flipped_bit_of_an_output(encoding):
    store = Store(f"memory://flips-{uuid.uuid4().hex}")
    (shard,) = shards = ledger.plan_shards([part(f"{n}") for n in range(6)], 6)
    encoded = [encode_image(image, encoding) for image in NOISE[:6]]
    start(store, shards)
    status = ledger.commit_shard(
        store,
        shard,
        ok=table_to_parquet(canonical_table([f"{n}" for n in range(6)], encoded, [0] * 6)),
        ok_count=6,
        errors=[],
        input_sha256="0" * 64,
        seconds=1.0,
    )
    ledger.finalise(store)
    assert ledger.verify(store).ok
    assert status.object is not None
    whole = store.read(status.object)
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(1000):
        image = encoded[rng.integers(6)]
        # Noise does not compress, so the file contains the encoded bytes unchanged, and a piece of them is found.
        place = whole.find(image[-200:-100])
        low, high = (place, place + 100) if place >= 0 else (4, len(whole))
        store.write(status.object, flipped(whole, rng, low, high))
        missed += ledger.verify(store).ok
    assert missed == 0
    store.write(status.object, whole)
    assert ledger.verify(store).ok


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
    folder = tmp_path / "src" / "k l'%"
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(encode_image(NOISE[number], "png"))
    (tmp_path / "src" / "z").mkdir()
    (tmp_path / "src" / "z" / "0.png").write_bytes(encode_image(NOISE[len(NAMES)], "png"))
    return str(tmp_path / "src")


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


def test_odd_names_survive_the_plan(named):
    source = open_source(named, CONFIG)
    store = Store(f"memory://names-{uuid.uuid4().hex}")
    shards = ledger.plan_shards(source.parts, 3)
    start(store, shards)
    assert ledger.read_plan(store).shards == shards
    for shard in shards:
        spans = [(span.key, span.start, span.stop) for span in shard.spans]
        rows = read_parts(source.url, source.format, source.classes, spans, CONFIG)
        assert rows["id"].to_pylist() == [key for key, _, _ in spans]


def parquet(folder, labels, **options):
    table = canonical_table(["a", "b"], [PNG, PNG], labels, classes=["x", "y"])
    (folder / "x.parquet").write_bytes(table_to_parquet(table))


def without_statistics(folder, labels):
    table = canonical_table(["a", "b"], [PNG, PNG], labels, classes=["x", "y"])
    pq.write_table(table, folder / "x.parquet", write_statistics=False)


def floats(folder, labels):
    pq.write_table(pa.table({"image": [PNG, PNG], "label": pa.array(labels, pa.float64())}), folder / "x.parquet")


def test_labels_out_of_range_are_named_before_a_run(tmp_path):
    parquet(tmp_path, [0, 2])
    with pytest.raises(InputError, match=r"x\.parquet: label 2 is out of range, there are 2 classes"):
        open_source(str(tmp_path), CONFIG)
    parquet(tmp_path, [-2, 1])
    with pytest.raises(InputError, match="label -2 is out of range"):
        open_source(str(tmp_path), CONFIG)
    parquet(tmp_path, [-1, None])
    assert open_source(str(tmp_path), CONFIG).images == 2
    floats(tmp_path, [0, 1.5])
    with pytest.raises(InputError, match=r"labels are not whole numbers: Float value 1\.5"):
        open_source(str(tmp_path), CONFIG)
    parquet(tmp_path, [0, 1])
    with pytest.raises(InputError, match="no column 'fine'"):
        open_source(str(tmp_path), DataConfig(label_column="fine"))


def test_labels_out_of_range_without_statistics_are_named_by_their_reader(tmp_path):
    without_statistics(tmp_path, [0, 7])
    source = open_source(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match="image b: label 7 is out of range, there are 2 classes"):
        list(read_tables(source, CONFIG))


def test_missing_labels_are_named_by_whoever_needs_them(tmp_path):
    write_dataset(str(tmp_path / "s"), [canonical_table(["a"], [PNG], [None])], classes=["x"], source="test")
    assert open_source(str(tmp_path / "s"), CONFIG).images == 1
    with pytest.raises(InputError, match=r"has no labels .*data\.labels=FILE"):
        require_classes(str(tmp_path / "s"), open_source(str(tmp_path / "s"), CONFIG), CONFIG)


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
            (rows,) = read_tables(open_source(str(tmp_path), CONFIG), CONFIG)
            silent += image_bytes(rows) != encoded
    assert silent > 20
