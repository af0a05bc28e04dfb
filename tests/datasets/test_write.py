import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets import npz, parquet, webdataset
from eclipse_ray.datasets.formats import open_source, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import choose_clean, load_images
from eclipse_ray.datasets.perturbation import apply
from eclipse_ray.datasets.table import canonical_table, image_bytes, regroup
from eclipse_ray.datasets.write import convert, split
from eclipse_ray.errors import InputError, StorageError
from eclipse_ray.storage.local import LocalFolder
from tests.datasets.helpers import CONFIG, PNG, fill, noise, read_all, refused, table_of, write_set

ROWS = st.lists(st.tuples(st.integers(0, 15), st.none() | st.integers(0, 2)), min_size=2, max_size=40)


def source(url, count=30):
    labels = [n % 3 for n in range(count)]
    return write_set(
        url, table_of(noise(count, 4), labels, [f"i{n}" for n in range(count)]), classes=["a", "b", "c"]
    )


@settings(max_examples=200)
@given(rows=ROWS, clean=st.integers(1, 39), seed=st.integers(0, 5))
def test_copies_stay_together_and_the_count_is_never_exceeded(rows, clean, seed):
    hashes, labels = [f"h{content}" for content, _ in rows], [label for _, label in rows]
    chosen = choose_clean(hashes, labels, clean, seed)
    inside = {h for h, c in zip(hashes, chosen, strict=True) if c}
    outside = {h for h, c in zip(hashes, chosen, strict=True) if not c}
    assert not inside & outside
    assert chosen.sum() <= clean


@given(labels=st.lists(st.none() | st.integers(0, 2), min_size=2, max_size=40), clean=st.integers(1, 39))
def test_without_copies_the_count_is_met(labels, clean):
    chosen = choose_clean([f"h{n}" for n in range(len(labels))], labels, clean, 0)
    assert chosen.sum() == min(clean, len(labels))


@given(rows=ROWS, clean=st.integers(1, 39), seed=st.integers(0, 5), data=st.data())
def test_the_choice_does_not_depend_on_order(rows, clean, seed, data):
    rows = [(f"h{n}", label) for n, (_, label) in enumerate(rows)]
    shuffled = data.draw(st.permutations(rows))
    picks = []
    for order in (rows, shuffled):
        chosen = choose_clean([h for h, _ in order], [label for _, label in order], clean, seed)
        picks.append({h for (h, _), c in zip(order, chosen, strict=True) if c})
    assert picks[0] == picks[1]


def test_strata_get_their_share_and_seeds_differ():
    hashes = [f"h{n}" for n in range(1000)]
    labels = [0] * 700 + [1] * 200 + [2] * 100
    chosen = choose_clean(hashes, labels, 55, 1)
    assert [int(chosen[np.array(labels) == label].sum()) for label in range(3)] in ([39, 11, 5], [38, 11, 6])
    assert not np.array_equal(chosen, choose_clean(hashes, labels, 55, 2))


def test_damaged_images_are_never_clean():
    assert choose_clean([None, "a", None], [0, 0, 0], 2, 0).tolist() == [False, True, False]


def test_split_writes_two_disjoint_sets(tmp_path):
    url = source(tmp_path / "src")
    result = split(url, str(tmp_path / "out"), 9, 7, CONFIG)
    assert result == {"clean": 9, "rest": 21, "output": str(tmp_path / "out")}
    sides = [load_images(str(tmp_path / "out" / name), CONFIG) for name in ("clean", "rest")]
    assert not set(sides[0].hashes()) & set(sides[1].hashes())
    assert sorted(sides[0].ids + sides[1].ids) == sorted(load_images(url, CONFIG).ids)
    assert np.bincount(sides[0].labels).tolist() == [3, 3, 3]
    assert sides[0].classes == ["a", "b", "c"]
    split(url, str(tmp_path / "again"), 9, 7, CONFIG)
    assert load_images(str(tmp_path / "again" / "clean"), CONFIG).ids == sides[0].ids
    convert(url, str(tmp_path / "folder"), CONFIG, "folder")
    split(str(tmp_path / "folder"), str(tmp_path / "third"), 9, 7, CONFIG)
    assert set(load_images(str(tmp_path / "third" / "clean"), CONFIG).hashes()) == set(sides[0].hashes())


def test_splits_that_make_no_sense_are_refused(tmp_path):
    url = source(tmp_path / "src", 6)
    for clean in (0, -1, 6, 7):
        with pytest.raises(InputError, match="ask for 1 to 5"):
            split(url, str(tmp_path / "out"), clean, 0, CONFIG)
    assert not (tmp_path / "out").exists()
    for write in (lambda: split(url, url, 2, 0, CONFIG), lambda: convert(url, url, CONFIG)):
        with pytest.raises(InputError, match="already holds data"):
            write()
    copies = write_set(tmp_path / "copies", canonical_table(["a", "b"], [PNG, PNG]))
    with pytest.raises(InputError, match="copies of each other"):
        split(copies, str(tmp_path / "out"), 1, 0, CONFIG)


def test_convert_there_and_back_copies_bytes(tmp_path):
    keys = ["cat/1.jpg", "dog/bad.png", "dog/sub/2.jpg"]
    fill(tmp_path / "src", *keys, "dog/notes.txt")
    jpeg = encode_image(noise(1, 9, 7)[0], "jpeg:50")
    for key, data in zip(keys, (jpeg, b"bad", jpeg), strict=True):
        (tmp_path / "src" / key).write_bytes(data)
    assert convert(str(tmp_path / "src"), str(tmp_path / "table"), CONFIG) == 3
    rows = read_all(tmp_path / "table")
    assert rows["id"].to_pylist() == keys
    assert rows["label"].to_pylist() == [0, 1, 1]
    assert image_bytes(rows) == [jpeg, b"bad", jpeg]
    assert convert(str(tmp_path / "table"), str(tmp_path / "back"), CONFIG, "folder") == 3
    assert (tmp_path / "back" / "dog" / "sub%2F2.jpg").read_bytes() == jpeg
    assert open_source(str(tmp_path / "back"), CONFIG).classes == ["cat", "dog"]


def test_convert_real_cifar(shared_data, tmp_path):
    url = str(shared_data / "cifar10" / "test-00000-of-00001.parquet")
    assert convert(url, str(tmp_path / "out"), CONFIG) == 10_000
    again = open_source(str(tmp_path / "out"), CONFIG)
    assert [part.rows for part in again.parts] == [4096, 4096, 1808]
    first, copy = (next(read_tables(open_source(each, CONFIG))) for each in (url, again.url))
    assert first.equals(copy)


def test_converting_with_another_size_resizes_every_image(tmp_path):
    url = source(tmp_path / "src", 5)
    assert convert(url, str(tmp_path / "out"), DataConfig(resize=16)) == 5
    before, after = (load_images(str(tmp_path / name), CONFIG) for name in ("src", "out"))
    assert after.images.shape == (5, 16, 16, 3)
    assert (after.ids, after.classes) == (before.ids, before.classes)
    assert np.array_equal(after.labels, before.labels)
    broken = write_set(tmp_path / "broken", canonical_table(["bad"], [b"nothing"], [0]), classes=["a"])
    with pytest.raises(InputError, match="image bad: not an image"):
        convert(broken, str(tmp_path / "none"), DataConfig(resize=16))


@pytest.mark.parametrize("verb", ["convert", "split", "apply"])
def test_what_an_interrupted_command_left_is_written_anew_by_the_same_one(verb, tmp_path, monkeypatch):
    clean, output = source(tmp_path / "in", 9), str(tmp_path / "out")
    np.save(tmp_path / "delta.npy", np.ones((9, 4, 4, 3), np.int8))
    commands = {
        "convert": lambda given: convert(given, output, CONFIG),
        "split": lambda given: split(given, output, 3, 0, CONFIG),
        "apply": lambda given: apply(str(tmp_path / "delta.npy"), given, output, CONFIG),
    }
    genuine = LocalFolder.write

    def full(self, key, data):
        genuine(self, key, data)
        if "_eclipse" not in key:
            raise StorageError(f"{key}: the disk is full; make room, then run the same command again")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "write", full)
        with pytest.raises(StorageError, match="run the same command again"):
            commands[verb](clean)
    (tmp_path / "out/left.png").write_bytes(b"")
    # Another command might be a mistake.
    with pytest.raises(InputError, match="writing was interrupted; delete it first"):
        commands[verb](source(tmp_path / "other", 9))
    assert (tmp_path / "out/left.png").exists()
    commands[verb](clean)
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if path.name in ("unfinished", "left.png")]
    parts = [tmp_path / "out/clean", tmp_path / "out/rest"] if verb == "split" else [tmp_path / "out"]
    assert sum(read_all(part).num_rows for part in parts) == 9


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
@pytest.mark.parametrize(("values", "types"), [((1, "a"), "int64 string"), ((1, 1.5), "int64 double")])
def test_files_whose_extra_columns_are_of_different_types_are_refused_when_they_are_listed(
    suffix, values, types, tmp_path
):
    def write(name, value):
        if suffix == "npz":
            np.savez(tmp_path / name, images=noise(1), labels=np.zeros(1, int), note=np.array([value]))
        else:
            pq.write_table(table_of(noise(1), [0], extras=pa.table({"note": pa.array([value])})), tmp_path / name)

    for number, value in enumerate((values[0], values[0], values[1])):
        write(f"{number}.{suffix}", value)
    first, second = types.split()
    words = f"column 'note' holds {first} in 0.{suffix} and {second} in 2.{suffix}; make them alike"
    refused(tmp_path, words, "data.extra_columns=drop")
    assert read_all(tmp_path, extra_columns="drop").num_rows == 3
    write(f"2.{suffix}", None if suffix == "parquet" else values[0])
    assert read_all(tmp_path)["note"].to_pylist()[:2] == [values[0]] * 2
    for number in (0, 1):
        write(f"{number}.{suffix}", "b" * (number + 1))
    write(f"2.{suffix}", "c")
    assert read_all(tmp_path)["note"].to_pylist() == ["b", "bb", "c"]


@pytest.mark.parametrize("layout", ["parquet", "folder", "webdataset", "npz", "npy"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_dataset_with_a_part_too_few_or_too_many_is_refused(layout, lost, tmp_path, monkeypatch):
    for module in (parquet, webdataset, npz):
        monkeypatch.setattr(module, "regroup", lambda tables, *_: regroup(tables, 5, 2**20))
    convert(source(tmp_path / "in", 9), str(tmp_path / "out"), CONFIG, layout)
    assert read_all(tmp_path / "out").num_rows == 9
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and "_eclipse" not in path.parts]
    last = max(path for path in files if path.suffix != ".idx" and path.name != "labels.npy")
    if lost:
        # Images in an .npy are one file, so a shorter one takes its place.
        np.save(last, np.load(last)[:8]) if layout == "npy" else last.unlink()
        (tmp_path / "out/labels.npy").unlink(missing_ok=True)
    else:
        shutil.copy(last, last.with_name(f"copy{last.suffix}"))
    refused(tmp_path / "out", "9 were written; make this dataset again", "_eclipse/dataset.json", tar_ids="path")
