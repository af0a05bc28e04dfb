"""Tiles: where they lie, what they weigh, and that blending equals the whole where the network allows it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eclipse_ray.config import BATCH_PIXELS
from eclipse_ray.diffusion.sampling import purify_images
from eclipse_ray.diffusion.tiling import Axis, blend_weights, plan_axis, reflect_pad, tiled, tiled_pixels
from tests.support import untrained_denoiser


@pytest.fixture(scope="module")
def denoiser():
    return untrained_denoiser()


@settings(max_examples=200)
@given(st.integers(1, 700), st.integers(32, 160), st.integers(0, 80), st.sampled_from([1, 2, 8]))
def test_tiles_cover_a_side_with_weights_that_add_up_to_one(side, tile, overlap, multiple):
    overlap = min(overlap, tile // 2)
    axis = plan_axis(side, tile, overlap, multiple)
    assert axis.length % multiple == 0
    assert axis.length <= max(tile, multiple)
    assert all(start % multiple == 0 for start in axis.starts)
    for one, two in zip(axis.starts, axis.starts[1:], strict=False):
        assert 0 < two - one <= axis.length - overlap
    end = axis.starts[-1] + axis.length
    assert side <= end < side + multiple
    total = torch.zeros(end)
    for start, weights in zip(axis.starts, blend_weights(axis, overlap), strict=True):
        assert weights.min() >= 0
        total[start : start + axis.length] += weights
    assert torch.allclose(total, torch.ones(end), atol=1e-6)
    # No pixel is computed twice but in the overlaps, and where a length is rounded up to whole multiples.
    shared = -(-overlap // multiple) * multiple
    needed = -(-side // multiple) * multiple + (len(axis.starts) - 1) * shared
    assert needed <= len(axis.starts) * axis.length < needed + len(axis.starts) * multiple


def test_tiles_are_no_longer_than_the_side_asks_for():
    assert plan_axis(512, 512, 32, 2).starts == (0,)
    assert plan_axis(514, 512, 32, 2) == Axis(514, 274, (0, 240))
    assert plan_axis(600, 512, 32, 2) == Axis(600, 316, (0, 284))
    assert tiled_pixels(514, 300, 512, 32, 2) == 2 * 274 * 300


def test_a_border_tile_fades_out_smoothly():
    axis = plan_axis(224, 128, 32, 8)
    assert axis.starts == (0, 96)
    first, second = blend_weights(axis, 32)
    assert torch.equal(first[:96], torch.ones(96))
    assert torch.equal(second[32:], torch.ones(96))
    assert second[0] < 0.001
    assert (second[:33].diff() > 0).all()
    assert second[:33].diff().max() < 0.06


@pytest.mark.parametrize(("side", "size"), [(5, 7), (3, 16), (2, 9), (1, 4), (6, 6)])
def test_padding_reflects_however_often_it_must(side, size):
    x = torch.arange(side, dtype=torch.float32).expand(1, 1, side, side)
    padded = reflect_pad(x, size, size)
    assert torch.equal(padded[:, :, :side, :side], x)
    period = max(1, 2 * side - 2)
    expected = [min(i % period, period - i % period) for i in range(size)]
    assert padded[0, 0, 0].tolist() == expected
    if size - side < side:
        assert torch.equal(padded, torch.nn.functional.pad(x, (0, size - side, 0, size - side), mode="reflect"))


def pointwise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    assert x_t.shape[2] % 8 == 0
    assert x_t.shape[3] % 8 == 0
    return torch.cat([2 * x_t + t.view(-1, 1, 1, 1), x_t**2], dim=1)


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (20, 333), (131, 200), (300, 64)])
def test_a_network_without_neighbours_sees_no_tiles(size):
    x_t, t = torch.rand(2, 3, *size), torch.tensor([3, 5])
    output = tiled(pointwise, 64, 16, 8, 2**14)(x_t, t)
    assert output.shape == (2, 6, *size)
    expected = torch.cat([2 * x_t + t.view(-1, 1, 1, 1), x_t**2], dim=1)
    assert torch.allclose(output, expected, atol=2e-6)


def test_a_convolution_within_the_overlap_sees_no_tiles():
    kernel = torch.rand(3, 3, 5, 5)

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x_t, kernel, padding=2)

    x_t, t = torch.rand(1, 3, 160, 224), torch.zeros(1)
    difference = (tiled(network, 64, 32, 8, 2**14)(x_t, t) - network(x_t, t)).abs()
    # Only what the outermost two pixels of a tile saw as zeros is left, and those weigh next to nothing.
    assert difference.max() < 0.02 * network(x_t, t).abs().max()
    assert difference.median() < 1e-4


def test_tiles_of_a_pass_stay_within_the_budget():
    passes = []

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        passes.append(x_t.numel() // 3)
        assert len(t) == len(x_t)
        return x_t

    tiled(network, 64, 16, 8, 3 * 64 * 64)(torch.rand(1, 3, 400, 400), torch.zeros(1))
    assert max(passes) == 3 * 64 * 64
    assert len(passes) == -(-sum(passes) // max(passes))


def test_an_image_of_one_tile_reaches_the_network_itself():
    x_t, seen = torch.rand(2, 3, 32, 32), []

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x_t)
        return x_t

    assert tiled(network, 128, 32, 2, BATCH_PIXELS)(x_t, torch.zeros(2)) is x_t
    assert seen[0] is x_t


@pytest.mark.parametrize("size", [(16, 16), (16, 17), (16, 301), (17, 23), (131, 16), (150, 131)])
def test_any_size_is_purified_at_its_own(denoiser, size):
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    result = purify_images(images, denoiser, ids=["a", "b"], num_inference_steps=2)
    assert result.shape == images.shape
    assert not torch.equal(result, images)


@pytest.mark.parametrize("budget", [1, 2**15, 2**22])
def test_an_image_depends_neither_on_its_batch_nor_on_the_budget(denoiser, budget):
    images = torch.randint(0, 256, (3, 140, 135, 3), dtype=torch.uint8)
    ids = ["a", "b", "c"]
    whole = purify_images(images, denoiser, ids=ids, num_inference_steps=2)
    alone = purify_images(images[1:2], denoiser, ids=["b"], num_inference_steps=2, batch_pixels=budget)
    difference = (whole[1:2].int() - alone.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 0.001


def test_a_gray_image_stays_gray_and_its_neighbours_do_not_change(denoiser):
    colour = torch.randint(0, 256, (3, 20, 33, 3), dtype=torch.uint8)
    mixed = colour.clone()
    mixed[1] = colour[1, ..., :1]
    ids = ["a", "b", "c"]
    before, after = (purify_images(images, denoiser, ids=ids) for images in (colour, mixed))
    assert (after[1] == after[1][..., :1]).all()
    assert after[1].float().std() > 10
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    almost = mixed.clone()
    almost[1, 0, 0, 0] ^= 1
    spread = purify_images(almost, denoiser, ids=ids)[1]
    assert (spread.int() - spread[..., :1].int()).abs().max() > 1
