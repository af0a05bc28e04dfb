import io
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import parquet
from eclipse_ray.datasets.formats import open_source, read_labels, read_parts
from eclipse_ray.datasets.images import decode_image, encode_image
from eclipse_ray.datasets.parquet import refuse_repeated_ids
from eclipse_ray.datasets.table import canonical_table, image_bytes, table_to_parquet
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

CONFIG = DataConfig()
PNG = encode_image(np.full((2, 3, 3), 7, np.uint8), "png")


def put(folder, name, table):
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / name)
    return str(folder)


def read_all(url, config=CONFIG):
    source = open_source(url, config)
    spans = [(part.key, 0, part.rows) for part in source.parts]
    return read_parts(source.url, source.format, source.classes, spans, config)


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.text(max_size=8), min_size=1, max_size=20, unique=True),
    data=st.data(),
)
def test_canonical_tables_survive_the_file(tmp_path_factory, ids, data):
    folder = tmp_path_factory.mktemp("canonical")
    count = len(ids)
    encoded = data.draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
    labels = data.draw(st.lists(st.none() | st.integers(0, 9), min_size=count, max_size=count))
    extras = pa.table({"weight": list(range(count)), "tags": [["a"]] * count})
    table = canonical_table(ids, encoded, labels, extras, [str(n) for n in range(10)])
    (folder / "a.parquet").write_bytes(table_to_parquet(table))
    again = read_all(str(folder))
    assert again.equals(table)
    assert open_source(str(folder), CONFIG).classes == [str(n) for n in range(10)]


def test_hugging_face_file_gets_ids_by_row(tmp_path):
    table = pa.table(
        {"img": [{"bytes": PNG, "path": f"{n}.png"} for n in range(5)], "fine": pa.array(range(5), pa.int8())}
    )
    url = put(tmp_path / "hf", "x.parquet", table)
    config = DataConfig(image_column="img", label_column="fine")
    source = open_source(url, config)
    rows = read_parts(source.url, source.format, source.classes, [("x.parquet", 3, 5)], config)
    assert rows["id"].to_pylist() == ["x.parquet#3", "x.parquet#4"]
    assert rows["label"].to_pylist() == [3, 4]
    assert rows["image"].to_pylist()[0] == {"bytes": PNG, "path": "3.png"}
    assert rows.column_names == ["id", "image", "label"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_images_without_labels(tmp_path, kind):
    url = put(tmp_path / "plain", "x.parquet", pa.table({"image": pa.array([PNG, None], kind)}))
    rows = read_all(url)
    assert rows.column_names == ["id", "image"]
    assert image_bytes(rows) == [PNG, b""]


def test_missing_struct_reads_as_no_bytes(tmp_path):
    kind = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    url = put(
        tmp_path / "s", "x.parquet", pa.table({"image": pa.array([None, {"bytes": PNG, "path": "p"}], kind)})
    )
    assert read_all(url)["image"].to_pylist() == [{"bytes": b"", "path": None}, {"bytes": PNG, "path": "p"}]


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 40), length=st.integers(1, 40), group=st.integers(1, 17))
def test_any_row_range_across_row_groups(tmp_path_factory, start, length, group):
    folder = tmp_path_factory.mktemp("groups")
    stop = min(41, start + length)
    pq.write_table(
        canonical_table([str(n) for n in range(41)], [b"x"] * 41), folder / "a.parquet", row_group_size=group
    )
    rows = read_parts(str(folder), "parquet", None, [("a.parquet", start, stop)], CONFIG)
    assert rows["id"].to_pylist() == [str(n) for n in range(start, stop)]


def test_columns_that_do_not_fit_say_what_to_do(tmp_path):
    def refused(name, table, config=CONFIG):
        with pytest.raises(InputError) as caught:
            open_source(put(tmp_path / name, "x.parquet", table), config)
        return str(caught.value)

    message = refused("a", pa.table({"Images": [PNG], "label": [1]}))
    assert "Images, label" in message
    assert "data.image_column=Images" in message
    for label in (1.5, "1.5", "", [1, 2]):
        assert "labels" in refused(f"b{label}", pa.table({"image": [PNG], "label": [label]}))
    assert "whole numbers or names" in refused("b", pa.table({"image": [PNG], "label": [{"a": 1}]}))
    assert "encoded images" in refused("c", pa.table({"image": ["path.png"]}))
    message = refused("d", pa.table({"image": [PNG], "fine_label": [1]}), DataConfig(label_column="fine"))
    assert "data.label_column=fine_label" in message
    message = refused("e", pa.table({"img": [PNG], "image": [PNG]}), DataConfig(image_column="img"))
    assert "rename" in message


def test_missing_ids_are_refused(tmp_path):
    url = put(tmp_path / "ids", "x.parquet", pa.table({"id": ["a", None], "image": [PNG, PNG]}))
    with pytest.raises(InputError, match="empty cells"):
        read_all(url)


class Canary(pa.ExtensionType):
    """An extension type whose reader must never run."""

    built = 0

    def __init__(self):
        super().__init__(pa.binary(), "eclipse.canary")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        cls.built += 1
        return cls()


@pytest.mark.parametrize("padding", range(6))
def test_extension_types_are_refused_before_they_are_built(tmp_path, padding):
    extension = Canary()
    column = pa.ExtensionArray.from_storage(extension, pa.array([b"x"], pa.binary()))
    # Each padding shifts the mark to another offset in its base64 form.
    url = put(tmp_path / "ext", "x.parquet", pa.table({"image": [PNG], "p" * (padding + 1): column}))
    pa.register_extension_type(extension)
    before = Canary.built
    try:
        with pytest.raises(InputError, match="extension type"):
            open_source(url, CONFIG)
        with pytest.raises(InputError, match="extension type"):
            read_parts(url, "parquet", None, [("x.parquet", 0, 1)], CONFIG)
    finally:
        pa.unregister_extension_type("eclipse.canary")
    assert Canary.built == before


def test_flipped_bits_are_noticed(tmp_path):
    rng = np.random.default_rng(0)
    encoded = [rng.bytes(500) for _ in range(40)]
    whole = table_to_parquet(canonical_table([str(n) for n in range(40)], encoded, [0] * 40))
    file = tmp_path / "x.parquet"
    file.write_bytes(whole)
    expected = read_all(str(tmp_path))
    silent = 0
    for place in rng.integers(4, len(whole), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        with suppress(InputError):
            silent += not read_all(str(tmp_path)).equals(expected)
    assert silent <= 1  # Only a footer has no checksum: a flipped name of a column is a different column.


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 40 + b"PAR1", b"x" * 100])
def test_what_is_no_parquet_file_is_refused(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet"):
        open_source(str(tmp_path), CONFIG)


def test_real_cifar(shared_data):
    source = open_source(str(shared_data / "cifar10" / "test-*.parquet"), CONFIG)
    assert source.images == 10_000
    assert source.classes is not None
    assert source.classes[3] == "cat"
    rows = read_parts(source.url, source.format, source.classes, [(source.parts[0].key, 1500, 1503)], CONFIG)
    assert rows["id"].to_pylist() == [f"test-00000-of-00001.parquet#{n}" for n in (1500, 1501, 1502)]
    assert decode_image(image_bytes(rows)[0], 10_000).shape == (32, 32, 3)


def test_hugging_face_datasets_reads_what_we_write(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    table = canonical_table(["a", "b"], [PNG, PNG], [1, 0], pa.table({"score": [0.5, 1.5]}), ["cat", "dog"])
    (tmp_path / "x.parquet").write_bytes(table_to_parquet(table))
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded.features["label"].names == ["cat", "dog"]
    assert loaded[0]["id"] == "a"
    assert loaded[1]["score"] == 1.5
    assert np.array_equal(np.asarray(loaded[0]["image"]), decode_image(PNG, 100))
    written = io.BytesIO()
    loaded.to_parquet(written)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "y.parquet").write_bytes(written.getvalue())
    back = read_all(str(tmp_path / "back"))
    assert back.drop_columns("image").equals(table.drop_columns("image"))
    assert image_bytes(back) == [PNG, PNG]


def test_a_column_name_that_is_no_text_is_damage(tmp_path):
    whole = table_to_parquet(canonical_table(["a"], [PNG], [0], pa.table({"weight": [1]})))
    damaged = whole.replace(b"weight", b"we\xa0ght")
    (tmp_path / "x.parquet").write_bytes(damaged)
    with pytest.raises(InputError, match=r"x\.parquet"):
        read_all(str(tmp_path))


@pytest.mark.parametrize("first", [None, "0.png"])
def test_a_path_without_bytes_is_refused_by_column_and_row_wherever_it_is(tmp_path, first):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": PNG, "path": first}] * 3 + [{"bytes": None, "path": "/home/me/3.png"}]
    put(tmp_path, "a.parquet", pa.table({"image": pa.array(rows, kind)}))
    with pytest.raises(InputError, match=r"'image' holds a path \(/home/me/3\.png\) and no bytes in row 3; embed"):
        read_all(str(tmp_path))


def test_a_path_without_bytes_is_found_before_a_run_if_the_other_images_have_paths(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": PNG, "path": "0.png"}, None, {"bytes": None, "path": "2.png"}]
    url = put(tmp_path, "a.parquet", pa.table({"image": pa.array(rows, kind)}))
    with pytest.raises(InputError, match=r"\(2\.png\) and no bytes in row 2"):
        open_source(url, CONFIG)


@pytest.mark.parametrize(
    ("stored", "labels", "classes"),
    [
        (pa.array(["cat", "dog", None, "cat"]), [0, 1, None, 0], ["cat", "dog"]),
        (pa.array(["dog", "cat", "dog", "dog"]).dictionary_encode(), [1, 0, 1, 1], ["cat", "dog"]),
        (pa.array(["c10", "c2", "c1", "c2"], pa.large_string()), [2, 1, 0, 1], ["c1", "c2", "c10"]),
        (pa.array(["10", "2", None, "0"]), [10, 2, None, 0], None),
        (pa.array([0.0, None, float("nan"), 3.0], from_pandas=False), [0, None, None, 3], None),
        (pa.array([[4], [3], [0], [1]]), [4, 3, 0, 1], None),
    ],
)
def test_labels_may_be_names_whole_floats_or_lists_of_one(tmp_path, stored, labels, classes):
    url = put(tmp_path, "a.parquet", pa.table({"image": [PNG] * 4, "label": stored}))
    source = open_source(url, CONFIG)
    assert (source.classes, read_all(url)["label"].to_pylist()) == (classes, labels)
    assert read_labels(source, CONFIG).tolist() == [-1 if label is None else label for label in labels]


def test_names_of_classes_are_those_of_all_files(tmp_path):
    put(tmp_path, "a.parquet", pa.table({"image": [PNG], "label": ["dog"]}))
    put(tmp_path, "b.parquet", pa.table({"image": [PNG], "label": ["cat"]}))
    source = open_source(str(tmp_path), CONFIG)
    assert (source.classes, read_labels(source, CONFIG).tolist()) == (["cat", "dog"], [1, 0])
    put(tmp_path, "c.parquet", pa.table({"image": [PNG], "label": [0]}))
    with pytest.raises(InputError, match=r"labels of c\.parquet are numbers and those of other files are names"):
        open_source(str(tmp_path), CONFIG)


def test_names_of_classes_have_no_meaning_beside_data_labels(tmp_path):
    url = put(tmp_path, "a.parquet", pa.table({"image": [PNG], "label": ["dog"]}))
    assert read_all(url, DataConfig(labels="none")).column_names == ["id", "image"]


def test_ids_that_occur_twice_are_named_with_their_files(tmp_path):
    def write(name, ids):
        table = pa.table({"id": ids, "image": [{"bytes": PNG, "path": None}] * len(ids)})
        pq.write_table(table, tmp_path / name)

    store = Store(str(tmp_path))
    write("x.parquet", ["a", "b", "c"])
    write("y.parquet", ["d", "e", None])
    refuse_repeated_ids(store, ["x.parquet", "y.parquet"])
    write("y.parquet", ["d", "b"])
    with pytest.raises(InputError, match=r"id 'b' occurs twice, in x.parquet and y.parquet; .*drop the column id"):
        refuse_repeated_ids(store, ["x.parquet", "y.parquet"])
    write("x.parquet", ["a", "a"])
    with pytest.raises(InputError, match=r"id 'a' occurs twice, in x.parquet and x.parquet"):
        refuse_repeated_ids(store, ["x.parquet"])


def test_a_row_group_that_every_shard_would_read_is_named_at_the_listing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parquet, "WIDE_GROUP", 20_000)
    table = pa.table({"image": [{"bytes": bytes([n]) * 5000, "path": None} for n in range(8)]})
    pq.write_table(table, tmp_path / "narrow.parquet", row_group_size=2, compression="none", use_dictionary=False)
    open_source(str(tmp_path), DataConfig())
    assert "row group" not in capsys.readouterr().err
    pq.write_table(table, tmp_path / "wide.parquet", compression="none", use_dictionary=False)
    open_source(str(tmp_path), DataConfig())
    assert "wide.parquet: each shard reads a whole row group, and one has 8 images" in capsys.readouterr().err
