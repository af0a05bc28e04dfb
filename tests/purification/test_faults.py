"""What a worker and the driver do when something fails under them, and how far they say they are, without Ray."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import ImageError
from eclipse_ray.diffusion import network, sampling
from eclipse_ray.errors import ConfigError, StorageError, error_of_note
from eclipse_ray.ledger import open_run, plan_shards, read_statuses, session
from eclipse_ray.parameters import resolve
from eclipse_ray.progress import ProgressLine
from eclipse_ray.purification import stages
from eclipse_ray.purification.run import _Shown
from eclipse_ray.purification.stages import (
    Failure,
    Job,
    Purifier,
    Task,
    encode_and_commit,
    read_and_decode,
    task_rows,
    unpack,
)
from tests.datasets.helpers import fill, noise
from tests.ledger.helpers import make_fingerprint, plan_of
from tests.support import DEBUG, World, board_of, dotted, job_of


def first_shard(world: World, output: object, source: object = None, **settings: object) -> tuple[Job, Task]:
    """Return a job that resumes nothing and knows no sparse set, and the first 16 images of its source."""
    config = resolve(None, {**DEBUG, "purify.batch_size": 8, **dotted(settings)}, {})
    opened = open_source(str(source or world.poisoned), config.data)
    purify = config.purify.model_copy(update={"t_star": 4, "num_inference_steps": 1})
    own = {"denoiser": world.denoiser, "purify": purify, "compensation": config.compensation}
    job = job_of(opened, output=str(output), **own)
    shards = plan_shards(opened.parts, 16)[:1]
    open_run(job.store(), plan_of(shards), make_fingerprint(shards), "")
    return job, Task(shards[0])


def decode(job: Job, task: Task) -> pa.Table:
    return read_and_decode(task_rows([task])[0], job)


@pytest.mark.parametrize(("stage", "doing"), [("decode", "decoding"), ("purify", "purifying")])
def test_an_image_that_kills_its_worker_alone_is_named_also_when_its_shard_is_given_up(
    world, tmp_path, monkeypatch, stage, doing
):
    job, task = first_shard(world, tmp_path / "out")
    monkeypatch.setattr(stages.ledger, "try_alone", lambda *_: ({2}, stages.ledger.Care.GIVE_UP))
    killers, _ = stages._killers(job, task, stage, 9, 4, lambda _: None)
    words = [killers[row].error for row in range(4)]
    assert words[2] == f"{doing} this image kills the worker, also when tried alone"
    for row in (0, 1, 3):
        assert words[row].startswith(f"{doing} its shard kills the worker, though no image does so alone")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("none left"),
        torch.OutOfMemoryError("none left"),
        RuntimeError("can't allocate memory: 9 bytes"),
    ],
)
def test_a_batch_without_memory_is_halved_until_it_fits(world, tmp_path, monkeypatch, error):
    job, task = first_shard(world, tmp_path / "out")
    decoded = decode(job, task)
    _, whole, _ = unpack(Purifier(job)(decoded))
    genuine, fired = sampling.purify_images, []

    def short_of_memory(images, *arguments, **named):
        if len(images) > 2:
            fired.append(len(images))
            raise error
        return genuine(images, *arguments, **named)

    monkeypatch.setattr(sampling, "purify_images", short_of_memory)
    purified = Purifier(job)(decoded)
    _, images, failures = unpack(purified)
    assert fired == [8, 4, 4] * 2
    assert failures == []
    assert "too little memory for batches of 8 images" in purified["note"][0].as_py()
    difference = np.abs(np.stack(images).astype(int) - np.stack(whole).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator gives nothing")])
def test_an_image_without_memory_alone_becomes_an_error_row(world, tmp_path, monkeypatch, error):
    job, task = first_shard(world, tmp_path / "out")
    decoded = decode(job, task)
    genuine, victim = sampling.purify_images, unpack(decoded)[0]["id"][5].as_py()

    def short_of_memory(images, *arguments, ids, **named):
        if victim in ids:
            raise error
        return genuine(images, *arguments, ids=ids, **named)

    monkeypatch.setattr(sampling, "purify_images", short_of_memory)
    purified = Purifier(job)(decoded)
    assert [failure["kind"] for failure in unpack(purified)[2]] == ["memory"]
    row = encode_and_commit(purified, job).to_pylist()[0]
    assert (row["ok"], row["failed"], row["fatal"]) == (15, 1, "")
    assert read_statuses(job.store())[task.shard.name].failed == 1


def test_a_worker_that_cannot_open_the_denoiser_says_so_with_its_first_shard(world, tmp_path, monkeypatch):
    job, task = first_shard(world, tmp_path / "out")
    monkeypatch.setattr(network, "_capabilities", dict)
    job = replace(job, purify=job.purify.model_copy(update={"precision": "int8"}))
    row = encode_and_commit(Purifier(job)(decode(job, task)), job).to_pylist()[0]
    error = error_of_note(row["fatal"])
    assert isinstance(error, ConfigError)
    assert "needs a CPU with AVX512-VNNI" in str(error)
    assert row["ok"] == 0


def test_other_errors_of_the_network_are_not_taken_for_want_of_memory(world, tmp_path, monkeypatch):
    job, task = first_shard(world, tmp_path / "out")
    decoded = decode(job, task)

    def broken(*arguments, **named):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(sampling, "purify_images", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Purifier(job)(decoded)


@pytest.mark.parametrize("where", ["decoding", "purifying"])
def test_a_shard_of_which_nothing_is_left_is_committed_with_its_errors(world, tmp_path, monkeypatch, where):
    job, task = first_shard(world, tmp_path / "out")
    if where == "decoding":

        def refuse(*_):
            raise ImageError("not an image, says the test")

        monkeypatch.setattr(stages, "decode_stored", refuse)
    else:
        monkeypatch.setattr(
            Purifier,
            "_outcomes",
            lambda self, _, images, ids: dict.fromkeys(range(len(ids)), Failure("too small", "small")),
        )
    found = encode_and_commit(Purifier(job)(decode(job, task)), job)
    assert found.select(["ok", "failed", "fatal"]).to_pylist() == [{"ok": 0, "failed": 16, "fatal": ""}]
    status = read_statuses(job.store())[task.shard.name]
    assert (status.object, status.ok, status.failed) == (None, 0, 16)


def test_a_store_that_fails_under_the_actor_is_reported_as_itself(world, tmp_path, monkeypatch):
    job, task = first_shard(world, tmp_path / "out")
    decoded = decode(job, task)

    def away(*_):
        raise StorageError("the store stays away")

    monkeypatch.setattr(Purifier, "_outcomes", away)
    found = encode_and_commit(Purifier(job)(decoded), job)
    assert "the store stays away" in str(error_of_note(found["fatal"][0].as_py()))
    assert read_statuses(job.store()) == {}


def test_drivers_that_die_again_and_again_blame_no_image(world, tmp_path):
    job, task = first_shard(world, tmp_path / "out")
    whole = Purifier(job)(decode(job, task))
    for _ in range(12):
        mine = replace(job, session=session(job.store()))
        # Each driver dies after this: nothing is committed.
        found = Purifier(mine)(decode(mine, task))
        assert unpack(found)[2] == []
        assert found["pixels"] == whole["pixels"], "images were done one by one"


@pytest.mark.parametrize(
    ("side", "settings", "kind"),
    [(40, {"data__max_pixels": 1000}, "large"), (12, {}, "small"), (None, {}, "undecodable")],
)
def test_a_failure_has_its_kind_whatever_its_words(world, tmp_path, side, settings, kind):
    # A name that tells of another kind.
    file = tmp_path / "source/too little memory kills.png"
    folder = fill(file.parent, file.name, "whole.png", images=[noise(1, side or 16)[0], noise(1, 16)[0]])
    if side is None:
        file.write_bytes(file.read_bytes()[:40])
    job, task = first_shard(world, tmp_path / "out", folder, **settings)
    _, images, failures = unpack(Purifier(job)(decode(job, task)))
    assert len(images) == 1
    assert [(failure["id"], failure["kind"]) for failure in failures] == [(file.name, kind)]


def test_the_workers_of_the_other_stages_start_without_torch():
    program = "import sys, eclipse_ray.purification.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_an_actor_tells_that_it_has_its_denoiser_and_of_every_batch(world, tmp_path):
    job, task = first_shard(world, tmp_path / "out")
    told = []
    Purifier(replace(job, board=board_of(told.append)))(decode(job, task))
    assert [(entry["shard"], entry["images"]) for entry in told] == [
        ("", 0),
        (task.shard.name, 8),
        (task.shard.name, 16),
    ]


def test_images_of_shards_under_way_count_until_their_shard_is_committed():
    with ProgressLine("purify", "images", 200, 1e9, done=100, phase="loading") as line:
        shown = _Shown(line, "actors", 2)
        shown.under_way({"shard": "", "images": 0})
        assert (line.phase, line.done) == ("first shard", 100)
        shown.under_way({"shard": "a", "images": 16})
        shown.under_way({"shard": "b", "images": 8})
        assert line.done == 124
        shown.committed({"shard": "a", "ok": 18, "failed": 2, "busy_seconds": 1.0})
        assert (line.done, line.failed, line.note) == (128, 2, "actors busy 50 %")
        # An entry that comes late, and an actor that begins its shard again.
        shown.under_way({"shard": "a", "images": 20})
        shown.under_way({"shard": "b", "images": 4})
        assert line.done == 128
        shown.under_way({"shard": "b", "images": 20})
        assert line.done == 140
