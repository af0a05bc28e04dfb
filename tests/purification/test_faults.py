"""What a worker and the driver do when something fails under them, without Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from eclipse_ray import verbs
from eclipse_ray.config import CompensationConfig
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import ImageError
from eclipse_ray.errors import InputError, InterruptedRunError, StorageError
from eclipse_ray.ledger import open_run, plan_shards, read_statuses, session
from eclipse_ray.purification import purifier, stages
from eclipse_ray.purification.run import _watched
from eclipse_ray.purification.shard import Job, Task, fatal_error, task_rows, unpack
from eclipse_ray.purification.stages import encode_and_commit, read_and_decode
from tests.ledger.helpers import make_fingerprint, plan_of
from tests.support import DEBUG


def shard_of_sixteen(world, output) -> tuple[Job, Task]:
    config = verbs.resolve(None, DEBUG, {"purify.batch_size": 8})
    source = open_source(world.poisoned, config.data)
    shards = plan_shards(source.parts, 16)[:1]
    job = Job(
        source=source.url,
        format=source.format,
        classes=None,
        data=config.data,
        output=str(output),
        denoiser=world.denoiser,
        purify=config.purify,
        seed=0,
        compensation=CompensationConfig(mode="none"),
        sparse_hashes=frozenset(),
    )
    open_run(job.store(), plan_of(shards), make_fingerprint(shards), "")
    return job, Task(shards[0])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("none left"),
        torch.OutOfMemoryError("none left"),
        RuntimeError("can't allocate memory: 9 bytes"),
    ],
)
def test_a_batch_without_memory_is_halved_until_it_fits(world, tmp_path, monkeypatch, error):
    job, task = shard_of_sixteen(world, tmp_path / "out")
    decoded = read_and_decode(task_rows([task])[0], job)
    _, whole, _ = unpack(purifier.Purifier(job)(decoded))
    genuine, fired = purifier.purify_images, []

    def short_of_memory(images, *arguments, **named):
        if len(images) > 2:
            fired.append(len(images))
            raise error
        return genuine(images, *arguments, **named)

    monkeypatch.setattr(purifier, "purify_images", short_of_memory)
    purified = purifier.Purifier(job)(decoded)
    _, images, failures = unpack(purified)
    assert fired == [8, 4, 4] * 2
    assert failures == []
    assert "too little memory for batches of 8 images" in purified["note"][0].as_py()
    difference = np.abs(np.stack(images).astype(int) - np.stack(whole).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def test_an_image_without_memory_alone_becomes_an_error_row(world, tmp_path, monkeypatch):
    job, task = shard_of_sixteen(world, tmp_path / "out")
    decoded = read_and_decode(task_rows([task])[0], job)
    genuine, victim = purifier.purify_images, unpack(decoded)[0]["id"][5].as_py()

    def short_of_memory(images, *arguments, ids, **named):
        if victim in ids:
            raise MemoryError
        return genuine(images, *arguments, ids=ids, **named)

    monkeypatch.setattr(purifier, "purify_images", short_of_memory)
    row = encode_and_commit(purifier.Purifier(job)(decoded), job).to_pylist()[0]
    assert (row["ok"], row["failed"], row["fatal"]) == (15, 1, "")
    assert read_statuses(job.store())[task.shard.name].failed == 1


def test_other_errors_of_the_network_are_not_taken_for_want_of_memory(world, tmp_path, monkeypatch):
    job, task = shard_of_sixteen(world, tmp_path / "out")
    decoded = read_and_decode(task_rows([task])[0], job)

    def broken(*arguments, **named):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(purifier, "purify_images", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        purifier.Purifier(job)(decoded)


@pytest.mark.parametrize("where", ["decoding", "purifying"])
def test_a_shard_of_which_nothing_is_left_is_committed_with_its_errors(world, tmp_path, monkeypatch, where):
    job, task = shard_of_sixteen(world, tmp_path / "out")
    if where == "decoding":

        def refuse(*_):
            raise ImageError("not an image, says the test")

        monkeypatch.setattr(stages, "decode_stored", refuse)
    else:
        monkeypatch.setattr(
            purifier.Purifier,
            "_outcomes",
            lambda self, _, images, ids: dict.fromkeys(range(len(ids)), "too small"),
        )
    found = encode_and_commit(purifier.Purifier(job)(read_and_decode(task_rows([task])[0], job)), job)
    assert found.select(["ok", "failed", "fatal"]).to_pylist() == [{"ok": 0, "failed": 16, "fatal": ""}]
    status = read_statuses(job.store())[task.shard.name]
    assert (status.object, status.ok, status.failed) == (None, 0, 16)


def test_a_store_that_fails_under_the_actor_is_reported_as_itself(world, tmp_path, monkeypatch):
    job, task = shard_of_sixteen(world, tmp_path / "out")
    decoded = read_and_decode(task_rows([task])[0], job)

    def away(*_):
        raise StorageError("the store stays away")

    monkeypatch.setattr(purifier.Purifier, "_outcomes", away)
    found = encode_and_commit(purifier.Purifier(job)(decoded), job)
    assert "the store stays away" in str(fatal_error(found["fatal"][0].as_py()))
    assert read_statuses(job.store()) == {}


def test_drivers_that_die_again_and_again_blame_no_image(world, tmp_path):
    job, task = shard_of_sixteen(world, tmp_path / "out")
    whole = purifier.Purifier(job)(read_and_decode(task_rows([task])[0], job))
    for _ in range(12):
        mine = replace(job, session=session(job.store()))
        # Each driver dies after this: nothing is committed.
        found = purifier.Purifier(mine)(read_and_decode(task_rows([task])[0], mine))
        assert unpack(found)[2] == []
        assert found["pixels"] == whole["pixels"], "images were done one by one"


def hanging() -> Iterator[tuple[int, int]]:
    yield 1, 0
    time.sleep(60)


def failing(error: Exception) -> Iterator[tuple[int, int]]:
    yield 1, 0
    raise error


def test_a_stream_that_stands_still_is_given_up():
    told: list[int] = []
    results = _watched(hanging(), 0.2, lambda: told.append(1))
    assert next(results) == (1, 0)
    with pytest.raises(InterruptedRunError, match=r"no shard was finished for .* run the same command again"):
        next(results)
    assert told == [1]
    assert InterruptedRunError.exit_code == 75


def slow_to_start() -> Iterator[tuple[int, int]]:
    time.sleep(0.5)
    yield 1, 0
    yield 1, 0
    time.sleep(60)


def test_waiting_for_the_first_shard_does_not_make_the_watchdog_more_patient():
    results = _watched(slow_to_start(), 1.0, lambda: None)
    assert [next(results), next(results)] == [(1, 0), (1, 0)]
    # Ten times the half second of the start would be five.
    with pytest.raises(InterruptedRunError, match="no shard was finished for 1 s"):
        next(results)


def test_a_stream_that_breaks_says_why_and_a_users_mistake_stays_one():
    with pytest.raises(InterruptedRunError, match="the last line; run the same command again"):
        list(_watched(failing(OSError("a traceback\nthe last line")), 5, exit))
    with pytest.raises(InputError, match="as it was"):
        list(_watched(failing(InputError("as it was")), 5, exit))
    assert list(_watched(iter([(1, 0), (2, 1)]), 5, exit)) == [(1, 0), (2, 1)]
