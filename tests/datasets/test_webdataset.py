import json
import random
import tarfile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.folder import is_dotted
from eclipse_ray.datasets.formats import Source, open_source, read_labels, read_parts
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.table import image_bytes
from eclipse_ray.datasets.webdataset import escape_key, unescape_key
from eclipse_ray.errors import InputError
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import CONFIG, PNG, fill, read_all, read_rows, refused, tar


def sample(key, label=None, **others):
    members = [(f"{key}.png", PNG + key.encode())]
    members += [] if label is None else [(f"{key}.cls", str(label).encode())]
    return members + [(f"{key}.{name}", data) for name, data in others.items()]


def labelled_in_json(*labels):
    texts = [json.dumps({"label": label}).encode() for label in labels]
    return [member for n, text in enumerate(texts) for member in ((f"{n}.png", PNG), (f"{n}.json", text))]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_have_images_labels_and_what_came_along(tmp_path, format):
    first = sample("cat/0001", 3, txt="a cat ü".encode(), json=b'{"n": 1}', feature=b"\x00\xff")
    second = [("cat/0002.JPG", b"jpeg"), ("cat/0002.cls", b" 1\n")]
    long = sample("x" * 90 + "/" + "y" * 120 if format != tarfile.USTAR_FORMAT else "x" * 90, 0)
    url = tar(tmp_path / "a.tar", *first, *second, *long, format=format)
    table = read_all(url)
    assert table["id"].to_pylist() == ["cat/0001", "cat/0002", long[0][0].removesuffix(".png")]
    assert table["label"].to_pylist() == [3, 1, 0]
    assert image_bytes(table) == [first[0][1], b"jpeg", long[0][1]]
    assert table["image"].to_pylist()[1]["path"] == "cat/0002.JPG"
    assert table["txt"].to_pylist() == ["a cat ü", None, None]
    assert table["json"].to_pylist() == ['{"n": 1}', None, None]
    assert table["feature"].to_pylist() == [b"\x00\xff", None, None]


def test_any_range_of_rows_is_read(tmp_path):
    names = [f"{n:04d}" for n in range(50)]
    url = tar(tmp_path / "a.tar", *(member for name in names for member in sample(name, 1)))
    rng = random.Random(0)
    for _ in range(30):
        start = rng.randrange(50)
        stop = rng.randrange(start + 1, 51)
        rows = read_rows(url, start, stop)
        assert rows["id"].to_pylist() == names[start:stop]
        assert image_bytes(rows) == [PNG + name.encode() for name in names[start:stop]]


HIDDEN = [
    *(".git/objects/0a", ".git/index", "cat/.DS_Store", "cat/._a.jpg", "._cat/x.pkl", ".ipynb_checkpoints/a.png"),
    *("__MACOSX/cat/._a.png", "__MACOSX/cat/b.png", "dog/.thumbnails/a.png", ".Trash-0/cat/a.png"),
]


@pytest.mark.parametrize("shared", ["", "./"])
def test_what_is_hidden_is_passed_over_in_a_tar_as_in_a_folder_and_may_lack_in_an_index(tmp_path, shared):
    seen = ["_other/_0.png", "cat/_0.png", "dog/b.png"]
    plain = read_all(fill(tmp_path / "plain", *seen, *HIDDEN))
    assert (plain["id"].to_pylist(), plain["label"].to_pylist()) == (seen, [0, 1, 2])
    words = "10 files are passed over: 5 .png, 3 without a suffix, 1 "
    assert open_source(str(tmp_path / "plain"), CONFIG).passed_over.startswith(words)
    folder = tarfile.TarInfo(f"{shared}cat")
    folder.type = tarfile.DIRTYPE
    long = f"cat/.{'x' * 120}/a.png"
    keys = [*HIDDEN[:5], *seen[:2], *HIDDEN[5:7], long, seen[2], *HIDDEN[7:9]]
    url = tar(tmp_path / "tar/a.tar", folder, *((f"{shared}{key}", PNG) for key in keys), folder)
    with tarfile.open(tmp_path / "tar/a.tar") as archive:
        files = [each for each in archive if each.isfile()]
    lines = {each.name.removeprefix("./"): f"x {each.offset_data} {each.size} {each.name}" for each in files}
    for kept in ((), lines, seen):
        if kept:
            (tmp_path / "tar/a.idx").write_text("\n".join(["v1.2 3", *(lines[name] for name in kept)]))
        rows = read_all(url)
        assert [f"{key}.png" for key in rows["id"].to_pylist()] == seen
        assert rows["label"].to_pylist() == [0, 1, 2]
        assert open_source(url, CONFIG).passed_over == f"{words}.jpg, 1 .pkl, such as a.tar/{HIDDEN[0]}"
        refused(url, words, strict=True)
    tar(tmp_path / "tar/b.tar", (".only", PNG))
    assert open_source(url, CONFIG).passed_over.startswith("11 files are passed over")


def test_labels_come_from_json_when_there_is_no_cls_or_when_named(tmp_path):
    both = [("0.png", PNG), ("0.json", json.dumps({"label": 4, "fine": 7}).encode())]
    url = tar(tmp_path / "a.tar", *both)
    assert read_all(url)["label"].to_pylist() == [4]
    assert read_all(url, label_column="fine")["label"].to_pylist() == [7]
    refused(url, "no sample has a member 'fin', and no .json member has such a field", label_column="fin")
    url = tar(tmp_path / "two" / "a.tar", *both, ("0.cls", b"1"))
    assert read_all(url)["label"].to_pylist() == [1]
    named = read_all(url, label_column="fine")
    assert (named["label"].to_pylist(), named["cls"].to_pylist()) == ([7], ["1"])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("img.v2.jpg", PNG), ("img.v3.jpg", PNG)], ["img.v2.jpg and img.v3.jpg"]),
        ([("a.jpg", PNG), ("a.png", PNG)], ["a.jpg and a.png"]),
        ([("a.jpg", PNG), ("a.JPG", PNG)], ["a.jpg and a.JPG"]),
        ([*sample("a", 1), *sample("b", 1), ("a.txt", b"")], ["two places", "a.cls and a.txt"]),
        ([*sample("a", 1), *sample("b")], ["'a' has a label and 'b' has none"]),
        ([("a.png", PNG), ("a.cls", b"0.5")], ["a.cls", "'0.5'", "whole number"]),
        ([("a.png", PNG), ("a.json", b'{"label": 1.5}')], ["a.json", "1.5", "integer"]),
        ([("a.png", PNG), ("a.json", b"{")], ["a.json", "not readable JSON"]),
        ([("a.png", PNG), ("a.cls", b"\xff")], ["a.cls", "UTF-8"]),
        ([("a.png", PNG), ("README", b"x")], ["README", "no extension"]),
        ([("a.txt", b"x")], ["none of its 1 samples has an image"]),
        ([("a.png", PNG), ("a.label", b"1")], ["a.label", "taken"]),
    ],
)
def test_what_means_nothing_is_refused_before_a_run(tmp_path, members, words):
    refused(tar(tmp_path / "a.tar", *members), str(tmp_path), *words)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    url = tar(tmp_path / "a.tar", *sample("a", 2))
    (tmp_path / "_eclipse").mkdir()
    (tmp_path / "_eclipse" / "dataset.json").write_text('{"classes": ["x", "y"]}')
    refused(url, "label 2 is out of range, there are 2 classes")


def test_keys_must_differ_between_tars_or_take_their_name_along(tmp_path):
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / name, *sample("0"))
    refused(tmp_path, "a.tar and b.tar both have a sample '0'")
    assert read_all(tmp_path, tar_ids="path")["id"].to_pylist() == ["a.tar/0", "b.tar/0"]


@pytest.mark.parametrize(
    "keys",
    [
        ("train/cat/0", "test/dog/0"),
        ("./set/train/0", "./set/val/0", "./set/extra/0"),
        ("a/trainA/0", "a/testA/0"),
        ("split=train/0", "split=test/0"),
    ],
)
def test_folders_of_several_splits_in_tars_are_a_question(tmp_path, keys):
    url = tar(tmp_path / "one" / "a.tar", *(member for key in keys for member in sample(key)), ("README.md", b""))
    refused(url, "lie in folders of more than one split", "make tars of one split each", labels="none")
    for place, key in enumerate(keys):
        tar(tmp_path / "each" / f"{place}.tar", *sample(key))
    refused(tmp_path / "each", "lie in folders of more than one split")
    assert read_all(tmp_path / "each" / "0.tar")["id"].to_pylist() == [keys[0].removeprefix("./")]


@pytest.mark.parametrize(
    "keys", [("bullet_train/0", "cat/0", "test_tube/0"), ("train/0", "train/1"), ("train/cat/0", "train/dog/0")]
)
def test_other_folders_in_a_tar_are_one_set(tmp_path, keys):
    url = tar(tmp_path / "a.tar", *(member for key in keys for member in sample(key, 0)))
    assert read_all(url)["id"].to_pylist() == list(keys)


@pytest.mark.parametrize("shared", ["", "./", "set/", "a/b/"])
def test_folders_in_tars_without_labels_are_classes_as_in_a_folder(tmp_path, shared):
    for place, keys in enumerate((("dog/0", "cat/1"), ("dog/2", "dog/x/3"))):
        tar(tmp_path / f"{place}.tar", *(member for key in keys for member in sample(f"{shared}{key}", txt=b"a")))
    for labels in (None, "folder"):
        config = DataConfig(labels=labels)
        source = open_source(str(tmp_path), config)
        assert source.classes == ["cat", "dog"]
        assert read_all(tmp_path, labels=labels)["label"].to_pylist() == [1, 0, 1, 1]
        assert read_labels(source).tolist() == [1, 0, 1, 1]
    assert "label" not in read_all(tmp_path, labels="none").column_names


def test_numbered_tars_that_hold_a_folder_of_their_number_may_be_parts(tmp_path):
    for number in ("00000", "00001"):
        tar(tmp_path / f"{number}.tar", *sample(f"{number}/a{number}"))
    refused(tmp_path, "00000.tar lie in a folder of its number", "data.labels=folder")
    assert "label" not in read_all(tmp_path, labels="none").column_names
    assert read_all(tmp_path, labels="folder")["label"].to_pylist() == [0, 1]


def test_folders_in_tars_are_doubtful_as_folders_are_and_a_setting_answers(tmp_path):
    cases = {
        ("0/a", "2/b"): "numbered with gaps",
        ("images/a", "masks/b"): "parts of a dataset",
        ("cat/a", "b"): "beside them (b)",
        ("dev/a", "eval/b", "ops/c"): "more than one split",
        ("toy test/a", "toy train/b"): "more than one split",
    }
    for number, (keys, words) in enumerate(cases.items()):
        url = tar(tmp_path / str(number) / "a.tar", *(member for key in keys for member in sample(key)))
        refused(url, words, "data.labels=folder")
        if "b" in keys:
            refused(url, words, labels="folder")
            continue
        tops = [key.partition("/")[0] for key in keys]
        assert open_source(url, DataConfig(labels="folder")).classes == tops
        assert read_all(url, labels="folder")["label"].to_pylist() == list(range(len(keys)))
    refused(
        tar(tmp_path / "twice/a.tar", *sample("dog/cat/0"), *sample("dog/dog/1")),
        "without labels: --set data.labels=none",
    )
    one = tar(tmp_path / "one/a.tar", *sample("dog/0"), *sample("dog/1"))
    assert "label" not in read_all(one).column_names
    assert read_all(one, labels="folder")["label"].to_pylist() == [0, 0]


def test_folders_of_tars_are_the_classes_and_not_those_in_them_if_there_are_both(tmp_path):
    tar(tmp_path / "cat/a.tar", *sample("x/0"), *sample("y/1"))
    tar(tmp_path / "dog/a.tar", *sample("x/2"), *sample("y/3"))
    assert read_all(tmp_path, labels="folder")["label"].to_pylist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("suffix", "mode"), [("tar.gz", "gz"), ("tgz", "gz"), ("tar.bz2", "bz2"), ("tar.xz", "xz")]
)
def test_compressed_tars_are_refused(tmp_path, suffix, mode):
    refused(tar(tmp_path / f"a.{suffix}", *sample("a"), mode=f"w:{mode}"), "compressed")


@pytest.mark.parametrize(
    ("members", "classes", "labels"),
    [
        ([("0.png", PNG), ("0.cls", b"dog"), ("1.png", PNG), ("1.cls", b"cat\n")], ["cat", "dog"], [1, 0]),
        ([("0.png", PNG), ("0.json", b'{"label": "7"}')], None, [7]),
        ([m for n, name in enumerate("AB01") for m in sample(f"{n}", name)], ["0", "1", "A", "B"], [2, 3, 0, 1]),
        (labelled_in_json("A", "1", "0"), ["0", "1", "A"], [2, 1, 0]),
        (labelled_in_json("1.0", 0.0, "2"), None, [1, 0, 2]),
        ([*sample("0", "1.0"), *sample("1", "0")], None, [1, 0]),
        ([*sample("0", "10-19"), *sample("1", "0-9")], ["0-9", "10-19"], [1, 0]),
        ([*sample("0", "age=old"), *sample("1", "old")], ["age=old", "old"], [0, 1]),
        ([("0.png", PNG), ("0.cls", b"\xef\xbb\xbf7\n")], None, [7]),
        # -1 is no label, also beside names.
        (
            [m for n, name in enumerate(["cat", "dog", "-1"]) for m in sample(f"{n}", name)],
            ["cat", "dog"],
            [0, 1, -1],
        ),
        (labelled_in_json("cat", "dog", -1), ["cat", "dog"], [0, 1, -1]),
        ([("0.png", PNG), ("0.json", b'\xef\xbb\xbf{"label": "cat"}')], ["cat"], [0]),
    ],
)
def test_labels_may_be_names_of_classes(tmp_path, members, classes, labels):
    url = tar(tmp_path / "a.tar", *members)
    source = open_source(url, CONFIG)
    assert (source.classes, read_labels(source).tolist()) == (classes, labels)
    assert read_all(url)["label"].to_pylist() == labels


def test_numbers_are_names_if_another_tar_has_a_name_unless_a_note_names_the_classes(tmp_path):
    url = tar(tmp_path / "a.tar", *sample("a", 1), *sample("b", 0))
    assert read_all(url)["label"].to_pylist() == [1, 0]
    tar(tmp_path / "b.tar", *sample("c", "cat"))
    assert open_source(url, CONFIG).classes == ["0", "1", "cat"]
    (tmp_path / "_eclipse").mkdir()
    (tmp_path / "_eclipse" / "dataset.json").write_text('{"classes": ["1", "cat", "0"]}')
    source = open_source(url, CONFIG)
    assert (source.classes, read_labels(source).tolist()) == (["1", "cat", "0"], [1, 0, 1])
    assert read_all(url)["label"].to_pylist() == [1, 0, 1]


def test_numbers_in_json_beside_names_are_refused(tmp_path):
    url = tar(tmp_path / "a.tar", *labelled_in_json("cat", 0))
    refused(url, "labels of 1.json are numbers, others are names, such as cat")


def test_a_label_that_is_not_read_may_be_left_out(tmp_path):
    url = tar(tmp_path / "a.tar", *labelled_in_json([1, 2], True), ("2.png", PNG), ("2.cls", b"\xff"))
    refused(url, "0.json holds the label [1, 2]")
    assert "label" not in read_all(url, labels="none").column_names


@pytest.mark.parametrize("indexed", [False, True])
def test_a_field_that_may_hold_the_labels_is_named(tmp_path, capsys, indexed):
    members = [("0.png", PNG), ("0.json", b'{"id": 5, "target": [1], "Class": "cat"}')]
    url = tar(tmp_path / "a.tar", *members)
    if indexed:
        (tmp_path / "a.idx").write_text(index_of(tmp_path / "a.tar"))
    open_source(url, CONFIG)
    said = f"{url}: read without labels; 'Class' may hold them: --set data.label_column=Class"
    assert said in capsys.readouterr().err
    open_source(url, DataConfig(labels="none"))
    open_source(tar(tmp_path / "b" / "a.tar", *members, ("0.cls", b"1")), CONFIG)
    assert "may hold" not in capsys.readouterr().err


def test_cut_and_joined_tars_are_refused(tmp_path):
    members = [member for n in range(5) for member in sample(f"{n}", 0)]
    url = tar(tmp_path / "a.tar", *members)
    file = tmp_path / "a.tar"
    whole = file.read_bytes()
    body = whole.rstrip(b"\0")
    body += bytes(-len(body) % 512)
    for cut in (len(body), len(body) - 512, 512, 700):
        file.write_bytes(whole[:cut])
        refused(url, "a.tar")
    for content, words in ((whole + whole, "joined by `cat`"), (b"", "cut short"), (bytes(1024), "no images")):
        file.write_bytes(content)
        refused(url, words)


def index_of(file):
    lines = {}
    with tarfile.open(file) as archive:
        for member in archive:
            key, _, extension = member.name.removeprefix("./").partition(".")
            words = f"{extension} {member.offset_data} {member.size} {member.name}"
            lines[key] = f"{lines[key]} {words}" if key in lines else words
    return f"v1.2 {len(lines)}\n" + "\n".join(lines.values()) + "\n"


def test_an_index_saves_the_headers_and_must_fit(tmp_path):
    members = [member for n in range(9) for member in sample(f"{n}", n)]
    url = tar(tmp_path / "a.tar", *members)
    file, index = tmp_path / "a.tar", tmp_path / "a.idx"
    plain = read_all(url)
    index.write_text(index_of(file))
    assert read_all(url).equals(plain)
    assert read_rows(url, 4, 6)["id"].to_pylist() == ["4", "5"]
    whole = index.read_text()
    index.write_text(whole.replace("v1.2", "v1.1"))
    assert read_all(url).equals(plain)
    for damaged in ("", "v1.2 9\npng x y z", whole.replace("png 512 ", "png 0 "), "\xff"):
        index.write_text(damaged)
        refused(url, "delete it or write it anew")
    index.write_text("\n".join(whole.split("\n")[:-2]))
    refused(url, "does not describe a.tar")
    # An index that leaves out a sample in the middle would lose an image.
    lines = whole.split("\n")
    index.write_text("\n".join([*lines[:4], *lines[5:]]))
    refused(url, "does not describe a.tar")


def test_a_remote_tar_is_planned_without_reading_its_images(tmp_path):
    big = np.random.default_rng(0).bytes(300_000)
    members = [m for n in range(20) for m in ((f"{n:02d}.png", big), (f"{n:02d}.cls", b"1"))]
    tar(tmp_path / "a.tar", *members)
    store = Store(f"memory://tar-{tmp_path.name}")
    store.write("a.tar", (tmp_path / "a.tar").read_bytes())
    ranges = []
    original = type(store.fs).cat_file

    def counting(self, path, start=None, end=None, **options):
        data = original(self, path, start=start, end=end, **options)
        ranges.append(len(data) if path.endswith(".tar") else 0)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store.fs), "cat_file", counting)
        source = open_source(store.url, CONFIG)
        assert source.images == 20
        assert sum(ranges) < 0.1 * 20 * len(big)
        ranges.clear()
        rows = read_parts(source, [("a.tar", 7, 9)])
        assert rows["id"].to_pylist() == ["07", "08"]
        # A worker reads the headers once, and then exactly the bytes of its rows.
        assert max(ranges) < 2 * len(big) + 5 * 1024
        ranges.clear()
        read_parts(source, [("a.tar", 3, 4)])
        assert sum(ranges) < len(big) + 20_000


def test_the_last_part_of_a_compound_extension_names_the_class_as_it_names_the_image(tmp_path):
    members = [(f"{n}.{name}", data) for n in "01" for name, data in (("in.png", PNG), ("label.cls", n.encode()))]
    assert read_all(tar(tmp_path / "a" / "a.tar", *members))["label"].to_pylist() == [0, 1]
    # Of two such members a setting says which; none is chosen, or left out, without a word.
    both = [*members, ("0.coarse.cls", b"5"), ("1.coarse.cls", b"6")]
    both.sort(key=lambda member: member[0][0])
    url = tar(tmp_path / "b" / "a.tar", *both)
    refused(url, "0.label.cls and 0.coarse.cls may both be the class of one sample; say which")
    assert "label" not in read_all(url, labels="none").column_names
    chosen = read_all(url, label_column="coarse.cls")
    assert chosen["label"].to_pylist() == [5, 6]
    assert chosen["label.cls"].to_pylist() == ["0", "1"]


@pytest.mark.parametrize("indexed", [False, True])
def test_the_image_of_a_sample_with_a_mask_is_named_and_the_mask_comes_along(tmp_path, indexed):
    mask = encode_image(np.ones((2, 2, 3), np.uint8), "png")
    url = tar(
        tmp_path / "a.tar",
        *(("0.input.png", PNG), ("0.seg.png", mask), ("0.cls", b"1")),
        *(("1.seg.png", mask), ("1.input.png", PNG), ("1.cls", b"0")),
        *(("2.seg.png", mask), ("2.cls", b"1")),
    )
    if indexed:
        (tmp_path / "a.idx").write_text(index_of(tmp_path / "a.tar"))
    refused(url, "say which is the image, for example --set data.image_column=seg.png")
    config = DataConfig(image_column="input.png")
    table = read_all(url, image_column="input.png")
    # A sample without the named image becomes an error row; its mask does not take the place.
    assert image_bytes(table) == [PNG, PNG, b""]
    assert table["seg.png"].to_pylist() == [mask] * 3
    assert table["label"].to_pylist() == [1, 0, 1]
    assert read_labels(open_source(url, config)).tolist() == [1, 0, 1]
    refused(url, "none of its 3 samples has an image (photo.png)", image_column="photo.png")


def test_a_column_name_of_another_set_changes_nothing_in_a_tar(tmp_path):
    url = tar(tmp_path / "a.tar", *sample("0", 1))
    assert image_bytes(read_all(url, image_column="img")) == [PNG + b"0"]


@given(st.text(max_size=12), st.text(max_size=12))
@example("__MACOSX/a", "a/__MACOSX/b")
def test_keys_hold_any_id(one, other):
    key = escape_key(one)
    assert unescape_key(key) == one
    assert (key == escape_key(other)) == (one == other)
    assert not set(key) & set(". \\\n\0")
    assert key
    assert not key.startswith("/")
    assert not key.endswith("/")
    assert not is_dotted(f"{key}.png")


def test_a_tar_that_changed_since_it_was_listed_is_named(tmp_path):
    url = tar(tmp_path / "a.tar", *sample("0"), *sample("1"))
    assert open_source(url, CONFIG).images == 2
    tar(tmp_path / "a.tar", *sample("0"))
    with pytest.raises(InputError, match=r"a\.tar: has no 2 samples"):
        read_parts(Source(url, "webdataset", None, CONFIG), [("a.tar", 0, 2)])


def test_labels_in_json_behind_an_index_are_read_with_the_rows(tmp_path):
    url = tar(tmp_path / "a.tar", ("0.png", PNG), ("0.json", b'{"fine": 7}'))
    (tmp_path / "a.idx").write_text(index_of(tmp_path / "a.tar"))
    assert read_all(url, label_column="fine")["label"].to_pylist() == [7]
