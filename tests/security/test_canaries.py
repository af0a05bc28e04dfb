"""Hostile files: a harmful pickle, tag or path in each place where one could enter. None of it ever runs."""

import io
import os
import pickle
import resource
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eclipse_ray import cli
from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source, read_tables
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.perturbation import apply
from eclipse_ray.errors import InputError

CONFIG = DataConfig()
PNG = encode_image(np.zeros((2, 2, 3), np.uint8), "png")
IMAGES = np.zeros((2, 32, 32, 3), np.uint8)


class Touch:
    """Creates the file `canary` when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def canary(tmp_path):
    """A path that a harmful pickle creates, as is checked here; it must not exist when the test ends."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Touch(path)))
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


def one_sentence(message: str, *words: str) -> None:
    assert "\n" not in message.strip()
    assert len(message) < 600
    assert all(word in message for word in words), message


def refused(source: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        list(read_tables(open_source(str(source), CONFIG), CONFIG))
    one_sentence(str(caught.value), *words)


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "train", "x.pkl", "x.pickle"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar_batch(tmp_path, canary, name, protocol):
    content = {"data": IMAGES.reshape(2, -1), "labels": [0, 1], "extra": Touch(canary)}
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / name).write_bytes(pickle.dumps(content, protocol))
    refused(tmp_path / "src", name, "can run code")


def test_cifar_class_names(tmp_path, canary):
    (tmp_path / "src").mkdir()
    batch = {"data": IMAGES.reshape(2, -1), "labels": [0, 1]}
    (tmp_path / "src" / "data_batch_1").write_bytes(pickle.dumps(batch, 2))
    (tmp_path / "src" / "batches.meta").write_bytes(pickle.dumps({"label_names": Touch(canary)}, 2))
    refused(tmp_path / "src", "batches.meta", "can run code")


@pytest.mark.parametrize("attack", [b"\x80\x02}r\xff\xff\xff\x7f.", b"\x80\x05\x96\0\0\0\0\x08\0\0\0."])
def test_a_few_bytes_of_pickle_cannot_ask_for_gigabytes(tmp_path, attack):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "data_batch_1").write_bytes(attack)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "src", "not a readable pickle")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize("place", ["images", "labels", "other"])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz(tmp_path, canary, place, compressed):
    arrays = {"images": IMAGES, "labels": np.zeros(2, int)}
    arrays[place] = np.array([Touch(canary), None], dtype=object)
    (tmp_path / "src").mkdir()
    (np.savez_compressed if compressed else np.savez)(tmp_path / "src" / "a.npz", **arrays)
    refused(tmp_path / "src", "a.npz", "pickled objects, which can run code")


def test_npy(tmp_path, canary):
    (tmp_path / "src").mkdir()
    np.save(tmp_path / "src" / "a.npy", np.array([Touch(canary)], dtype=object), allow_pickle=True)
    refused(tmp_path / "src", "a.npy", "pickled objects, which can run code")


def test_npy_that_is_a_plain_pickle(tmp_path, canary):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.npy").write_bytes(pickle.dumps(Touch(canary)))
    refused(tmp_path / "src", "a.npy", "not a readable NumPy file")


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
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".pickle"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", FORMS)
def test_published_set(tmp_path, canary, suffix, form, place):
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / f"poison{suffix}"
    write_published(file, FORMS[place](Touch(canary)), form)
    refused(tmp_path / "src", file.name, "not a readable pickle" if place == "objects" else "can run code")


def test_tensor_whose_values_are_a_pickle_of_their_own(tmp_path, canary):
    class Tensor:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Touch(canary)),)

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "poison.pkl").write_bytes(pickle.dumps([(Tensor(), 0)]))
    refused(tmp_path / "src", "poison.pkl", "it was not written by torch.save")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("role", ["perturbation", "index"])
def test_perturbation_and_index_file(tmp_path, canary, form, role):
    np.savez(tmp_path / "clean.npz", images=IMAGES, labels=np.zeros(2, int))
    np.save(tmp_path / "good.npy", np.zeros((2, 3, 32, 32), np.float32))
    write_published(tmp_path / "bad.pt", {"delta": Touch(canary)}, form)
    delta, index = ("bad.pt", "order") if role == "perturbation" else ("good.npy", str(tmp_path / "bad.pt"))
    with pytest.raises(InputError) as caught:
        apply(str(tmp_path / delta), str(tmp_path / "clean.npz"), str(tmp_path / "out"), CONFIG, index=index)
    one_sentence(str(caught.value), "bad.pt", "can run code")


@pytest.mark.parametrize("role", ["perturbation", "index", "labels"])
def test_npy_of_objects_beside_or_as_a_perturbation(tmp_path, canary, role):
    (tmp_path / "src").mkdir()
    good, bad = tmp_path / "src" / "x_train.npy", tmp_path / "src" / "y_train.npy"
    np.save(good, np.zeros((2, 32, 32, 3), np.float32))
    np.save(bad, np.array([Touch(canary), None], dtype=object), allow_pickle=True)
    if role == "labels":
        refused(tmp_path / "src", "y_train.npy", "pickled objects, which can run code")
        return
    np.savez(tmp_path / "clean.npz", images=IMAGES, labels=np.zeros(2, int))
    delta, index = (str(bad), "order") if role == "perturbation" else (str(good), str(bad))
    with pytest.raises(InputError) as caught:
        apply(delta, str(tmp_path / "clean.npz"), str(tmp_path / "out"), CONFIG, index=index)
    one_sentence(str(caught.value), "y_train.npy", "pickled objects, which can run code")


def write_tar(folder: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "a.tar", "w") as archive:
        for member in [("0.png", PNG), *members]:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return folder


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pt", "pth", "npy", "PKL", "pyd", "npz", "extra.pkl.gz"])
def test_webdataset_member(tmp_path, canary, extension):
    source = write_tar(tmp_path / "src", (f"0.{extension}", pickle.dumps(Touch(canary))))
    refused(source, f"0.{extension}", "may hold a pickle, which can run code")


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/tmp/out.png", "./../out.png"])
def test_paths_that_lead_out_of_a_tar(tmp_path, name):
    refused(write_tar(tmp_path / "src", (name, PNG)), "points out of the archive")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar(tmp_path, kind):
    member = tarfile.TarInfo("1.png")
    member.type, member.linkname = kind, "/etc/passwd"
    refused(write_tar(tmp_path / "src", member), "1.png", "only plain files are read")


def test_links_behind_an_index_that_hides_them(tmp_path):
    member = tarfile.TarInfo("1.png")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    source = write_tar(tmp_path / "src", member)
    (source / "a.idx").write_text(f"v1.2 2\npng 512 {len(PNG)} 0.png\npng 1536 0 1.png\n")
    refused(source, "1.png", "only plain files are read")


@pytest.mark.parametrize(
    "name", ["arrow.py_extension_type", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor"]
)
def test_parquet_extension_metadata(tmp_path, canary, name):
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": pickle.dumps(Touch(canary), 0)}
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("extra", pa.binary(), metadata=metadata)])
    (tmp_path / "src").mkdir()
    pq.write_table(pa.table({"image": [PNG], "extra": [b"x"]}, schema), tmp_path / "src" / "a.parquet")
    refused(tmp_path / "src", "a.parquet", "may run code")


def call(monkeypatch, capfd, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["eclipse-ray", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capfd.readouterr().err


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_checkpoint(tmp_path, canary, monkeypatch, capfd, suffix, form):
    content = {"time_embed.0.weight": torch.zeros(2), "extra": Touch(canary)}
    file = tmp_path / f"weights{suffix}"
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(Touch(canary)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    code, err = call(monkeypatch, capfd, "import-checkpoint", str(file), "--out", str(tmp_path / "out"))
    assert code == 2
    # torch may print a warning first. Our own message is one sentence.
    one_sentence(err[err.index("error: ") :], file.name)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
@pytest.mark.parametrize("place", ["file", "set"])
def test_yaml_tag(tmp_path, canary, monkeypatch, capfd, tag, place):
    attack = f"{tag} [\"touch '{canary}'\"]"
    (tmp_path / "config.yaml").write_text(f"run:\n  seed: {attack}\n")
    chosen = ["--config", str(tmp_path / "config.yaml")] if place == "file" else ["--set", f"run.seed={attack}"]
    code, err = call(monkeypatch, capfd, "convert", str(tmp_path), str(tmp_path / "out"), *chosen)
    assert code == 2
    assert "could not determine a constructor" in err
    assert err.startswith("error: ")


def test_links_in_folders_are_followed_but_never_round_and_round(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "far.png").write_bytes(PNG)
    source = tmp_path / "src"
    (source / "cat").mkdir(parents=True)
    (source / "cat" / "near.png").write_bytes(PNG)
    (source / "cat" / "linked.png").symlink_to(outside / "far.png")
    (source / "dog").symlink_to(outside)
    (source / "cat" / "loop").symlink_to(source)
    (source / "cat" / "self").symlink_to(source / "cat")
    (source / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    started = time.monotonic()
    opened = open_source(str(source), CONFIG)
    assert time.monotonic() - started < 5
    assert [part.key for part in opened.parts] == ["cat/gone.png", "cat/linked.png", "cat/near.png", "dog/far.png"]
    assert opened.classes == ["cat", "dog"]
    refused(source, "cat/gone.png")


def test_a_note_beside_a_dataset_is_data(tmp_path, canary):
    for name in ("cat", "dog"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "0.png").write_bytes(PNG)
    (tmp_path / "src" / "_eclipse").mkdir()
    (tmp_path / "src" / "_eclipse" / "dataset.json").write_bytes(pickle.dumps(Touch(canary)))
    assert open_source(str(tmp_path / "src"), CONFIG).classes == ["cat", "dog"]


@pytest.fixture
def sets(tmp_path):
    """A labelled set of two classes without harm, and where a harmful published set is to be written."""
    np.savez(
        tmp_path / "clean.npz",
        images=np.arange(4 * 768, dtype=np.uint8).reshape(4, 16, 16, 3),
        labels=[0, 1, 0, 1],
    )
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
def test_each_place_where_a_verb_reads_a_published_file(canary, sets, monkeypatch, capfd, place, form):
    good, bad, out = sets
    write_published(Path(bad), [(bytes(768), 0), (bytes(768), Touch(canary))], form)
    code, err = call(monkeypatch, capfd, *SOURCES[place](good, bad, out))
    assert code == 2
    one_sentence(err[err.index("error: ") :], "bad.pkl", "can run code")


def test_the_source_of_a_purification(world, canary, sets, monkeypatch, capfd):
    _, bad, out = sets
    write_published(Path(bad), [(bytes(768), 0), (bytes(768), Touch(canary))], "pickle")
    code, err = call(monkeypatch, capfd, "purify", bad, out, "--denoiser", world.denoiser)
    assert code == 2
    one_sentence(err[err.index("error: ") :], "bad.pkl", "can run code")


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".pkl"])
def test_label_file(tmp_path, canary, sets, monkeypatch, capfd, suffix):
    file = tmp_path / f"labels{suffix}"
    if suffix == ".npy":
        np.save(file, np.array([Touch(canary), 1, 0, 1], dtype=object), allow_pickle=True)
    else:
        write_published(file, [0, 1, 0, Touch(canary)], "zip" if suffix == ".pt" else "pickle")
    good, _, out = sets
    code, err = call(monkeypatch, capfd, "convert", good, out, "--set", f"data.labels={file}")
    assert code == 2
    one_sentence(err[err.index("error: ") :], file.name, "can run code")
