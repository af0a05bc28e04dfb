"""Hostile files: a harmful pickle, tag or path in each place where one could enter. None of it ever runs."""

import os
import pickle
import resource
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.perturbation import apply
from eclipse_ray.errors import InputError
from tests.datasets.helpers import CONFIG, PNG, fill, refused, tar
from tests.support import call

IMAGES = np.zeros((2, 32, 32, 3), np.uint8)


class Touch:
    """Creates the file `canary` when it is unpickled, through the shell or through eval."""

    def __init__(self, canary: Path, by_eval: bool = False) -> None:
        self.canary, self.by_eval = canary, by_eval

    def __reduce__(self):
        by_eval = eval, (f"open({str(self.canary)!r}, 'w').close()",)
        return by_eval if self.by_eval else (os.system, (f"touch '{self.canary}'",))


@pytest.fixture
def canary(tmp_path):
    """A path that a harmful pickle creates, as is checked here; it must not exist when the test ends."""
    path = tmp_path / "canary"
    for by_eval in (False, True):
        pickle.loads(pickle.dumps(Touch(path, by_eval)))
        assert path.exists()
        path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture
def source(tmp_path):
    """An empty folder."""
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


@pytest.fixture
def fails(monkeypatch, capfd):
    """Checks that a command ends with code 2 and one sentence with these words."""

    def run(words: list[str], *arguments: str) -> None:
        code, _, err = call(monkeypatch, capfd, *arguments)
        assert code == 2
        # torch may print a warning first. Our own message is one sentence.
        one_sentence(err[err.index("error: ") :], *words)

    return run


def one_sentence(message: str, *words: str) -> None:
    assert "\n" not in message.strip()
    assert len(message) < 600
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "train", "x.pkl", "x.pickle"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("by_eval", [False, True])
def test_cifar_batch(source, canary, name, protocol, by_eval):
    attack = Touch(canary, by_eval)
    for content in ({"data": IMAGES.reshape(2, -1), "labels": [0, 1], "extra": attack}, attack, [attack]):
        (source / name).write_bytes(pickle.dumps(content, protocol))
        refused(source, name, "can run code")


def test_cifar_class_names(source, canary):
    batch = {"data": IMAGES.reshape(2, -1), "labels": [0, 1]}
    (source / "data_batch_1").write_bytes(pickle.dumps(batch, 2))
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": Touch(canary)}, 2))
    refused(source, "batches.meta", "can run code")


@pytest.mark.parametrize("attack", [b"\x80\x02}r\xff\xff\xff\x7f.", b"\x80\x05\x96\0\0\0\0\x08\0\0\0."])
def test_a_few_bytes_of_pickle_cannot_ask_for_gigabytes(source, attack):
    (source / "data_batch_1").write_bytes(attack)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(source, "not a readable pickle")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize("place", ["images", "labels", "other"])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz(source, canary, place, compressed):
    arrays = {"images": IMAGES, "labels": np.zeros(2, int)}
    arrays[place] = np.array([Touch(canary), None], dtype=object)
    (np.savez_compressed if compressed else np.savez)(source / "a.npz", **arrays)
    refused(source, "a.npz", "pickled objects, which can run code")


@pytest.mark.parametrize("name", ["x_train.npy", "y_train.npy"])
def test_npy_of_images_or_of_labels_beside_them(source, canary, name):
    np.save(source / "x_train.npy", np.zeros((2, 32, 32, 3), np.float32))
    write_published(source / name, [Touch(canary), None], "npy")
    refused(source, name, "pickled objects, which can run code")
    (source / name).write_bytes(pickle.dumps(Touch(canary)))
    refused(source, name, "not a readable NumPy file")


FORMS = {
    "pair": lambda bad: [(bytes(192), 0), (bytes(192), bad)],
    "image": lambda bad: [(bad, 0)],
    "dict": lambda bad: {"data": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2), "extra": bad},
    "tuple": lambda bad: (torch.zeros(2, 3, 8, 8), bad),
    "lone": lambda bad: bad,
    "objects": lambda bad: np.array([bad, None], dtype=object),
}


def write_published(file: Path, content: object, form: str) -> None:
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    elif form == "npy":
        np.save(file, np.array(content, dtype=object), allow_pickle=True)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".pickle"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", FORMS)
def test_published_set(source, canary, suffix, form, place):
    file = source / f"poison{suffix}"
    write_published(file, FORMS[place](Touch(canary)), form)
    refused(source, file.name, "not a readable pickle" if place == "objects" else "can run code")


def test_tensor_whose_values_are_a_pickle_of_their_own(source, canary):
    class Tensor:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Touch(canary)),)

    (source / "poison.pkl").write_bytes(pickle.dumps([(Tensor(), 0)]))
    refused(source, "poison.pkl", "it was not written by torch.save")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "npy"])
@pytest.mark.parametrize("role", ["perturbation", "index"])
def test_perturbation_and_index_file(tmp_path, canary, sets, form, role):
    good, _, out = sets
    bad = tmp_path / ("bad.npy" if form == "npy" else "bad.pt")
    write_published(bad, [Touch(canary), None] if form == "npy" else {"delta": Touch(canary)}, form)
    delta, index = (bad, "order") if role == "perturbation" else (tmp_path / "delta.npy", str(bad))
    with pytest.raises(InputError) as caught:
        apply(str(delta), good, out, CONFIG, index=index)
    one_sentence(str(caught.value), bad.name, "can run code")


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pt", "pth", "npy", "PKL", "pyd", "npz", "extra.pkl.gz"])
def test_webdataset_member(source, canary, extension):
    tar(source / "a.tar", ("0.png", PNG), (f"0.{extension}", pickle.dumps(Touch(canary))))
    refused(source, f"0.{extension}", "may hold a pickle, which can run code")


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/tmp/out.png", "./../out.png"])
def test_paths_that_lead_out_of_a_tar(tmp_path, source, name):
    refused(tar(source / "a.tar", ("0.png", PNG), (name, PNG)), "points out of the archive")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar_also_behind_an_index_that_hides_them(source, kind):
    member = tarfile.TarInfo("1.png")
    member.type, member.linkname = kind, "/etc/passwd"
    refused(tar(source / "a.tar", ("0.png", PNG), member), "1.png", "only plain files are read")
    (source / "a.idx").write_text(f"v1.2 2\npng 512 {len(PNG)} 0.png\npng 1536 0 1.png\n")
    refused(source, "1.png", "only plain files are read", reading=True)


@pytest.mark.parametrize(
    "name", ["arrow.py_extension_type", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor"]
)
def test_parquet_extension_metadata(source, canary, name):
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Touch(canary), 0)}
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("extra", pa.binary(), metadata=metadata)])
    pq.write_table(pa.table({"image": [PNG], "extra": [b"x"]}, schema), source / "a.parquet")
    refused(source, "a.parquet", "may run code")


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_checkpoint(tmp_path, canary, fails, suffix, form):
    content = {"time_embed.0.weight": torch.zeros(2), "extra": Touch(canary)}
    file = tmp_path / f"weights{suffix}"
    write_published(file, Touch(canary) if form == "pickle" else content, form)
    fails([file.name], "import-checkpoint", str(file), "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
@pytest.mark.parametrize("place", ["file", "set"])
def test_yaml_tag(tmp_path, canary, monkeypatch, capfd, tag, place):
    attack = f"{tag} [\"touch '{canary}'\"]"
    (tmp_path / "config.yaml").write_text(f"run:\n  seed: {attack}\n")
    chosen = ["--config", str(tmp_path / "config.yaml")] if place == "file" else ["--set", f"run.seed={attack}"]
    code, _, err = call(monkeypatch, capfd, "convert", str(tmp_path), str(tmp_path / "out"), *chosen)
    assert code == 2
    assert "could not determine a constructor" in err
    assert err.startswith("error: ")


def test_a_note_beside_a_dataset_is_data(source, canary):
    fill(source, "cat/0.png", "dog/0.png", "_eclipse/dataset.json")
    (source / "_eclipse/dataset.json").write_bytes(pickle.dumps(Touch(canary)))
    assert open_source(str(source), CONFIG).classes == ["cat", "dog"]


@pytest.fixture
def sets(tmp_path):
    """A labelled set of two classes without harm, and where a harmful published set is to be written."""
    images = np.arange(4 * 768, dtype=np.uint8).reshape(4, 16, 16, 3)
    np.savez(tmp_path / "clean.npz", images=images, labels=[0, 1, 0, 1])
    np.save(tmp_path / "delta.npy", np.zeros((4, 3, 16, 16), np.float32))
    return str(tmp_path / "clean.npz"), str(tmp_path / "bad.pkl"), str(tmp_path / "out")


SOURCES = {
    "convert": lambda good, bad, out: ["convert", bad, out],
    "convert, --labels-from": lambda good, bad, out: ["convert", good, out, "--labels-from", bad],
    "split": lambda good, bad, out: ["split", bad, "--clean", "1", "--out", out],
    "poison": lambda good, bad, out: ["poison", "urp", bad, out],
    "apply": lambda good, bad, out: ["apply", str(Path(good).parent / "delta.npy"), bad, out],
    "apply, DELTA": lambda good, bad, out: ["apply", bad, good, out],
    "apply, --index": lambda good, bad, out: [
        *("apply", str(Path(good).parent / "delta.npy"), good, out),
        *("--index", bad),
    ],
    "train": lambda good, bad, out: ["train", "--clean", bad, "--out", out],
    "audit": lambda good, bad, out: ["audit", bad],
    "evaluate": lambda good, bad, out: ["evaluate", bad, "--test", good],
    "evaluate, --test": lambda good, bad, out: ["evaluate", good, "--test", bad],
    "a matrix": lambda good, bad, out: [
        *("evaluate", good, "--test", good, "--out", out),
        *("--set", f"matrix.poisons=[{{name: published, source: {bad}, label: it}}]"),
        *("--set", "matrix.defenses=[none]"),
    ],
    "sweep": lambda good, bad, out: ["sweep", bad, "--clean", good, "--out", out],
    "sweep, --clean": lambda good, bad, out: ["sweep", good, "--clean", bad, "--out", out],
    "data.labels": lambda good, bad, out: ["convert", good, out, "--set", f"data.labels={bad}"],
}


@pytest.mark.parametrize("place", SOURCES)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_each_place_where_a_verb_reads_a_published_file(canary, sets, fails, place, form):
    good, bad, out = sets
    write_published(Path(bad), [(bytes(768), 0), (bytes(768), Touch(canary))], form)
    fails(["bad.pkl", "can run code"], *SOURCES[place](good, bad, out))


def test_the_source_of_a_purification(world, canary, sets, fails):
    _, bad, out = sets
    write_published(Path(bad), [(bytes(768), 0), (bytes(768), Touch(canary))], "pickle")
    fails(["bad.pkl", "can run code"], "purify", bad, out, "--denoiser", world.denoiser)


@pytest.mark.parametrize(("suffix", "form"), [(".npy", "npy"), (".pt", "zip"), (".pkl", "pickle")])
def test_label_file(tmp_path, canary, sets, fails, suffix, form):
    file = tmp_path / f"labels{suffix}"
    write_published(file, [0, 1, 0, Touch(canary)], form)
    good, _, out = sets
    fails([file.name, "can run code"], "convert", good, out, "--set", f"data.labels={file}")
