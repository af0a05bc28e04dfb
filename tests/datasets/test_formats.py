import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import Source, chunk_spans, open_source, read_parts, refuse_repeated_ids
from eclipse_ray.datasets.table import Part, canonical_table, table_to_parquet
from eclipse_ray.errors import InputError
from eclipse_ray.ledger import ImageFailure, commit_shard, finalise
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import CONFIG, PNG, fill, noise, read_all, refused, table_of, tar_bytes, write_set
from tests.ledger.helpers import commit_ids, make_shards, start

FAILED = ImageFailure("c", "c.png", "not an image")


def parquet(*ids, **extras):
    return table_to_parquet(canonical_table(list(ids), [PNG] * len(ids), [0] * len(ids), **extras))


REFUSED = {
    "an empty folder": ({}, "there is no file here; expected Parquet"),
    "no dataset": ({"notes.txt": b"hello"}, "files such as notes.txt are no dataset; expected Parquet"),
    "no rows": ({"a.parquet": parquet()}, "no images in it"),
    "two kinds": ({"a.parquet": parquet("a"), "b.png": PNG}, "1 parquet (a.parquet), 1 folder (b.png)"),
    "other classes": (
        {"a.parquet": parquet("a", classes=["cat", "dog"]), "b.parquet": parquet("b", classes=["dog", "cat"])},
        "a.parquet and b.parquet name different classes (cat, dog and",
    ),
    "an interrupted write": ({"a.parquet": parquet("a"), "_eclipse/unfinished": b""}, "interrupted"),
}


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_dataset_says_why(tmp_path, name):
    files, words = REFUSED[name]
    refused(put(tmp_path, files), words)


@pytest.mark.parametrize(
    ("url", "words"),
    [("absent", "nothing here"), ("*.parquet", "no file matches"), ("nosuchscheme://bucket/x", "cannot open")],
)
def test_nothing_there_says_so(tmp_path, url, words):
    refused(url if "://" in url else tmp_path / url, words)


SPLITS = [
    (["test-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "test-*.parquet", 1),
    (["imagenet1k-train-000000.parquet", "imagenet1k-validation-000000.parquet"], "imagenet1k-train-*.parquet", 1),
    (["a-dev-0.parquet", "a-train-0.parquet"], "a-dev-*.parquet", 1),
    (["a-eval-0.parquet", "a-train-0.parquet"], "a-eval-*.parquet", 1),
    (["data_batch_1", "data_batch_2", "test_batch"], "data_batch_*", 2),
    (["data/extra-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], "data/extra-*.parquet", 1),
    (["clean-00000-of-00001.parquet", "poisoned-00000-of-00001.parquet"], "clean-*.parquet", 1),
    (["train_1-00000-of-00001.parquet", "train_2-00000-of-00001.parquet"], "train_1-*.parquet", 1),
    (["split=test/part-0.parquet", "split=train/part-0.parquet"], "split=test", 1),
    (["testset.parquet", "trainset.parquet"], "testset.parquet", 1),
    (["testA/0.parquet", "trainA/0.parquet"], "testA/*.parquet", 1),
    (["train.parquet", "unlabeled.parquet"], "train.parquet", 1),
    (["unlabeled/test-0.parquet", "unlabeled/train-0.parquet"], "unlabeled/test-*.parquet", 1),
]
BATCH = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]})


@pytest.mark.parametrize(("names", "glob", "images"), SPLITS)
def test_splits_are_read_one_at_a_time(tmp_path, names, glob, images):
    data = parquet("a") if "parquet" in names[0] else BATCH
    put(tmp_path, dict.fromkeys(names, data))
    # Only folders may be classes.
    several = len({name.partition("/")[0] for name in names if "/" in name}) > 1
    end = "; if these folders are classes, say so with --set data.labels=folder" if several else ""
    assert refused(tmp_path, "more than one split: ").endswith(f"/{glob}'{end}")
    assert open_source(f"{tmp_path}/{glob}", CONFIG).images == images


@pytest.mark.parametrize(
    "names",
    [
        ("part-00000-of-00002.parquet", "part-00001-of-00002.parquet"),
        ("de/train-00000-of-00001.parquet", "en/train-00000-of-00001.parquet"),
        ("train/a-00000-of-00001.parquet", "train/b-00000-of-00001.parquet"),
        ("cc12m-train-00000-of-00001.parquet", "cc3m-train-00000-of-00001.parquet"),
        ("unlabeled/a.parquet", "unlabeled/b.parquet"),
        ("trainA.parquet", "trainB.parquet"),
        ("bullet train/a.parquet", "test tube/b.parquet"),
    ],
)
def test_files_of_one_split_are_one_set(tmp_path, names):
    put(tmp_path, dict.fromkeys(names, parquet("a")))
    assert open_source(str(tmp_path), CONFIG).images == len(names)


@pytest.mark.parametrize(("link", "words"), [("a.parquet", []), ("a.png", ["delete the link"])])
def test_a_link_to_a_missing_file_is_named(tmp_path, link, words):
    (tmp_path / link).symlink_to(tmp_path / "nowhere")
    refused(tmp_path, "link to a missing file", link, *words, reading=link == "a.png")


@pytest.fixture
def purified(tmp_path):
    """A finished purification of two shards, the second of which has no file, since its image failed."""
    store, shards = Store(str(tmp_path)), make_shards(3, 2)
    start(store, shards)
    commit_ids(store, shards[0], parquet("a", "b"))
    commit_shard(store, shards[1], ok=None, ok_count=0, errors=[FAILED], input_sha256="0", seconds=1)
    return finalise(store).statuses[0].object


NAMED = pytest.mark.parametrize("name", ["", "/data", "/data/", "/data/*", "/data/0*.parquet"])


@NAMED
def test_a_purification_reads_as_the_files_of_its_manifest(purified, tmp_path, capsys, name):
    url = f"{tmp_path}{name}"
    assert open_source(url, CONFIG).passed_over == ""
    strange = f"data/{purified[5:11]}-{'0' * 16}.parquet"
    put(tmp_path, {strange: parquet("x"), "data/0.png": PNG, "report/curve.png": PNG})
    source = open_source(url, CONFIG)
    assert [part.key for part in source.parts] == [purified]
    said = "2 files are passed over: 1 .png, 1 .parquet, such as data/0.png"
    said = said if "*.p" not in name else f"1 file is passed over: 1 .parquet, such as {strange}"
    assert source.passed_over == said
    assert said in capsys.readouterr().err
    refused(url, said, strict=True)


@NAMED
@pytest.mark.parametrize("foreign", [{}, {"data/000000-0000000000000000.parquet": parquet("x")}])
def test_a_file_of_a_purification_that_is_gone_or_cut_is_named(purified, tmp_path, foreign, name):
    put(tmp_path, foreign)
    url, whole = f"{tmp_path}{name}", (tmp_path / purified).read_bytes()
    (tmp_path / purified).write_bytes(whole[:-1])
    refused(url, f"{purified} has {len(whole) - 1:,} bytes", f"{len(whole):,} were written", "eclipse-ray verify")
    (tmp_path / purified).rename(tmp_path / "data/000009-0000000000000000.parquet")
    refused(url, f"{tmp_path}: {purified} is missing", f"`eclipse-ray verify {tmp_path}`")
    (tmp_path / "_eclipse/manifest.parquet").unlink()
    refused(url, f"{tmp_path}: this purification is not finished")


@pytest.mark.parametrize("base", ["memory://formats/own", ""])
def test_the_folder_data_of_a_dataset_is_read_as_the_dataset(tmp_path, base):
    url = base or str(tmp_path)
    write_set(url, table_of(noise(3, 4), [0, 1, 0]), classes=["cat", "dog"])
    store = Store(url)
    (key,) = (entry.key for entry in store.list())
    assert open_source(f"{url}/data", CONFIG) == open_source(f"{url}/data/*", CONFIG) == open_source(url, CONFIG)
    store.write("data/part-00001.parquet", store.read(key))
    for name in ("", "/data", "/data/*.parquet"):
        refused(f"{url}{name}", "hold 6 images, and 3 were written")
    assert open_source(f"{url}/data/part-00000*", CONFIG).images == 3
    store.write("_eclipse/unfinished", b"")
    for name in ("", "/data", "/data/*.parquet", "/data/part-00000*"):
        refused(f"{url}{name}", "interrupted")


def test_a_folder_data_of_others_is_read_as_it_is(tmp_path):
    put(tmp_path, {"plan.txt": b""})
    put(tmp_path / "data", {"part-00000.parquet": parquet("a"), "000000-0123456789abcdef.parquet": parquet("b")})
    assert open_source(f"{tmp_path}/data", CONFIG).url == f"{tmp_path}/data"


@pytest.mark.parametrize("content", [b"", b"no table", parquet("a")])
def test_a_damaged_manifest_is_named(purified, tmp_path, content):
    put(tmp_path, {"_eclipse/manifest.parquet": content})
    refused(tmp_path, "manifest.parquet is damaged", "again")


def test_a_source_works_elsewhere(tmp_path):
    put(tmp_path, {"a.parquet": parquet("a", "b", classes=["cat"])})
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path), CONFIG)))
    assert source.parts[0].version == str((tmp_path / "a.parquet").stat().st_mtime_ns)
    rows = read_parts(source, [("a.parquet", 1, 2)])
    assert rows["id"].to_pylist() == ["b"]


def test_memory_filesystem():
    store = Store("memory://formats/set")
    store.write("data/a.parquet", parquet("a", "b"))
    assert read_all(store.url)["id"].to_pylist() == ["a", "b"]
    for file in ("a.parquet", "*.parquet"):
        assert open_source(f"{store.url}/data/{file}", CONFIG).parts[0].key == "a.parquet"


def test_files_with_other_columns_join_or_say_why(tmp_path):
    spans = [("a.parquet", 0, 1), ("b.parquet", 0, 1)]
    put(tmp_path, {"a.parquet": parquet("a", extras=pa.table({"x": [1]})), "b.parquet": parquet("b")})
    assert read_parts(Source(str(tmp_path), "parquet", None, CONFIG), spans)["x"].to_pylist() == [1, None]
    put(tmp_path, {"b.parquet": parquet("b", extras=pa.table({"x": ["text"]}))})
    with pytest.raises(InputError, match="differ"):
        read_parts(Source(str(tmp_path), "parquet", None, CONFIG), spans)


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
    refused(tmp_path, r"\udcdf", "rename the file")


@pytest.mark.parametrize(("suffix", "what"), [("parquet", "column"), ("npz", "array")])
def test_ids_that_occur_twice_are_named_with_their_files(tmp_path, suffix, what):
    def ids_of(file, *ids):
        if suffix == "npz":
            np.savez(tmp_path / f"{file}.npz", images=noise(len(ids), 4), id=np.array(ids))
        else:
            put(tmp_path, {f"{file}.parquet": parquet(*ids)})

    ids_of("x", "a", "b", "c")
    ids_of("y", "d", "e", *([None] if suffix == "parquet" else []))
    refuse_repeated_ids(open_source(str(tmp_path), CONFIG))
    ids_of("y", "d", "b")
    with pytest.raises(
        InputError, match=f"id 'b' occurs twice, in x.{suffix} and y.{suffix}; .*drop the {what} id"
    ):
        refuse_repeated_ids(open_source(str(tmp_path), CONFIG))
    ids_of("x", "a", "a")
    with pytest.raises(InputError, match=f"id 'a' occurs twice, in x.{suffix}; make"):
        refuse_repeated_ids(open_source(f"{tmp_path}/x.{suffix}", CONFIG))


def test_an_output_inside_the_source_is_refused(tmp_path):
    source = fill(tmp_path / "set", "a.png")
    for inside in ("out", "deep/out", "_out"):
        refused(source, "lies inside the source ", "name a folder outside", output=f"{source}/{inside}")
    for outside in (f"{source}-out", str(tmp_path / "out"), str(tmp_path)):
        assert open_source(source, DataConfig(output=outside)).images == 1
    assert open_source(f"{source}/a.png", DataConfig(output=f"{source}/out")).images == 1


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("key", "data", "words"),
    [
        ("train.tar", tar_bytes(("n01440764.tar", b"x" * 600)), "holds archives, such as n01440764.tar"),
        ("a.tar", gzip.compress(b"x" * 2000, mtime=0), "compressed by gzip; unpack it"),
        ("archive.zip", b"PK\3\4", "a zip archive; unzip it"),
        ("images.7z", b"", "an archive; unpack it"),
        ("a.parquet", b"PK\3\4" + bytes(20), "a zip archive; unzip it"),
        ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff", "load_from_disk(DIR).to_parquet("),
        ("a.feather", b"ARROW1", "pyarrow.feather.read_table("),
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
    put(tmp_path, {key: data})
    for url in (tmp_path, tmp_path / key):
        refused(url, words, (tmp_path / key).name)


def test_batches_of_imagenet_in_32_pixels_are_read(tmp_path):
    data = np.arange(4 * 3072).reshape(4, 3072).astype(np.uint8)
    batch = {"data": data, "labels": [1, 2, 1000, 4], "mean": np.zeros(3072)}
    put(tmp_path, {"train_data_batch_1": pickle.dumps(batch)})
    assert read_all(tmp_path)["label"].to_pylist() == [1, 2, 1000, 4]
