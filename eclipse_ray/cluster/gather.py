"""Join what the workers of a training computed on their slices of a batch."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

from eclipse_ray.diffusion.training import worker_slice


def gather_slices(part: Tensor, batch_size: int) -> Tensor:
    """Return (batch_size,) of all workers in rank order from this worker's slice, on its device."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return part
    world_size = torch.distributed.get_world_size()
    slices = [worker_slice(batch_size, rank, world_size) for rank in range(world_size)]
    lengths = [one.stop - one.start for one in slices]
    # all_gather takes equal shapes only, and slices differ by one if the batch does not divide.
    padded = part.new_zeros(max(lengths))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([whole[:length] for whole, length in zip(parts, lengths, strict=True)])
