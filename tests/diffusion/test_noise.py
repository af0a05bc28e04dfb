"""Philox against the published known answers, and what keys promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.diffusion import noise as room
from eclipse_ray.diffusion.noise import noise, philox, random_words, uniform

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(word) for word in words] == answer


def test_normals_are_standard_normal():
    draws = noise(0, [f"image-{i}" for i in range(64)], 99, (3, 32, 32)).double()
    count = draws.numel()
    assert abs(draws.mean()) < 5 / math.sqrt(count)
    assert abs(draws.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((draws**4).mean() - 3) < 5 * math.sqrt(96 / count)
    # Box-Muller pairs share a radius; neither they nor neighbours may be correlated.
    flat = draws.flatten(1)
    assert abs((flat[:, 0::2] * flat[:, 1::2]).mean()) < 5 / math.sqrt(count / 2)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**63 - 1),
    ids=st.lists(st.text(max_size=20), min_size=1, max_size=5, unique=True),
    t=st.integers(0, 2**31 - 1),
)
def test_a_row_depends_on_its_own_key_alone(seed, ids, t):
    together = noise(seed, ids, t, (2, 3))
    for row, text in zip(together, ids, strict=True):
        assert torch.equal(row, noise(seed, [text], t, (2, 3))[0])


def test_every_part_of_the_key_matters():
    base = random_words(1, ["a"], 2, 8)
    for other in (random_words(2, ["a"], 2, 8), random_words(1, ["b"], 2, 8), random_words(1, ["a"], 3, 8)):
        assert not torch.equal(base, other)


@pytest.mark.parametrize("blocks", [1, 7, 64])
@pytest.mark.parametrize("shape", [(3, 19, 23), (5,), (4, 64)])
def test_pieces_give_the_same_normals_as_one_go(monkeypatch, blocks, shape):
    ids = ["a", "b", "c"]
    whole = noise(5, ids, 99, shape)
    monkeypatch.setattr(room, "BLOCKS", blocks)
    assert torch.equal(noise(5, ids, 99, shape), whole)


def test_normals_are_box_muller_of_the_words():
    pairs = uniform(5, ["a"], 99, (6,))[0].view(3, 2)
    expected = [
        f(2 * math.pi * v) * math.sqrt(-2 * math.log(u)) for u, v in pairs.tolist() for f in (math.cos, math.sin)
    ]
    assert torch.allclose(noise(5, ["a"], 99, (5,))[0], torch.tensor(expected[:5]), atol=1e-6)


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(uniform(0, ["x"], 5, (9,))[:, :5], uniform(0, ["x"], 5, (5,)))


def test_uniform_stays_inside_the_open_interval():
    draws = uniform(3, [str(i) for i in range(100)], 0, (1000,))
    assert draws.min() > 0
    assert draws.max() < 1
