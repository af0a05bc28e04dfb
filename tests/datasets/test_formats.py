import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import chunk_spans, open_source, read_parts, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import Part, canonical_table, table_to_parquet
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store

CONFIG = DataConfig()
PNG = encode_image(np.zeros((2, 2, 3), np.uint8), "png")


def parquet(*ids, **extras):
    return table_to_parquet(canonical_table(list(ids), [PNG] * len(ids), [0] * len(ids), **extras))


def test_nothing_there_says_so(tmp_path):
    with pytest.raises(InputError, match="nothing here"):
        open_source(str(tmp_path / "absent"), CONFIG)
    with pytest.raises(InputError, match="no file matches"):
        open_source(str(tmp_path / "*.parquet"), CONFIG)
    with pytest.raises(InputError, match="found 0 files"):
        open_source(str(tmp_path), CONFIG)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="found 1 files"):
        open_source(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match="cannot open"):
        open_source("nosuchscheme://bucket/x", CONFIG)


def test_a_file_without_rows_is_an_empty_source(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet())
    with pytest.raises(InputError, match="no images in it"):
        open_source(str(tmp_path), CONFIG)


def test_two_kinds_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet("a"))
    (tmp_path / "b.png").write_bytes(PNG)
    with pytest.raises(InputError, match=r"1 parquet \(a.parquet\), 1 folder \(b.png\)"):
        open_source(str(tmp_path), CONFIG)


def test_splits_are_read_one_at_a_time(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(name))
    with pytest.raises(InputError, match=r"more than one split: test \(.*/test-\*\.parquet'"):
        open_source(str(tmp_path), CONFIG)
    assert len(open_source(f"{tmp_path}/train-*.parquet", CONFIG).parts) == 2
    one = open_source(f"{tmp_path}/test-00000-of-00001.parquet", CONFIG)
    assert [part.key for part in one.parts] == ["test-00000-of-00001.parquet"]
    assert one.parts[0].version == str((tmp_path / one.parts[0].key).stat().st_mtime_ns)


@pytest.mark.parametrize("word", ["validation", "dev", "test", "eval"])
def test_a_split_is_recognised_anywhere_in_a_name(tmp_path, word):
    for name in ("imagenet1k-train-000000", f"imagenet1k-{word}-000000"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(name))
    first = min("train", word)
    with pytest.raises(InputError, match=rf"more than one split: .*/imagenet1k-{first}-\*\.parquet'"):
        open_source(str(tmp_path), CONFIG)
    assert open_source(f"{tmp_path}/imagenet1k-{first}-*.parquet", CONFIG).images == 1


def test_files_that_name_different_classes_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet("a", classes=["cat", "dog"]))
    (tmp_path / "b.parquet").write_bytes(parquet("b", classes=["dog", "cat"]))
    with pytest.raises(InputError, match=r"a\.parquet and b\.parquet name different classes \(cat, dog and"):
        open_source(str(tmp_path), CONFIG)


def test_a_link_to_a_missing_file_is_named(tmp_path):
    (tmp_path / "a.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"link to a missing file: .*a\.parquet"):
        open_source(str(tmp_path), CONFIG)


def test_cifar_splits_are_read_one_at_a_time(tmp_path):
    content = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]})
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"data_batch_\*'"):
        open_source(str(tmp_path), CONFIG)
    assert open_source(f"{tmp_path}/data_batch_*", CONFIG).images == 2


def test_output_of_purify_reads_as_its_data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "_eclipse").mkdir()
    (tmp_path / "data" / "00000-abc.parquet").write_bytes(parquet("a", "b"))
    (tmp_path / "_eclipse" / "plan.parquet").write_bytes(b"not read")
    (tmp_path / "_eclipse" / "manifest.parquet").write_bytes(b"not read")
    source = open_source(str(tmp_path), CONFIG)
    assert [part.key for part in source.parts] == ["data/00000-abc.parquet"]


def test_a_source_works_elsewhere(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet("a", "b", classes=["cat"]))
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path), CONFIG)))
    rows = read_parts(source.url, source.format, source.classes, [("a.parquet", 1, 2)], CONFIG)
    assert rows["id"].to_pylist() == ["b"]


def test_memory_filesystem():
    store = Store("memory://formats/set")
    store.write("data/a.parquet", parquet("a", "b"))
    source = open_source("memory://formats/set", CONFIG)
    assert [table["id"].to_pylist() for table in read_tables(source, CONFIG)] == [["a", "b"]]
    assert open_source("memory://formats/set/data/a.parquet", CONFIG).parts[0].key == "a.parquet"
    assert open_source("memory://formats/set/data/*.parquet", CONFIG).parts[0].key == "a.parquet"


def test_files_with_other_columns_join_or_say_why(tmp_path):
    import pyarrow as pa

    (tmp_path / "a.parquet").write_bytes(parquet("a", extras=pa.table({"x": [1]})))
    (tmp_path / "b.parquet").write_bytes(parquet("b"))
    spans = [("a.parquet", 0, 1), ("b.parquet", 0, 1)]
    assert read_parts(str(tmp_path), "parquet", None, spans, CONFIG)["x"].to_pylist() == [1, None]
    (tmp_path / "b.parquet").write_bytes(parquet("b", extras=pa.table({"x": ["text"]})))
    with pytest.raises(InputError, match="differ"):
        read_parts(str(tmp_path), "parquet", None, spans, CONFIG)


def test_interrupted_writes_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet("a"))
    (tmp_path / "_eclipse").mkdir()
    (tmp_path / "_eclipse" / "unfinished").touch()
    with pytest.raises(InputError, match="interrupted"):
        open_source(str(tmp_path), CONFIG)


@given(
    rows=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5000)), max_size=8),
    max_images=st.integers(1, 40),
    max_bytes=st.integers(1, 3000),
)
def test_chunks_cover_every_row_once_within_bounds(rows, max_images, max_bytes):
    parts = [Part(str(n), count, size, "") for n, (count, size) in enumerate(rows)]
    chunks = list(chunk_spans(parts, max_images, max_bytes))
    covered = [(key, row) for chunk in chunks for key, start, stop in chunk for row in range(start, stop)]
    assert covered == [(part.key, row) for part in parts for row in range(part.rows)]
    weight = {part.key: max(1.0, part.size / part.rows) for part in parts}
    for chunk in chunks:
        images = sum(stop - start for _, start, stop in chunk)
        size = sum((stop - start) * weight[key] for key, start, stop in chunk)
        assert 1 <= images <= max_images
        assert images == 1 or size <= max_bytes * 1.001


@pytest.mark.parametrize("name", [b"cat/stra\xdfe.png", b"stra\xdfe.png", b"\xdf/a.parquet", b"notes\xdf.csv"])
def test_a_name_that_is_no_unicode_is_refused_before_anything_is_read(tmp_path, name):
    file = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(PNG)
    with pytest.raises(InputError, match=r"\\udcdf.*rename the file"):
        open_source(str(tmp_path), CONFIG)


def test_files_that_no_format_reads_are_counted_and_named(tmp_path, capsys):
    for name in ("a.png", "b.jfif", "c.jpe", "metadata.csv", "more.csv", "README"):
        (tmp_path / name).write_bytes(PNG)
    assert open_source(str(tmp_path), CONFIG).images == 3
    said = capsys.readouterr().err
    assert "3 files are passed over: 2 .csv, 1 without a suffix, such as README" in said
    open_source(str(tmp_path / "a.png"), CONFIG)
    assert capsys.readouterr().err == ""


def test_an_output_inside_the_source_is_refused(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    (source / "a.png").write_bytes(PNG)
    for inside in ("out", "deep/out", "_out"):
        with pytest.raises(InputError, match=r"lies inside the source .*name a folder outside"):
            open_source(str(source), DataConfig(output=str(source / inside)))
    for outside in (f"{source}-out", str(tmp_path / "out"), str(tmp_path)):
        assert open_source(str(source), DataConfig(output=outside)).images == 1
    assert open_source(str(source / "a.png"), DataConfig(output=str(source / "out"))).images == 1


def test_a_link_to_a_missing_image_is_named_with_what_to_do(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match=r"a\.png: is a link to a missing file.*delete the link"):
        read_parts(source.url, source.format, source.classes, [("a.png", 0, 1)], CONFIG)


def _tar(name, data):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("key", "data", "words"),
    [
        ("train.tar", _tar("n01440764.tar", b"x" * 600), "holds archives, such as n01440764.tar"),
        ("a.tar", gzip.compress(b"x" * 2000, mtime=0), "compressed by gzip; unpack it"),
        ("archive.zip", b"PK\3\4", "a zip archive; unzip it"),
        ("images.7z", b"", "an archive; unpack it"),
        ("a.parquet", b"PK\3\4" + bytes(20), "a zip archive; unzip it"),
        ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff", "load_from_disk(DIR).to_parquet("),
        ("train.lmdb/data.mdb", bytes(20), "an LMDB database"),
        ("train.tfrecord-00000-of-00010", bytes(20), "TensorFlow records"),
        ("shard.00000.mds.zstd", b"\x28\xb5\x2f\xfd", "MosaicML Streaming"),
        ("images.csv.gz", gzip.compress(b"x", mtime=0), "compressed; unpack it"),
        ("shard.00000.mds", bytes(20), "MosaicML Streaming"),
        ("train_32x32.mat", b"MATLAB 5.0 MAT-file", "scipy.io.loadmat"),
        ("train-images-idx3-ubyte", bytes(20), "a file of MNIST"),
        ("data_batch_1.bin", bytes(20), "the Python version of CIFAR"),
        ("cat/0.heic", bytes(20), "convert it to PNG"),
        ("train-0.parquet", POINTER, "git lfs pull"),
        ("cat/0.png", POINTER, "git lfs pull"),
        ("cat/0.png", b"/annex/objects/MD5E-s1--0.png\n", "git annex get"),
        ("poison.npz", b"<!DOCTYPE html><html>", "a web page"),
        ("train", b"PAR1" + bytes(20), "let its name end in .parquet"),
    ],
)
def test_a_form_that_is_not_read_is_named_with_the_next_step(tmp_path, key, data, words):
    (tmp_path / key).parent.mkdir(exist_ok=True)
    (tmp_path / key).write_bytes(data)
    for url in (tmp_path, tmp_path / key):
        with pytest.raises(InputError) as caught:
            open_source(str(url), DataConfig())
        assert words in str(caught.value)
        assert (tmp_path / key).name in str(caught.value)


def test_batches_of_imagenet_in_32_pixels_are_read(tmp_path):
    data = np.arange(4 * 3072).reshape(4, 3072).astype(np.uint8)
    batch = {"data": data, "labels": [1, 2, 1000, 4], "mean": np.zeros(3072)}
    (tmp_path / "train_data_batch_1").write_bytes(pickle.dumps(batch))
    (table,) = read_tables(open_source(str(tmp_path), DataConfig()), DataConfig())
    assert table["label"].to_pylist() == [1, 2, 1000, 4]
