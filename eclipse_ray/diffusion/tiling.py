"""Images of any size through a network of a fixed view: overlapping tiles, blended without seams.

At every reverse step each tile is cut from the whole-image x_t, and what the network returns (eps_pred and, if
learned, the variance mix) is blended into one full-size output. Noise is never drawn by tile, so there is nothing
to match at a border but two predictions of the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eclipse_ray.diffusion.network import Network

# Below this side there is little left to look at, and deep networks shrink such an image to nothing.
MIN_SIDE = 16


@dataclass(frozen=True)
class Axis:
    """The tiles along one side: `length` pixels from each of `starts`; the last may reach past the image."""

    side: int
    length: int
    starts: tuple[int, ...]


def plan_axis(side: int, tile: int, overlap: int, size_multiple: int) -> Axis:
    """Return the tiles along a side of `side` pixels, a function of these four numbers alone.

    A side of at most `tile` is one tile, rounded up to `size_multiple`. Longer ones get the fewest tiles of at
    most `tile` pixels that overlap by `overlap` or more, as short as that allows and evenly spread: 600 pixels are
    two tiles of 316, not two of 512. Every start is a multiple of `size_multiple`, so all tiles are sampled on the
    same grid as the whole image would be.
    """
    # In blocks of size_multiple pixels.
    longest = max(tile // size_multiple, 1)
    blocks = -(-side // size_multiple)
    if blocks <= longest:
        return Axis(side, blocks * size_multiple, (0,))
    # Rounded up, so that no overlap is shorter; a tile that is all overlap would never get on.
    shared = min(-(-overlap // size_multiple), longest - 1)
    last = -(-(blocks - longest) // (longest - shared))
    length = -(-(blocks + last * shared) // (last + 1))
    room = blocks - length
    starts = tuple(size_multiple * (index * room // last) for index in range(last + 1))
    return Axis(side, length * size_multiple, starts)


def tiled_pixels(height: int, width: int, tile: int, overlap: int, size_multiple: int) -> int:
    """Return the pixels that the network computes for an image of height x width, overlaps counted twice."""
    rows, columns = (plan_axis(side, tile, overlap, size_multiple) for side in (height, width))
    return len(rows.starts) * rows.length * len(columns.starts) * columns.length


def blend_weights(axis: Axis, overlap: int) -> Tensor:
    """Return float32 (tiles, length): weights that add up to 1 at every pixel of the side.

    Each tile fades out as a raised cosine over `overlap` pixels towards its neighbours, so that the outermost
    pixels, which the network computed from the least context, count least; at the image's own edge it does not.
    """
    end = axis.starts[-1] + axis.length
    inside = (torch.arange(axis.length, dtype=torch.float64) + 0.5) / max(overlap, 1)
    fade = torch.sin(inside.clamp(max=1) * (math.pi / 2)) ** 2 if overlap else torch.ones(axis.length).double()
    weights = torch.ones(len(axis.starts), axis.length, dtype=torch.float64)
    total = torch.zeros(end, dtype=torch.float64)
    for row, start in zip(weights, axis.starts, strict=True):
        if start > 0:
            row *= fade
        if start + axis.length < end:
            row *= fade.flip(0)
        total[start : start + axis.length] += row
    for row, start in zip(weights, axis.starts, strict=True):
        row /= total[start : start + axis.length]
    return weights.to(torch.float32)


def reflect_pad(x: Tensor, height: int, width: int) -> Tensor:
    """Return x (B, C, h, w) grown at the bottom and the right to height x width by reflection.

    The mirror image repeats as often as needed, so a pad may be longer than the side.
    """
    for dim, size in ((2, height), (3, width)):
        side = x.shape[dim]
        if size > side:
            period = max(1, 2 * side - 2)
            position = torch.arange(size, device=x.device) % period
            x = x.index_select(dim, torch.minimum(position, period - position))
    return x


def tiled(network: Network, tile: int, overlap: int, size_multiple: int, tile_pixels: int) -> Network:
    """Return a network for images (B, 3, H, W) of any size, from one whose sides are multiples of `size_multiple`.

    An image of at most one tile is evaluated whole, padded by reflection if its sides ask for it. Tiles are
    evaluated together while they hold at most `tile_pixels` pixels, so the memory of a pass is bounded.
    """

    def evaluate(x_t: Tensor, t: Tensor) -> Tensor:
        height, width = (plan_axis(int(side), tile, overlap, size_multiple) for side in x_t.shape[2:])
        if len(height.starts) == len(width.starts) == 1:
            if (height.side, width.side) == (height.length, width.length):
                return network(x_t, t)
            padded = reflect_pad(x_t, height.length, width.length)
            return network(padded, t)[:, :, : height.side, : width.side]
        together = max(1, tile_pixels // (len(x_t) * height.length * width.length))
        return _blend(network, x_t, t, (height, width), overlap, together)

    return evaluate


def _blend(
    network: Network, x_t: Tensor, t: Tensor, axes: tuple[Axis, Axis], overlap: int, together: int
) -> Tensor:
    rows, columns = (blend_weights(axis, overlap).to(x_t.device) for axis in axes)
    blended: Tensor | None = None
    for corners in _grid(axes, together):
        tiles = torch.cat([_cut(x_t, axes, row, column) for row, column in corners])
        outputs = network(tiles.contiguous(memory_format=torch.channels_last), t.repeat(len(corners)))
        if blended is None:
            blended = x_t.new_zeros(len(x_t), outputs.shape[1], *x_t.shape[2:])
        for output, (row, column) in zip(outputs.chunk(len(corners)), corners, strict=True):
            weighted = output * (rows[row][:, None] * columns[column])
            y, x = axes[0].starts[row], axes[1].starts[column]
            part = blended[:, :, y : y + axes[0].length, x : x + axes[1].length]
            part += weighted[:, :, : part.shape[2], : part.shape[3]]
    assert blended is not None
    return blended


def _grid(axes: tuple[Axis, Axis], together: int) -> Iterator[list[tuple[int, int]]]:
    """Yield (row, column) of the tiles, some at a time."""
    columns = len(axes[1].starts)
    count = len(axes[0].starts) * columns
    for first in range(0, count, together):
        yield [divmod(index, columns) for index in range(first, min(first + together, count))]


def _cut(x_t: Tensor, axes: tuple[Axis, Axis], row: int, column: int) -> Tensor:
    y, x = axes[0].starts[row], axes[1].starts[column]
    piece = x_t[:, :, y : y + axes[0].length, x : x + axes[1].length]
    return reflect_pad(piece, axes[0].length, axes[1].length)
