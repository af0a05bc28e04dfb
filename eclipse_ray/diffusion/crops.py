"""Sparse images of any sizes in one buffer, and the crops that a network of a fixed size is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageBuffer:
    """Images one after another: pixels uint8 (total,), offsets int64 (N,), sizes (height, width) int64 (N, 2)."""

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.offsets)

    def select(self, indices: Tensor) -> ImageBuffer:
        """Return those images, over the same pixels."""
        return ImageBuffer(self.pixels, self.offsets[indices], self.sizes[indices])

    def to(self, device: torch.device) -> ImageBuffer:
        """Return the buffer on a device."""
        return ImageBuffer(self.pixels.to(device), self.offsets.to(device), self.sizes.to(device))


def image_buffer(pixels: Tensor, sizes: Tensor) -> ImageBuffer:
    """Return the buffer of uint8 (total,) pixels of images with `sizes` int64 (N, 2), in that order."""
    ends = torch.cumsum(3 * sizes.prod(dim=1), dim=0)
    return ImageBuffer(pixels, ends - 3 * sizes.prod(dim=1), sizes)


def crops(images: ImageBuffer | Tensor, indices: Tensor, places: Tensor, side: int) -> Tensor:
    """Return uint8 (B, side, side, 3) cut from images[indices], on their device.

    `images` may also be uint8 (N, H, W, 3). places, float (B, 2) in [0, 1), says where down and across each crop
    lies; every position is equally likely for uniform ones. No image may be smaller than `side`.
    """
    buffer = images if isinstance(images, ImageBuffer) else _stacked(images)
    device = buffer.pixels.device
    indices, places = indices.to(device), places.to(device)
    room = buffer.sizes[indices] - side
    corner = (places * (room + 1)).to(torch.int64)
    row = corner[:, :1] + torch.arange(side, device=device)
    start = buffer.offsets[indices, None] + 3 * (row * buffer.sizes[indices, 1:] + corner[:, 1:])
    # Every line of every crop is a run of 3 * side values: a view of all such runs, indexed by where they start.
    return buffer.pixels.unfold(0, 3 * side, 1)[start].view(-1, side, side, 3)


def centre_crops(images: ImageBuffer, side: int) -> Tensor:
    """Return the middle of every image, uint8 (N, side, side, 3)."""
    middle = torch.full((len(images), 2), 0.5, dtype=torch.float64)
    return crops(images, torch.arange(len(images)), middle, side)


def _stacked(images: Tensor) -> ImageBuffer:
    count, height, width = images.shape[:3]
    sizes = torch.tensor([height, width], device=images.device).expand(count, 2)
    offsets = torch.arange(count, device=images.device) * (3 * height * width)
    return ImageBuffer(images.reshape(-1), offsets, sizes)
