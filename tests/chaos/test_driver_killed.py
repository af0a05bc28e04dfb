"""SIGKILL of the driver, then the same command again: nothing lost, nothing twice, the same bytes."""

import pytest

from eclipse_ray import verbs
from tests.support import DEBUG, assignments, kill_when, object_names, read_output, run_cli, shards_done

# One image a pass and every timestep: slow enough that a kill lands in the middle.
SETTINGS = {
    **DEBUG,
    "purify.shard_images": 8,
    "purify.actors": 2,
    "purify.batch_size": 1,
    "purify.num_inference_steps": 4,
}
SHARDS = 30


def arguments(world, output) -> list[str]:
    return ["purify", world.poisoned, str(output), "--denoiser", world.denoiser, *assignments(SETTINGS)]


def kill_at(world, output, shards: int) -> int:
    """SIGKILL a run once `shards` shards are committed; return how many were when it died."""
    kill_when(arguments(world, output), lambda: shards_done(output) >= shards, output.with_suffix(".log"))
    return shards_done(output)


def finish_and_check(world, output, undisturbed) -> None:
    result = run_cli(*arguments(world, output))
    assert (result["planned"], result["ok"], result["failed"]) == (240, 240, 0)
    assert verbs.verify(str(output)).ok
    assert object_names(output) == undisturbed
    assert len(set(read_output(output)["id"].to_pylist())) == 240


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    verbs.purify(world.poisoned, str(output), denoiser=world.denoiser, settings=SETTINGS)
    return object_names(output)


# Eleven drivers and as many clusters.
@pytest.mark.timeout(900)
@pytest.mark.chaos
def test_killed_at_ten_points(world, tmp_path, undisturbed):
    output = tmp_path / "out"
    fired = 0
    for point in range(10):
        before = shards_done(output)
        committed = kill_at(world, output, max(before, point * SHARDS // 11))
        assert committed >= before, "a committed shard was lost"
        fired += 1
    assert fired == 10
    assert shards_done(output) < SHARDS
    finish_and_check(world, output, undisturbed)
