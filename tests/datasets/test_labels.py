"""Labels that are not what they seem: each reading is right, or a question that `data.labels` answers."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source, read_labels, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.labels import read_label_file
from eclipse_ray.datasets.memory import load_images, load_mixed, require_classes
from eclipse_ray.datasets.table import table_to_parquet
from eclipse_ray.datasets.write import convert
from eclipse_ray.errors import InputError
from tests.datasets import helpers
from tests.datasets.helpers import CONFIG, PNG, noise, refused, table_of, tar, tar_bytes

PIXELS = noise(12, 16)


def fill(folder, *keys):
    return helpers.fill(folder, *keys, images=PIXELS)


def labels_at(url, **settings):
    """Return {id: label} of a dataset, None for no label, and its classes, as rows and labels alone say."""
    config = DataConfig(**settings)
    source = open_source(url, config)
    found = {}
    for table in read_tables(source):
        values = table["label"].to_pylist() if "label" in table.column_names else [None] * table.num_rows
        found |= dict(zip(table["id"].to_pylist(), values, strict=True))
    alone = read_labels(source)
    expected = [-1 if label is None else label for label in found.values()]
    assert ([-1] * source.images if alone is None else alone.tolist()) == expected
    return found, source.classes


QUESTIONS = {
    "one level deeper": (("images/cat/0.png", "images/dog/1.png"), "images/, in 2 folders (cat, dog)"),
    "groups of classes": (("pets/cat/0.png", "pets/dog/1.png", "farm/cow/2.png"), "all in folders below"),
    "splits in classes": (("cat/train/0.png", "cat/test/1.png", "dog/train/2.png"), "all in folders below"),
    "a split beside classes": (("cat/0.png", "dog/1.png", "val/2.png"), "named after splits"),
    "two splits and a rest": (("train/0.png", "test/1.png", "extra/2.png"), "named after splits"),
    "a folder that holds everything": (("all/0.png", "all/1.png", "cat/2.png"), "parts of a dataset"),
    "masks": (("images/0.png", "masks/0.png"), "parts of a dataset"),
    "gaps": (("0/0.png", "1/1.png", "3/2.png"), "numbered with gaps"),
    "partitions of a date": (("date=1/0.png", "date=2/1.png"), "partitions of something else"),
    "case": (("cat/0.png", "Cat/1.png", "dog/2.png"), "differ only in their case"),
    "images beside": (("cat/0.png", "1.png"), "beside them (1.png)"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_doubtful_folder_is_a_question_that_a_setting_answers(tmp_path, name):
    keys, words = QUESTIONS[name]
    url = fill(tmp_path, *keys)
    refused(url, words, "data.labels=folder")
    assert labels_at(url, labels="none") == (dict.fromkeys(sorted(keys)), None)
    if name == "images beside":
        refused(url, words, labels="folder")
        return
    tops = sorted({key.partition("/")[0] for key in keys})
    found, classes = labels_at(url, labels="folder")
    assert classes == [top.partition("=")[2] or top for top in tops]
    assert found == {key: tops.index(key.partition("/")[0]) for key in keys}


def test_training_a_denoiser_asks_nothing_about_labels(tmp_path):
    assert len(load_mixed(fill(tmp_path, "0/0.png", "2/1.png"), CONFIG).ids) == 2


@pytest.mark.parametrize(
    "tops",
    [
        ("train", "val"),
        ("train2017", "val2017"),
        ("train_images", "test_images"),
        ("dev",),
        ("Evaluation",),
        ("trainA", "trainB", "testA", "testB"),
        ("train images", "test images"),
        ("My Train", "My Test"),
        ("trainset", "testset"),
        ("train", "unlabeled"),
        ("labelled", "unlabelled"),
        ("split=train", "split=test"),
    ],
)
def test_folders_named_after_splits_are_classes_only_if_a_setting_says_so(tmp_path, tops):
    url = fill(tmp_path, *(f"{top}/cat/0.png" for top in tops), *(f"{top}/dog/0.png" for top in tops))
    for labels in (None, "none"):
        refused(url, "not classes", f"example {url}/{max(tops)};", "data.labels=folder", labels=labels)
    assert open_source(f"{url}/{tops[0]}", CONFIG).classes == ["cat", "dog"]
    classes = sorted(top.removeprefix("split=") for top in tops)
    found, names = labels_at(url, labels="folder")
    assert (names, set(found.values())) == (classes, set(range(len(tops))))


@pytest.mark.parametrize("tops", [("job=dev", "job=test"), ("toy test", "toy train"), ("labeled", "unlabeled")])
def test_folders_of_tables_named_after_splits_are_classes_only_if_a_setting_says_so(tmp_path, tops):
    data = table_to_parquet(table_of(PIXELS[:1], ids=["x"]).drop_columns("id"))
    for top in tops:
        (tmp_path / top).mkdir()
        (tmp_path / top / "0.parquet").write_bytes(data)
    for labels in (None, "none"):
        refused(tmp_path, "more than one split", "data.labels=folder", labels=labels)
    found, classes = labels_at(str(tmp_path), labels="folder")
    assert found == {f"{top}/0.parquet#0": place for place, top in enumerate(tops)}
    assert classes == [top.removeprefix("job=") for top in tops]
    (tmp_path / tops[0] / "0.parquet").rename(tmp_path / tops[0] / "train-0.parquet")
    (tmp_path / tops[1] / "0.parquet").rename(tmp_path / tops[1] / "test-0.parquet")
    refused(tmp_path, "more than one split", labels="folder")
    for top, name in zip(tops, ("train-0", "test-0"), strict=True):
        (tmp_path / top / f"{name}.parquet").rename(tmp_path / f"{name}.parquet")
    refused(tmp_path, "more than one split", labels="folder")


@pytest.mark.parametrize(
    "tops",
    [
        ("bullet train", "test tube"),
        ("DevOps", "TestPattern", "trainB"),
        ("TESTERS", "TRAINERS"),
        ("trainA", "trainB"),
        ("car", "train"),
        ("cat", "unlabeled"),
        ("label=test", "label=train"),
    ],
)
def test_folders_whose_names_only_contain_words_for_splits_are_classes(tmp_path, tops):
    url = fill(tmp_path, *(f"{top}/0.png" for top in tops))
    assert labels_at(url)[0] == {f"{top}/0.png": place for place, top in enumerate(tops)}


@pytest.mark.parametrize("form", ["{}", "class_{}", "label={}", "{}-x"])
def test_numbers_in_names_of_classes_decide_their_order(tmp_path, form):
    numbers = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    url = fill(tmp_path, *(f"{form.format(number)}/a.png" for number in numbers))
    found, classes = labels_at(url)
    names = [form.format(number).removeprefix("label=") for number in numbers]
    assert classes == names
    assert found == {f"{form.format(number)}/a.png": number for number in numbers}


def test_classes_with_one_inner_folder_are_classes(tmp_path):
    found, classes = labels_at(fill(tmp_path, "n01/images/0.png", "n07/images/1.png"))
    assert (found, classes) == ({"n01/images/0.png": 0, "n07/images/1.png": 1}, ["n01", "n07"])


def test_folders_without_a_name_in_keys_of_a_bucket_are_no_class():
    # A disk has no such names, so the rule is asked itself.
    from eclipse_ray.datasets.folder import class_folders, folder_label
    from eclipse_ray.storage.store import Store

    store = Store("memory://nameless")
    keys = ["/cat/0.png", "dog//1.png", "dog/2.png"]
    assert class_folders(store, keys, CONFIG) == ["cat", "dog"]
    assert [folder_label(store, key, ["cat", "dog"]) for key in keys] == [0, 1, 1]
    with pytest.raises(InputError, match="beside them"):
        class_folders(store, ["/0.png", "dog/1.png"], CONFIG)


def test_a_folder_without_images_among_classes_is_a_question(tmp_path):
    url = fill(tmp_path, "bird/0.png", "dog/1.png")
    (tmp_path / "cat").mkdir()
    refused(url, "the folder cat/ holds no image")
    assert labels_at(url, labels="folder")[1] == ["bird", "dog"]
    (tmp_path / "cat" / "a.heic").write_bytes(b"x")
    refused(url, "the folder cat/ holds no image")


def test_a_class_whose_every_image_fails_keeps_its_label(tmp_path):
    url = fill(tmp_path, "bird/0.png", "cat/1.png", "dog/2.png")
    (tmp_path / "cat" / "1.png").write_bytes(b"<html>")
    assert labels_at(url) == ({"bird/0.png": 0, "cat/1.png": 1, "dog/2.png": 2}, ["bird", "cat", "dog"])


def rows(*ids, labels=None, classes=None):
    return table_to_parquet(table_of(PIXELS[: len(ids)], labels, list(ids), None, classes))


def test_partitions_of_tables_are_a_question(tmp_path):
    for value in (3, 10):
        (tmp_path / f"label={value}").mkdir()
        (tmp_path / f"label={value}" / "a.parquet").write_bytes(rows(f"{value}"))
    refused(str(tmp_path), "label=10/, label=3/ may be the labels", "data.labels=folder")
    (tmp_path / "label=10").rename(tmp_path / "10")
    refused(f"{tmp_path}", "10/, label=3/ may be the labels")
    (tmp_path / "10/a.parquet").rename(tmp_path / "label=3/b.parquet")
    refused(str(tmp_path), "label=3/a.parquet may be a label")
    (tmp_path / "label=3/b.parquet").rename(tmp_path / "10/a.parquet")
    (tmp_path / "10").rename(tmp_path / "label=10")
    assert labels_at(str(tmp_path), labels="none") == ({"10": None, "3": None}, None)
    assert labels_at(str(tmp_path), labels="folder") == ({"10": 1, "3": 0}, ["3", "10"])


def write_one(file, image, label=None):
    """Write a file of one image, of the kind that its suffix says."""
    file.parent.mkdir(exist_ok=True)
    label = {} if label is None else {"labels": np.array([label])}
    if file.suffix == ".parquet":
        file.write_bytes(table_to_parquet(table_of([image], label.get("labels"), [file.stem])))
    elif file.suffix == ".npz":
        np.savez(file, images=image[None], **label)
    elif file.suffix == ".npy":
        np.save(file, image[None])
    elif file.suffix == ".tar":
        tar(file, (f"{file.stem}.png", PNG), *([(f"{file.stem}.cls", b"0")] if label else ()))
    else:
        torch.save({"data": torch.from_numpy(image[None]), **label}, file)


@pytest.mark.parametrize("suffix", ["parquet", "npz", "npy", "pt", "tar"])
def test_folders_of_files_without_labels_are_a_question(tmp_path, suffix):
    url = str(tmp_path)
    write_one(tmp_path / f"dog/b.{suffix}", PIXELS[0])
    assert labels_at(url)[1] is None
    write_one(tmp_path / f"cat/a.{suffix}", PIXELS[1])
    refused(url, "hold no 'label', and the folders cat/, dog/ may be the labels; say what", "data.labels=folder")
    assert set(labels_at(url, labels="none")[0].values()) == {None}
    found, classes = labels_at(url, labels="folder")
    assert (sorted(found.values()), classes) == ([0, 1], ["cat", "dog"])
    if suffix != "npy":
        for name in ("dog/b", "cat/a"):
            write_one(tmp_path / f"{name}.{suffix}", PIXELS[0], 0)
        assert list(labels_at(url)[0].values()) == [0, 0]


def halves(folder, suffix):
    """Write a file of one labelled image and one without a label."""
    write_one(folder / f"a.{suffix}", PIXELS[0], 1)
    write_one(folder / f"b.{suffix}", PIXELS[1])


@pytest.mark.parametrize("suffix", ["parquet", "npz", "pt"])
def test_files_of_which_some_have_labels_are_a_question(tmp_path, suffix):
    halves(tmp_path, suffix)
    refused(tmp_path, f"a.{suffix} has labels and b.{suffix} has none", "data.labels=none")
    assert set(labels_at(str(tmp_path), labels="none")[0].values()) == {None}


# ---- Label files


# What each file holds, or how it is made; the labels of a.png and b.png, or of 0.png and 1.png; the classes.
FILES = {
    "names.csv": ("file_name,label\na.png,2\nb.png,0\n", [2, 0], None),
    "kaggle.csv": ("id,breed\na,pug\nb,beagle\n", [1, 0], ["beagle", "pug"]),
    "floats.tsv": ("path\tclass\na.png\t2.0\nb.png\t0.0\n", [2, 0], None),
    "pairs.txt": ("a.png 2\nb.png 0\n", [2, 0], None),
    "a.jsonl": ('{"file": "a.png", "label": "cat"}\n{"file": "b.png", "label": "ape"}\n', [1, 0], ["ape", "cat"]),
    "dataset.json": ('{"labels": [["a.png", 2], ["b.png", 0]]}', [2, 0], None),
    "names.json": ('{"a.png": 2, "b.png": 0}', [2, 0], None),
    "order.csv": ("label\n2\n0\n", [2, 0], None),
    "order.txt": ("cat\nape\n", [1, 0], ["ape", "cat"]),
    "order.json": ("[2, 0]", [2, 0], None),
    "order.npy": (lambda file: np.save(file, np.array([[2], [0]])), [2, 0], None),
    "onehot.npy": (lambda file: np.save(file, np.eye(3)[[2, 0]]), [2, 0], None),
    "text.npy": (lambda file: np.save(file, np.array(["cat", "ape"])), [1, 0], ["ape", "cat"]),
    "order.pt": (lambda file: torch.save(torch.tensor([2, 0]), file), [2, 0], None),
    "order.pkl": (lambda file: file.write_bytes(pickle.dumps([2, 0])), [2, 0], None),
}


@pytest.mark.parametrize("name", FILES)
def test_a_label_file_gives_the_labels_of_a_folder(tmp_path, name):
    content, expected, names = FILES[name]
    make = content if callable(content) else lambda file: file.write_text(content)
    make(tmp_path / name)
    by_name = read_label_file(str(tmp_path / name)).names is not None
    keys = ("a.png", "b.png") if by_name else ("0.png", "1.png")
    url = fill(tmp_path / "set", *keys)
    found, classes = labels_at(url, labels=str(tmp_path / name))
    assert (found, classes) == (dict(zip(keys, expected, strict=True)), names)
    # The table may lie in the folder itself.
    (tmp_path / name).rename(tmp_path / "set" / name)
    assert labels_at(url, labels=f"{url}/{name}")[0] == found


def test_labels_in_order_go_by_the_numbers_of_images_and_not_by_the_text(tmp_path):
    url = fill(tmp_path / "set", *(f"data/{number}.png" for number in range(11)))
    np.save(tmp_path / "l.npy", np.arange(11) * 3)
    found, _ = labels_at(url, labels=str(tmp_path / "l.npy"))
    assert found == {f"data/{number}.png": 3 * number for number in range(11)}


def test_labels_in_order_of_one_file(tmp_path):
    np.savez(tmp_path / "x.npz", images=PIXELS[:5], labels=np.zeros(5, int))
    np.save(tmp_path / "l.npy", np.array([4, 3, 2, 1, -1]))
    found, _ = labels_at(str(tmp_path / "x.npz"), labels=str(tmp_path / "l.npy"))
    assert list(found.values()) == [4, 3, 2, 1, None]
    np.save(tmp_path / "l.npy", np.array([4, 3]))
    refused(tmp_path / "x.npz", "holds 2 labels in order, ", " has 5 images", labels=str(tmp_path / "l.npy"))


def test_labels_by_id_of_a_table(tmp_path):
    (tmp_path / "a.parquet").write_bytes(rows("x", "y", labels=[0, 0], classes=["one"]))
    (tmp_path / "l.json").write_text(json.dumps({"y": "dog", "x": "cat", "z": "cow"}))
    settings = {"labels": str(tmp_path / "l.json")}
    assert labels_at(str(tmp_path / "a.parquet"), **settings) == ({"x": 0, "y": 2}, ["cat", "cow", "dog"])
    (tmp_path / "l.json").write_text(json.dumps({"y": "dog"}))
    refused(tmp_path / "a.parquet", "has no label for image x", reading=True, **settings)


BAD = {
    "l.csv": ("a,b,c\n1,2,3\n", "its columns are a, b, c; .*data.label_column=NAME"),
    "twice.csv": ("file,label\na.png,1\na.png,2\n", "a.png occurs more than once"),
    "prefix.csv": (
        "file,label\n./a.png,1\nb.png,1\na.png,2\n",
        r"\./a\.png, also written a\.png occurs more than",
    ),
    "slash.json": (r'[["x/a.png", 1], ["x\\a.png", 1]]', r"x/a\.png, also written x.a\.png occurs more than once"),
    "accent.json": (r'{"\u00e1.png": 1, "a\u0301.png": 2}', "\u00e1.png, also written a\u0301.png occurs"),
    "short.csv": ("file,label\na.png\n", "different lengths"),
    "mixed.csv": ("file,label\na.png,1\nb.png,\n", "row 1: label '' is neither"),
    "l.json": ("{", "not readable"),
    "half.json": ("[1, 1.5]", "row 1: label '1.5' is neither a whole number"),
    "null.json": ("[1, null]", "row 1: label None is neither a number nor"),
    "both.json": ('["cat", -1, 2]', "the labels of row 2 are numbers, others are names, such as cat"),
    "l.yaml": ("a: 1", "not a file of labels"),
    "low.json": ("[-2]", "row 0: label -2 is out of range"),
    "empty.txt": ("", "holds no labels"),
    # In the place of labels in order, of which each line would become a class of its own.
    "table.txt": ("0.png,0\n1.png,1\n", "'0.png,0' names an image"),
    "turned.txt": ("2 0.png\n1 1.png\n", "'2 0.png' names an image"),
    "headed.txt": ("file_name label\n0.png 0\n", "'0.png 0' names an image"),
    "first.txt": ("label\n2\n1\n", "first line 'label' is a heading"),
    "named.txt": ("label\ncat\ndog\ncat\n", "first line 'label' is a heading"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_file_of_labels_is_refused_by_name(tmp_path, name):
    text, words = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: .*{words}|{words}"):
        read_label_file(str(tmp_path / name))
    with pytest.raises(InputError, match="there is no such file"):
        read_label_file(str(tmp_path / "absent.csv"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("a.png,1\nb.png,2\n", "x/a.png and y/a.png would get the same line"),
        ("x/a.png,1\ny/a.png,2\n", "y/b.png by its name"),
    ],
)
def test_images_without_a_line_or_with_a_shared_one_are_named(tmp_path, lines, words):
    url = fill(tmp_path / "set", "x/a.png", "y/a.png", "y/b.png")
    (tmp_path / "l.csv").write_text(f"file,label\n{lines}")
    refused(url, words, labels=str(tmp_path / "l.csv"))


def test_names_in_a_label_file_are_found_in_another_spelling(tmp_path):
    url = fill(tmp_path / "set", "a/e\u0301.png", "a/0.png", "b/1.png", "b/2.png")
    (tmp_path / "l.csv").write_text("file,label\n./b/2.png,3\na/\u00e9.png,2\na\\0.png,1\nb/1.png,0\n")
    expected = {"a/e\u0301.png": 2, "a/0.png": 1, "b/1.png": 0, "b/2.png": 3}
    assert labels_at(url, labels=str(tmp_path / "l.csv")) == (expected, None)


def test_a_label_file_belongs_to_the_source_and_not_to_other_sets(tmp_path):
    train, test = fill(tmp_path / "train", "0.png", "1.png"), fill(tmp_path / "test", "cat/0.png", "dog/1.png")
    np.save(tmp_path / "l.npy", np.array([1, 0]))
    config = DataConfig(source=train, labels=str(tmp_path / "l.npy"))
    assert load_images(train, config).labels.tolist() == [1, 0]
    assert load_images(test, config).labels.tolist() == [0, 1]
    assert load_images(test, config).classes == ["cat", "dog"]
    for other in (
        rows("a", "b", labels=[1, 0]),
        tar_bytes(("a.png", PNG), ("a.cls", b"dog"), ("b.png", PNG), ("b.cls", b"cat")),
    ):
        name = "x.parquet" if other[:4] == b"PAR1" else "x.tar"
        (tmp_path / name).write_bytes(other)
        assert labels_at(f"{tmp_path}/{name}", source=train, labels=str(tmp_path / "l.npy"))[0] == {"a": 1, "b": 0}
    # Of a folder that holds data.source the file gives no labels; of a file in data.source it does.
    (tmp_path / "sets").mkdir()
    for name, ids in (("x", "ab"), ("y", "cd")):
        (tmp_path / f"sets/{name}.parquet").write_bytes(rows(*ids, labels=[1, 0]))
    (tmp_path / "l.json").write_text(json.dumps({"a": "dog", "b": "dog", "c": "cat", "d": "cat"}))
    folder, file, chosen = f"{tmp_path}/sets", f"{tmp_path}/sets/x.parquet", f"{tmp_path}/sets/[x].parquet"
    for source in (file, chosen):
        found = labels_at(folder, source=source, labels=str(tmp_path / "l.json"))
        assert found == ({"a": 1, "b": 0, "c": 1, "d": 0}, None)
    for source in (folder, file, chosen, None):
        found = labels_at(file, source=source, labels=str(tmp_path / "l.json"))
        assert found == ({"a": 1, "b": 1}, ["cat", "dog"])


def test_a_changed_label_file_is_another_input(tmp_path):
    url = fill(tmp_path / "set", "0.png", "1.png")
    config = DataConfig(labels=str(tmp_path / "l.txt"))
    (tmp_path / "l.txt").write_text("0\n1\n")
    before = open_source(url, config).parts
    (tmp_path / "l.txt").write_text("1\n1\n")
    assert {part.version for part in before}.isdisjoint(part.version for part in open_source(url, config).parts)


# ---- What is said before images are read


def test_classes_are_said_and_labels_checked_before_any_image_is_read(tmp_path, capsys, monkeypatch):
    url = fill(tmp_path, "cat/0.png", "cat/1.png", "dog/2.png")
    opened = open_source(url, CONFIG)
    monkeypatch.setattr("eclipse_ray.storage.store.Store.read", lambda *_: pytest.fail("an image was read"))
    assert require_classes(url, opened, 2).tolist() == [0, 0, 1]
    assert f"{url}: 2 classes in 3 images: cat 2, dog 1\n" in capsys.readouterr().err


def test_one_class_is_refused_where_two_are_needed(tmp_path):
    (tmp_path / "a.parquet").write_bytes(rows("a", "b", labels=[1, 1], classes=["cat", "dog"]))
    source = open_source(str(tmp_path), CONFIG)
    with pytest.raises(InputError, match="all 2 images are of one class, dog, where at least 2"):
        require_classes(str(tmp_path), source, 2)
    assert require_classes(str(tmp_path), source).tolist() == [1, 1]


def test_many_classes_fit_one_line_and_empty_ones_are_named(tmp_path, capsys):
    names = [f"c{number}" for number in range(30)]
    table = pa.table({"image": [encode_image(PIXELS[0], "png")] * 29, "label": list(range(29))})
    metadata = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    require_classes(str(tmp_path), open_source(str(tmp_path), CONFIG))
    said = capsys.readouterr().err
    assert "30 classes in 29 images: c0 1, c1 1" in said
    assert "and 10 more, each 0 to 1; 1 without images, such as c29" in said


def written(folder, kind, labels, other=None):
    """Write an image per label as a source of one `kind`: `labels` have their usual name, `other` is `named`."""
    images, folder = PIXELS[: len(labels)], folder / kind
    folder.mkdir()
    second = {} if other is None else {"named": other}
    if kind == "parquet":
        columns = {"image": [encode_image(image, "png") for image in images], "label": labels, **second}
        pq.write_table(pa.table(columns), folder / "a.parquet")
    elif kind == "webdataset":
        members = []
        for row, image in enumerate(images):
            members += [(f"{row}.png", encode_image(image, "png")), (f"{row}.cls", str(labels[row]).encode())]
            members += [(f"{row}.{name}", str(each[row]).encode()) for name, each in second.items()]
        tar(folder / "a.tar", *members)
    elif kind == "npz":
        np.savez(folder / "a.npz", images=images, label=np.array(labels), **second)
    elif kind == "npy":
        for name, values in {"images": images, "labels": np.array(labels), **second}.items():
            np.save(folder / f"{name}.npy", values)
    elif kind in ("pt", "pkl"):
        content = {"data": torch.from_numpy(images) if kind == "pt" else images, "labels": labels, **second}
        write = torch.save if kind == "pt" else lambda content, file: file.write_bytes(pickle.dumps(content))
        write(content, folder / f"a.{kind}")
    else:
        planes = images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
        batch = {b"data": planes, b"labels": labels, **{key.encode(): value for key, value in second.items()}}
        (folder / "data_batch_1").write_bytes(pickle.dumps(batch))
    return str(folder / "images.npy" if kind == "npy" else folder)


@pytest.mark.parametrize("kind", ["parquet", "npz", "webdataset", "pt"])
def test_numbers_that_do_not_begin_at_0_are_kept_and_the_class_without_images_is_named(tmp_path, kind, capsys):
    url = written(tmp_path, kind, [*range(1, 11), 10])
    assert require_classes(url, open_source(url, CONFIG)).tolist() == [*range(1, 11), 10]
    said = capsys.readouterr().err
    assert "10 classes in 11 images: label 1 1, label 2 1," in said
    assert "label 10 2; no image has label 0: labels are kept as they are, so a classifier gets 11 classes" in said


def test_numbers_with_gaps_are_named_and_a_set_without_any_is_said_in_short(tmp_path, capsys):
    gaps = written(tmp_path, "npz", [0, 3, 11])
    assert require_classes(gaps, open_source(gaps, CONFIG)).tolist() == [0, 3, 11]
    said = capsys.readouterr().err
    assert (
        "3 classes in 3 images: label 0 1, label 3 1, label 11 1; no image has label 1, label 2, label 4," in said
    )
    assert "label 6 ...: labels are kept as they are, so a classifier gets 12 classes" in said
    whole = written(tmp_path, "pt", [1, 0, 2])
    require_classes(whole, open_source(whole, CONFIG))
    assert capsys.readouterr().err.endswith("3 classes in 3 images: label 0 1, label 1 1, label 2 1\n")


# ---- Files that are passed over


def test_every_file_is_read_or_counted_and_strict_refuses(tmp_path, capsys):
    url = fill(tmp_path / "set", "a.png", "b.jfif", "c.jpe")
    for name in ("x.heic", "y.heic", "labels.csv", ".a.csv", ".c.png", ".DS_Store"):
        (tmp_path / "set" / name).write_bytes(b"x")
    sentence = "6 files are passed over: 2 .csv, 2 .heic, 1 without a suffix, 1 .png, such as .DS_Store"
    source = open_source(url, CONFIG)
    assert (source.passed_over, source.images) == (sentence, 3)
    assert open_source(f"{url}/a.png", CONFIG).passed_over == ""
    said = capsys.readouterr().err
    assert f"{url}: {sentence}; if it holds labels, read them with --set data.labels={url}/labels.csv" in said
    refused(url, "6 files are passed over", "; take them out of the source, or leave out --strict", strict=True)
    convert(url, str(tmp_path / "out"), CONFIG)
    assert json.loads((tmp_path / "out" / "_eclipse" / "dataset.json").read_text())["passed_over"] == sentence
    assert open_source(str(tmp_path / "out"), DataConfig(strict=True)).passed_over == ""


ONE, TWO = ("cat/0.png", "cat/1.png"), ("cat/0.png", "dog/1.png")


@pytest.mark.parametrize(
    ("verb", "source", "other", "words"),
    [
        ("poison", ONE, None, "set: has no labels"),
        ("audit", ONE, None, "set: has no labels"),
        ("evaluate", ONE, TWO, "set: has no labels"),
        ("evaluate", TWO, ONE, "other: has no labels"),
        ("matrix", TWO, ONE, "other: has no labels"),
        ("sweep", ONE, TWO, "set: has no labels"),
        ("sweep", TWO, ONE, "other: has no labels"),
        *((verb, "one", TWO, "of one class") for verb in ("poison", "audit", "evaluate", "matrix", "sweep")),
    ],
)
def test_verbs_check_labels_before_they_read_an_image(tmp_path, verb, source, other, words):
    """The images are none, so whoever reads one says so."""
    import eclipse_ray

    url = fill(tmp_path / "set", *(ONE if source == "one" else source))
    beside = fill(tmp_path / "other", *(other or TWO))
    for file in (*(tmp_path / "set").rglob("*.png"), *(tmp_path / "other").rglob("*.png")):
        file.write_bytes(b"no image")
    settings = {}
    if verb == "matrix":
        settings = {"matrix.clean": True, "matrix.defenses": ["none"], "data.output": str(tmp_path / "out")}
    if source == "one":
        (tmp_path / "l.txt").write_text("cat/0.png 1\ncat/1.png 1\n")
        settings["data.labels"] = str(tmp_path / "l.txt")
    out = str(tmp_path / "out")
    calls = {
        "poison": lambda: eclipse_ray.poison("urp", url, out, settings=settings),
        "audit": lambda: eclipse_ray.audit(url, settings=settings),
        "evaluate": lambda: eclipse_ray.evaluate(url, test=beside, settings=settings),
        "matrix": lambda: eclipse_ray.evaluate(url, test=beside, settings=settings),
        "sweep": lambda: eclipse_ray.sweep(url, clean=beside, out=out, settings=settings),
    }
    with pytest.raises(InputError, match=words):
        calls[verb]()


def test_a_list_of_files_may_name_classes(tmp_path):
    (tmp_path / "list.txt").write_text("cat 9.jpg kitten\ndog.jpg puppy\n")
    found = read_label_file(str(tmp_path / "list.txt"))
    assert (found.names, found.labels.tolist()) == (["cat 9.jpg", "dog.jpg"], [0, 1])
    assert found.classes == ["kitten", "puppy"]
    (tmp_path / "words.txt").write_text("9.jpg big cat\n10.jpg dog\n")
    found = read_label_file(str(tmp_path / "words.txt"))
    assert (found.names, found.classes) == (["9.jpg", "10.jpg"], ["big cat", "dog"])


def labels_in_each_form(folder, *values):
    """Return (labels, classes) of images with these labels in each form, or the sentence that refuses them."""
    keys, texts = [f"{row}.png" for row in range(len(values))], list(map(str, values))
    json_texts = [json.dumps({"label": value}) for value in values]
    url = fill(folder / "images", *keys)
    for name, members in (("cls", texts), ("json", json_texts)):
        pairs = [((key, PNG), (f"{row}.{name}", members[row].encode())) for row, key in enumerate(keys)]
        tar(folder / f"{name}/a.tar", *(member for pair in pairs for member in pair))
    for name, column in (("values", values), ("texts", texts)):
        pq.write_table(pa.table({"image": [PNG] * len(keys), "label": list(column)}), folder / f"{name}.parquet")
    (folder / "l.csv").write_text("file,label\n" + "".join(map("{},{}\n".format, keys, texts)))
    (folder / "l.json").write_text(json.dumps(dict(zip(keys, values, strict=True))))
    asked = [(f"{folder}/{name}", {}) for name in ("cls", "json", "values.parquet", "texts.parquet")]
    asked += [(url, {"labels": f"{folder}/{name}"}) for name in ("l.csv", "l.json")]
    found = {}
    for where, settings in asked:
        form = settings.get("labels", where).rpartition("/")[2]
        try:
            labels, classes = labels_at(where, **settings)
            found[form] = ([-1 if label is None else label for label in labels.values()], classes)
        except InputError as error:
            found[form] = str(error)
    return found


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        (["cat", " cat", "cat\t", "dog"], [0, 0, 0, 1], ["cat", "dog"]),
        ([" 1", "2", "0 "], [1, 2, 0], None),
        (["+1", "0", "2"], [1, 0, 2], None),
        (["1.0", "+0.", "2.00", "-1.0"], [1, 0, 2, -1], None),
        ([3, 0, -1], [3, 0, -1], None),
        (["c10", "c9", "-1", " c1", "-1.0", "-01"], [2, 1, -1, 0, -1, -1], ["c1", "c9", "c10"]),
        (["A", "0", "B", "1.0"], [2, 0, 3, 1], ["0", "1.0", "A", "B"]),
        (["a man", "1e", "10-19", "e3"], [2, 1, 0, 3], ["10-19", "1e", "a man", "e3"]),
    ],
)
def test_a_label_means_the_same_in_each_form(tmp_path, values, labels, classes):
    found = labels_in_each_form(tmp_path, *values)
    assert found == dict.fromkeys(found, (labels, classes))
    if set(values) == set(classes or ()):
        tops = {f"{name}/{row}.png": labels[row] for row, name in enumerate(values)}
        assert labels_at(fill(tmp_path / "tops", *tops), labels="folder") == (tops, classes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        *(
            (
                (wrong, "0"),
                f"label {wrong.strip()!r} is neither a whole number, such as 3, nor the name of a class",
            )
            for wrong in ("", " ", "1e0", "1.000e+00", "0.5", ".5", "+1.5", "-1e3", "9" * 19)
        ),
        *(
            ((wrong, name), "label -2 is out of range, labels begin at 0 and -1 means no label; mend it")
            for name in ("0", "cat")
            for wrong in ("-2", "-2.0")
        ),
        ((-2, 0), "label -2 is out of range, labels begin at 0 and -1 means no label; mend it"),
    ],
)
def test_a_label_that_means_nothing_is_refused_in_the_same_sentence_in_each_form(tmp_path, values, words):
    for form, found in labels_in_each_form(tmp_path, *values).items():
        assert words in found, form


def test_an_image_without_a_label_gets_no_class_folder(tmp_path):
    url = tar(tmp_path / "t/a.tar", ("0.png", PNG), ("0.cls", b"1"), ("1.png", PNG), ("1.cls", b"-1"))
    for layout in ("npz", "webdataset"):
        convert(url, str(tmp_path / layout), CONFIG, layout=layout)
        assert read_labels(open_source(str(tmp_path / layout), CONFIG)).tolist() == [1, -1]
    with pytest.raises(InputError, match="image 1 has no label; use the parquet layout"):
        convert(url, str(tmp_path / "folder"), CONFIG, layout="folder")


KINDS = ("parquet", "webdataset", "npz", "npy", "pt", "pkl", "cifar")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_reads_images_without_labels_if_told_so(tmp_path, kind):
    url = written(tmp_path, kind, [{"a": 0}] * 3 if kind == "parquet" else [0.25, 0.5, 0.75])
    with pytest.raises(InputError):
        labels_at(url)
    config = DataConfig(labels="none")
    found, classes = labels_at(url, labels="none")
    assert (set(found.values()), classes) == ({None}, None)
    assert (load_images(url, config).images == PIXELS[:3]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [labels_at, lambda url: read_labels(open_source(url, CONFIG))])
def test_a_label_below_minus_1_is_refused_in_every_format(tmp_path, kind, read):
    with pytest.raises(InputError, match="label -2 is out of range, labels begin at 0 and -1 means no label"):
        read(written(tmp_path, kind, [0, -2, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_labels_win_in_every_format(tmp_path, kind):
    url = written(tmp_path, kind, [0, 1, 2], [2, 0, 1])
    assert list(labels_at(url)[0].values()) == [0, 1, 2]
    assert list(labels_at(url, label_column="named")[0].values()) == [2, 0, 1]
    assert set(labels_at(url, label_column="named", labels="none")[0].values()) == {None}
    refused(url, "data.label" if kind == "npy" else "data.label_column", label_column="absent")


def test_labels_in_a_dict_are_found_as_they_are_written_there(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"X": PIXELS[:3], "Y": [0, 1, 2], "Coarse": [2, 0, 1]}))
    assert list(labels_at(str(tmp_path), label_column="Coarse")[0].values()) == [2, 0, 1]


@pytest.mark.parametrize("layout", ["parquet", "npz", "webdataset"])
def test_other_labels_do_not_have_the_names_of_the_classes(tmp_path, layout):
    name, values = ("txt", ["3", "1", "0"]) if layout == "webdataset" else ("coarse", [3, 1, 0])
    extras = pa.table({name: values})
    table = table_of(PIXELS[:3], [0, 1, 0], extras=extras, classes=["cat", "dog"])
    url = helpers.write_set(tmp_path / layout, table, classes=["cat", "dog"], layout=layout)
    assert labels_at(url) == ({f"im/{row:03d}": row % 2 for row in range(3)}, ["cat", "dog"])
    assert labels_at(url, label_column=name) == ({"im/000": 3, "im/001": 1, "im/002": 0}, None)
