"""The command line: exit codes, one clear sentence for a mistake, one JSON object for machines, status --watch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eclipse_ray import cli, ledger, verbs
from eclipse_ray.errors import InputError
from eclipse_ray.parameters import declared
from eclipse_ray.results import PurifyResult, StatusResult
from eclipse_ray.storage.store import Store
from eclipse_ray.verbs import VERBS
from tests.datasets.helpers import fill, noise
from tests.diffusion.original_unet import Original, original_unet
from tests.support import call, run_cli

ROOT = Path(__file__).resolve().parents[1]
PRESET = ["--set", "denoiser.preset=debug"]


def folder_of_images(folder, size: int, count: int = 3) -> str:
    keys = [f"{'ab'[index % 2]}/{index}.png" for index in range(count)]
    return fill(folder, *keys, images=noise(count, size))


# What is typed, and what the sentence must say.
MISTAKES = [
    ("purify /no/such/place {out} --denoiser {denoiser}", "/no/such/place"),
    ("purify {empty} {out} --denoiser {denoiser}", "empty"),
    ("purify {poisoned} {out} --denoiser {empty}", "eclipse.json"),
    ("purify {odd} {out} --denoiser {denoiser}", "images are 15x15 pixels"),
    ("purify {poisoned} {out} --denoiser {denoiser} --set purify.t_star=6", "outside 1..5"),
    ("purify {poisoned} {out} --denoiser {denoiser} --set purify.tstar=6", "purify.t_star"),
    ("purify {poisoned} {finished} --denoiser {denoiser} --set run.seed=9", "run.seed: 0 -> 9"),
    ("purify", "data.source is not set"),
    ("evaluate {unlabelled} --test {test}", "has no labels"),
    ("status {empty}", "no purified dataset here"),
]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("cli") / "out")
    result = run_cli("purify", world.poisoned, output, "--denoiser", world.denoiser)
    assert set(result) == {"planned", "ok", "failed", "images_per_second", "output"}
    return output


@pytest.mark.parametrize(("typed", "words"), MISTAKES)
def test_mistakes_end_in_one_sentence_and_exit_2(
    monkeypatch, capfd, world, unlabelled, tmp_path, finished, typed, words
):
    (tmp_path / "empty").mkdir()
    own = {name: tmp_path / name for name in ("out", "empty", "odd")} | {"finished": finished}
    folder_of_images(own["odd"], 15)
    places = {**vars(world), **own, "unlabelled": unlabelled}
    code, out, err = call(monkeypatch, capfd, *(word.format(**places) for word in typed.split()))
    assert code == 2, err
    assert words in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out" / "data").exists()


def takers() -> list[tuple[str, str, list[str]]]:
    """Return each argument and option of each verb that takes a value: the verb, its name, and what is typed."""
    found = []
    for verb, one in VERBS.items():
        parameters = declared(one.function)
        for name, (parameter, declaration) in parameters.items():
            words, said = [verb], declaration.option or f"--{name.replace('_', '-')}"
            if parameter.annotation in (bool, bool | None):
                continue
            for other, (each, meant) in parameters.items():
                text = "" if other == name else "1"
                if each.kind is not each.KEYWORD_ONLY:
                    words.append(text)
                    said = meant.metavar if other == name else said
                elif other == name or each.default is each.empty:
                    words += [said if other == name else f"--{other.replace('_', '-')}", text]
            found.append((verb, said, words))
    return found


@pytest.mark.parametrize(
    ("verb", "said", "words"), takers(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_empty_argument_is_refused_by_its_name_before_anything_is_done(
    monkeypatch, capfd, tmp_path, verb, said, words
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capfd, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [("verify|", "DST"), ("purify|--config|", "--config"), ("report|/x|--audit|/y|--audit|", "--audit")],
)
def test_an_empty_argument_of_a_submitted_command_or_a_list_is_refused_too(monkeypatch, capfd, words, said):
    before = ["submit"] if not words.startswith("report") else []
    code, _, err = call(monkeypatch, capfd, *before, *words.split("|"))
    assert code == 2
    assert err.startswith(f"error: {said}")


def test_no_store_opens_at_an_empty_location():
    with pytest.raises(InputError, match="found an empty text"):
        Store("")


def test_a_location_that_is_not_utf_8_is_refused_before_anything_is_written(monkeypatch, capfd, tmp_path):
    source = folder_of_images(tmp_path / "src", 16)
    code, out, err = call(monkeypatch, capfd, "convert", source, os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))
    assert (code, out) == (2, "")
    assert "DST (output): " in err
    assert "is not valid Unicode (UTF-8)" in err
    assert [each.name for each in tmp_path.iterdir()] == ["src"]


def test_status_and_verify_as_json(monkeypatch, finished):
    assert run_cli("status", finished) == {"planned": 240, "ok": 240, "failed": 0, "shards": 1, "shards_done": 1}
    counted = {"planned": 240, "images": 240, "failed": 0}
    assert run_cli("verify", finished) == {"ok": True, **counted, "mismatched": []}


def test_a_dry_run_and_a_clean_up_say_what_they_found(monkeypatch, capfd, world, finished, tmp_path):
    words = ["purify", world.poisoned, str(tmp_path / "out"), "--denoiser", world.denoiser, "--dry-run"]
    code, out, err = call(monkeypatch, capfd, *words)
    assert (code, err) == (0, "")
    assert "240 of 240 images to purify, in 1 of 1 shard, from" in out
    assert "nothing was written" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = call(monkeypatch, capfd, "gc", finished)
    assert (code, out) == (0, f"0 leftovers removed, 0 uploads aborted in {finished}\n")


def test_verify_fails_on_damage(monkeypatch, capfd, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    file = next(Path(copy, "data").glob("*.parquet"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    code, out, _ = call(monkeypatch, capfd, "verify", str(copy))
    assert code == 1
    assert file.name in out
    assert "NOT ok" in out


@pytest.mark.chaos
def test_too_many_failures_exit_3(monkeypatch, capfd, world, tmp_path):
    folder = tmp_path / "src"
    folder_of_images(folder, 16, count=9)
    (folder / "a" / "broken.png").write_bytes(b"not an image")
    words = ["purify", str(folder), str(tmp_path / "out"), "--denoiser", world.denoiser]
    code, out, _ = call(monkeypatch, capfd, *words)
    assert code == 3
    assert "9 of 10 images purified, 1 failed" in out
    code, out, _ = call(monkeypatch, capfd, *words, "--set", "purify.max_failed_fraction=0.2")
    assert code == 0
    assert "all before this run" in out


def test_convert_split_poison_report_json(world, tmp_path):
    source = folder_of_images(tmp_path / "src", 16, count=12)
    converted = run_cli("convert", source, str(tmp_path / "parquet"))
    assert (converted["images"], converted["output"]) == (12, str(tmp_path / "parquet"))
    divided = run_cli("split", str(tmp_path / "parquet"), "--clean", "4", "--out", str(tmp_path / "split"))
    assert divided["details"] == {"clean": 4, "rest": 8}
    poisoned = run_cli("poison", "urp", str(tmp_path / "split/rest"), str(tmp_path / "urp"), *PRESET)
    assert poisoned["images"] == 8
    back = run_cli("convert", str(tmp_path / "urp"), str(tmp_path / "folder"), "--layout", "folder")
    assert back["images"] == 8
    assert len(list((tmp_path / "folder").rglob("*.png"))) == 8


def test_each_verb_that_a_job_can_run_has_a_script_of_its_name():
    scripts = {path.stem: path for path in (ROOT / "jobs").glob("*.py")}
    assert scripts.keys() == {name for name, verb in VERBS.items() if not verb.here}
    assert len({path.read_text() for path in scripts.values()}) == 1
    command = [sys.executable, str(scripts["verify"]), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Prove from the bytes" in done.stdout, done.stderr


def test_import_checkpoint(monkeypatch, capfd, tmp_path):
    file, out = tmp_path / "ema_0.9999_000010.pt", str(tmp_path / "denoiser")
    network = original_unet(Original(multipliers=(1, 2), blocks=1))
    torch.save(network.state_dict(), file)
    code, text, err = call(monkeypatch, capfd, "import-checkpoint", str(file), "--out", out, "--heads", "3")
    assert (code, text) == (2, "")
    assert err.startswith("error: --heads 3")
    options = ["--timesteps", "1000", "--schedule", "linear"]
    assert run_cli("import-checkpoint", str(file), "--out", out, *options) == {
        "denoiser": out,
        "parameters": sum(value.numel() for value in network.parameters()),
        "block_out_channels": [32, 64],
        "attention_levels": [1],
        "learned_range": True,
        "iterations": 10,
        "t_star": 12,
    }
    code, _, err = call(monkeypatch, capfd, "import-checkpoint", str(file), "--out", out)
    assert code == 2
    assert "other options" in err


def test_importing_the_package_imports_neither_ray_nor_arrow(world):
    program = (
        "import json, sys, numpy, eclipse_ray\n"
        "denoiser = eclipse_ray.load_denoiser(sys.argv[1])\n"
        "images = numpy.zeros((2, 16, 16, 3), numpy.uint8)\n"
        "result = eclipse_ray.purify_images(images, denoiser, ids=['a', 'b'])\n"
        "assert result.shape == (2, 16, 16, 3) and str(result.dtype) == 'torch.uint8'\n"
        "print(json.dumps([name for name in ('ray', 'pyarrow', 'fsspec', 'typer') if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, world.denoiser], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def looks(monkeypatch, *done: int) -> list[int]:
    """Let verbs.status see so many of four shards done, look by look; return the list of what is left to see."""
    left = list(done)

    def summarise(store: Store) -> StatusResult:
        shards = left.pop(0)
        return StatusResult(40, 10 * shards - bool(shards), int(bool(shards)), 4, shards)

    monkeypatch.setattr(ledger, "summarise", summarise)
    monkeypatch.setattr(verbs.time, "sleep", lambda seconds: None)
    return left


def test_it_looks_until_all_shards_are_done(monkeypatch, capfd):
    left = looks(monkeypatch, 1, 1, 3, 4)
    code, _, err = call(monkeypatch, capfd, "status", "somewhere", "--watch", "--every", "0.1")
    assert code == 0
    assert left == []
    assert "status: 40/40 images" in err
    assert "1 failed" in err


def test_without_watch_it_looks_once(monkeypatch, capfd):
    left = looks(monkeypatch, 1, 2)
    code, _, err = call(monkeypatch, capfd, "status", "somewhere")
    assert (code, err) == (0, "")
    assert left == [2]


def test_whoever_has_seen_enough_leaves_with_the_last_look(monkeypatch):
    looks(monkeypatch, 1, 2)
    calls = []

    def sleep(seconds: float) -> None:
        calls.append(seconds)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(verbs.time, "sleep", sleep)
    assert verbs.status("somewhere", watch=True, every=0.1).shards_done == 2


HOURS = {
    "train": lambda source, out: verbs.train(clean=source, out=out),
    "audit": lambda source, out: verbs.audit(source, out=out),
    "evaluate": lambda source, out: verbs.evaluate(source, test=source, out=out),
    "convert": lambda source, out: verbs.convert(source, out),
    "labels": lambda source, out: verbs.convert(source, out, labels_from=source),
    "apply": lambda source, out: verbs.apply("delta.pt", source, out),
    "split": lambda source, out: verbs.split(source, clean=1, out=out),
}


@pytest.mark.parametrize("begin", HOURS.values(), ids=HOURS)
def test_a_folder_is_not_written_under_the_name_of_a_file(begin, tmp_path):
    for ending in (".npz", ".PT", ".parquet", ".tar", ".gz", ".png", ".zip", ".arrow"):
        with pytest.raises(
            InputError, match=f"out{ending}: a folder is written, and {ending} is the ending of a file"
        ):
            begin(str(tmp_path / "source"), str(tmp_path / f"out{ending}"))
    for name in ("out.1", "data_batch_1"):
        with pytest.raises(InputError, match="there is nothing here"):
            begin(str(tmp_path / "source"), str(tmp_path / name))


@pytest.mark.parametrize("out", ["link", "link/out"])
@pytest.mark.parametrize("begin", HOURS.values(), ids=HOURS)
def test_an_output_that_is_a_link_to_nowhere_is_named(begin, out, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"/link: is a link to .*/nowhere, where nothing is; make that"):
        begin(str(tmp_path / "source"), str(tmp_path / out))
    (tmp_path / "nowhere").mkdir()
    Store(str(tmp_path / out)).require_writable()


@pytest.mark.parametrize("begin", HOURS.values(), ids=HOURS)
def test_an_output_that_cannot_be_written_is_refused_before_the_source_is_read(begin, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"/file/out/.*: a part of this path is a file"):
        begin(str(tmp_path / "source"), str(tmp_path / "file/out"))


def test_the_next_command_names_folders_below_this_one_by_short_paths(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for folder, shown in (
        (f"{tmp_path}/out", "out"),
        (f"{tmp_path}x/out", f"{tmp_path}x/out"),
        ("s3://b/out",) * 2,
    ):
        cli.show(PurifyResult(1, 1, 0, 1.0, folder), False, {})
        assert capfd.readouterr().out.splitlines()[-1] == f"next: eclipse-ray verify {shown}"
