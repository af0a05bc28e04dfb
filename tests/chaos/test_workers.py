"""Workers that are killed, end, hang or run out of memory: every image still ends once, and the same.

`make test` has the same without Ray: tests/ledger/test_attempts.py and tests/purification/test_faults.py.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclipse_ray import verbs
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.synthetic import write_synthetic
from tests.support import DEBUG, World, assignments, object_names, pixels_of, read_output, shards_done, wait_until

SETTINGS = {**DEBUG, "purify.shard_images": 20, "purify.actors": 2, "purify.batch_size": 8}
IMAGES = 240
DECODE, PURIFY = "eclipse_ray.datasets.images.decode_image", "eclipse_ray.diffusion.sampling.purify_images"
FAULTS = Path(__file__).parent / "faults"


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    verbs.purify(world.poisoned, str(output), denoiser=world.denoiser, settings=SETTINGS)
    return output


def command(world, output, *more: str, **settings) -> list[str]:
    words = [sys.executable, "-m", "eclipse_ray", "purify", world.poisoned, str(output)]
    return [*words, "--denoiser", world.denoiser, "--json", *more, *assignments({**SETTINGS, **settings})]


def run(words: list[str], **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


def fault(log: Path, function: str, how: str, when: str, times: int = 10**6) -> dict[str, str]:
    tree = {"function": function, "how": how, "when": when, "times": times, "log": str(log)}
    # The repository comes along: its packages may not be installed where PYTHONPATH is set.
    path = os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "ECLIPSE_RAY_TEST_FAULT": json.dumps(tree)}


def fired(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def an_id(world, number: int) -> str:
    """The id of an image; from 64 on they are not looked at before the run."""
    files = sorted((world.root / "poisoned/data").glob("*.parquet"))
    return [name for file in files for name in pq.read_table(file, columns=["id"])["id"].to_pylist()][number]


def images_of_a_folder(world, tmp_path, count: int) -> tuple[World, list[Path]]:
    """Return the world with a folder of other images in the place of the poisoned ones, and its files."""
    write_synthetic(str(tmp_path / "images"), count, 16, 5)
    verbs.convert(str(tmp_path / "images"), str(tmp_path / "source"), layout="folder", settings=DEBUG)
    return replace(world, poisoned=str(tmp_path / "source")), sorted((tmp_path / "source").rglob("*.png"))


def errors(output) -> dict[str, str]:
    rows = [
        row for file in (output / "_eclipse/errors").glob("*.parquet") for row in pq.read_table(file).to_pylist()
    ]
    return {row["id"]: row["error"] for row in rows}


def assert_all_but(output, undisturbed, lost: str) -> None:
    """Every image but one is there, as it is undisturbed up to the company it had in its batch."""
    table, whole = read_output(output), read_output(undisturbed)
    kept = [row for row, name in enumerate(whole["id"].to_pylist()) if name != lost]
    assert table["id"].to_pylist() == whole["id"].take(kept).to_pylist()
    assert table["label"].to_pylist() == whole["label"].take(kept).to_pylist()
    difference = np.abs(pixels_of(table).astype(int) - pixels_of(whole.take(kept)).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


@pytest.mark.chaos
def test_an_image_that_kills_its_actor_becomes_an_error_row_then_a_retry_mends_it(world, tmp_path, undisturbed):
    output, log, lost = tmp_path / "out", tmp_path / "fired", an_id(world, 130)
    code, printed, said = run(command(world, output), **fault(log, PURIFY, "kill", lost))
    assert code == 0, said
    assert fired(log) == 5, "three starts of the shard, and the image alone twice"
    result = json.loads(printed)
    assert (result["planned"], result["ok"], result["failed"]) == (IMAGES, IMAGES - 1, 1)
    assert list(errors(output)) == [lost]
    assert "kills the worker" in errors(output)[lost]
    assert_all_but(output, undisturbed, lost)
    before = object_names(output)
    code, printed, said = run(command(world, output, "--retry-failed"))
    assert code == 0, said
    assert json.loads(printed)["failed"] == 0
    assert verbs.verify(str(output)).ok
    after = object_names(output)
    assert sum(before[name] != after[name] for name in before) == 1
    assert read_output(output)["id"].to_pylist() == read_output(undisturbed)["id"].to_pylist()


@pytest.mark.chaos
def test_an_image_that_kills_its_decoder_becomes_an_error_row(world, tmp_path):
    output, log = tmp_path / "out", tmp_path / "fired"
    of_folder, files = images_of_a_folder(world, tmp_path, 96)
    victim = files[80]
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    # Bytes after the end of a PNG are no part of it.
    victim.write_bytes(encode_image(image, "png") + b"KILLER")
    code, printed, said = run(command(of_folder, output), **fault(log, DECODE, "kill", "KILLER"))
    # Once more than the workers die: it is among the samples that are read before the run.
    assert (code, fired(log)) == (3, 6), said
    assert json.loads(printed)["failed"] == 1
    assert list(errors(output)) == [str(victim.relative_to(tmp_path / "source"))]
    assert verbs.verify(str(output)).ok


def actors() -> list[int]:
    """Process ids of the denoising actors on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::MapWorker"):
            found.append(int(folder.name))
    return found


@pytest.mark.chaos
def test_three_killed_actors_change_nothing(world, tmp_path, undisturbed):
    output, killed = tmp_path / "out", []

    def kill_three() -> None:
        deadline = time.monotonic() + 200
        while len(killed) < 3 and time.monotonic() < deadline:
            alive = [actor for actor in actors() if actor not in killed]
            # Each at a later stage, and only while there is work left for its successor.
            if alive and 2 * len(killed) < shards_done(output) < 11:
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])
            time.sleep(0.02)

    thread = threading.Thread(target=kill_three)
    thread.start()
    code, _, said = run(command(world, output))
    thread.join()
    assert code == 0, said
    assert len(killed) == 3, "no fault fired"
    assert object_names(output) == object_names(undisturbed)
    assert verbs.verify(str(output)).ok


@pytest.mark.chaos
@pytest.mark.parametrize("how", ["exit", "sleep"])
def test_a_worker_that_ends_or_hangs_ends_the_run_and_the_next_run_completes_it(how, world, tmp_path, undisturbed):
    output, log = tmp_path / "out", tmp_path / "fired"
    # Longer than it takes to start Ray and load the denoiser here.
    limit = 45.0
    words = command(world, output, **{"run.watchdog_seconds": limit})
    started = time.monotonic()
    code, _, said = run(words, **fault(log, PURIFY, how, an_id(world, 130), times=1))
    assert fired(log) == 1, "no fault fired"
    assert code == 75, said
    assert "run the same command again to resume" in said
    assert time.monotonic() - started < 4 * limit
    code, _, said = run(words)
    assert code == 0, said
    assert object_names(output) == object_names(undisturbed)


def verb_with(name: str, world, output) -> tuple[list[str], str]:
    """Return the words of another verb than purify, and a function that its workers call."""
    train = ["train", "--clean", world.clean, "--out", str(output), "--set", "denoiser.num_workers=1"]
    return {
        "train": (train, "eclipse_ray.diffusion.training.run_fit"),
        "poison": (["poison", "em", world.rest, str(output)], "eclipse_ray.poisoning.fit_stored"),
        "audit": (["audit", world.rest, "--out", str(output)], DECODE),
    }[name]


@pytest.mark.chaos
@pytest.mark.parametrize("verb", ["train", "poison", "audit"])
def test_a_worker_that_hangs_ends_every_verb_with_75_and_a_sentence(verb, world, tmp_path):
    words, function = verb_with(verb, world, tmp_path / "out")
    log, limit = tmp_path / "fired", 30.0
    start = [sys.executable, "-m", "eclipse_ray", *words, *assignments({**DEBUG, "run.watchdog_seconds": limit})]
    started = time.monotonic()
    code, _, said = run(start, **fault(log, function, "sleep", "always"))
    assert fired(log) >= 1, "no fault fired"
    assert code == 75, said
    assert "(run.watchdog_seconds), so a worker hangs or was lost; run the same command again to resume" in said
    assert "Traceback" not in said
    assert time.monotonic() - started < 4 * limit


@pytest.mark.chaos
def test_a_batch_without_memory_is_halved(world, tmp_path, undisturbed):
    output, log = tmp_path / "out", tmp_path / "fired"
    code, _, said = run(command(world, output), **fault(log, PURIFY, "memory", an_id(world, 130), times=2))
    assert (code, fired(log)) == (0, 2), said
    assert_all_but(output, undisturbed, "nobody")
    assert "too little memory for batches of 8 images" in said


@pytest.mark.chaos
def test_two_drivers_on_one_output_agree(world, tmp_path, undisturbed):
    output = tmp_path / "out"
    both = [
        subprocess.Popen(command(world, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for driver in both:
        printed, said = driver.communicate(timeout=280)
        assert driver.returncode == 0, said
        assert json.loads(printed)["ok"] == IMAGES
    assert object_names(output) == object_names(undisturbed)
    assert verbs.verify(str(output)).ok
    assert [path.name for path in (output / "data").iterdir() if path.name.startswith(".tmp")] == []


@pytest.mark.chaos
def test_sigterm_says_that_the_run_can_be_resumed(world, tmp_path, undisturbed):
    output = tmp_path / "out"
    driver = subprocess.Popen(command(world, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: shards_done(output) >= 2, "two shards", 200, driver)
    driver.terminate()
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 75, said
    assert shards_done(output) < len(object_names(undisturbed))
    code, _, said = run(command(world, output))
    assert code == 0, said
    assert object_names(output) == object_names(undisturbed)


@pytest.mark.chaos
@pytest.mark.parametrize(("bad", "code"), [(0, 0), (1, 0), (50, 3), (100, 3)])
def test_unreadable_images_decide_the_exit_code(bad, code, tmp_path, world):
    output = tmp_path / "out"
    of_folder, files = images_of_a_folder(world, tmp_path, 100)
    for file in files[:bad]:
        file.write_bytes(file.read_bytes()[:40])
    found, printed, said = run(command(of_folder, output))
    assert found == code, said
    result = json.loads(printed)
    assert (result["planned"], result["ok"], result["failed"]) == (100, 100 - bad, bad)
    assert len(errors(output)) == bad
    assert verbs.verify(str(output)).ok


@pytest.mark.chaos
def test_a_strict_run_ends_at_the_first_unreadable_image_and_says_which(tmp_path, world):
    of_folder, files = images_of_a_folder(world, tmp_path, 32)
    damaged = files[7]
    damaged.write_bytes(damaged.read_bytes()[:40])
    code, _, said = run(command(of_folder, tmp_path / "out", **{"data.on_error": "stop"}))
    assert code == 2, said
    assert damaged.name in said
    assert "data.on_error=row" in said
