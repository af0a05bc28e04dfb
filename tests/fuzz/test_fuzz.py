"""Five seconds of the fuzzer `python -m tests.fuzz.fuzz_decode`."""

import random

import pytest

from tests.fuzz.fuzz_decode import TARGETS, fuzz, seeds


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid(name):
    # A fuzzer whose seeds are refused explores nothing.
    from eclipse_ray.datasets.images import ImageError

    accepted = 0
    for data in seeds()[name]:
        try:
            TARGETS[name](data, random.Random(0))
            accepted += 1
        except ImageError:
            assert name == "image"
    assert accepted >= min(20, len(seeds()[name]))


def test_five_seconds_of_mutations_crash_nothing(tmp_path):
    result = fuzz(5, 0, tmp_path)
    readers = result["readers"]
    assert result["crashes"] == 0, readers
    assert all(reader["executions"] > 10 and reader["refused"] > 0 for reader in readers.values()), readers
