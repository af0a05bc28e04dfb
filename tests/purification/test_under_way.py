"""Progress inside a shard: actors tell how far they are, and each image is counted once."""

from dataclasses import replace
from types import SimpleNamespace

from eclipse_ray.progress import ProgressLine
from eclipse_ray.purification.run import _Shown
from eclipse_ray.purification.shard import task_rows
from eclipse_ray.purification.stages import Purifier, read_and_decode
from tests.purification.test_faults import shard_of_sixteen


def test_an_actor_tells_that_it_has_its_denoiser_and_of_every_batch(world, tmp_path):
    job, task = shard_of_sixteen(world, tmp_path / "out")
    told = []
    board = SimpleNamespace(post=SimpleNamespace(remote=told.append))
    Purifier(replace(job, board=board))(read_and_decode(task_rows([task])[0], job))
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
