"""Image shortcut squeezing (Liu et al., arXiv 2301.13838): gray or JPEG training images; test images stay.

Both change the stored images, before crop and flip, as published. JPEG is Pillow's, which comes in from outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.interface import Material

LUMA_65536 = (19595, 38470, 7471)
"""ITU-R 601 weights of red, green and blue as Pillow rounds them, in 1/65536; they add up to one."""


def gray(material: Material, _config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), as ITU-R 601 luma on three channels, to the bit as Pillow does."""
    weighted = material.images.to(torch.int32) * torch.tensor(LUMA_65536, dtype=torch.int32)
    luma = (weighted.sum(dim=-1, keepdim=True) + 2**15) >> 16
    return luma.to(torch.uint8).expand(material.images.shape).contiguous()


def jpeg(material: Material, config: DefenseConfig) -> Tensor:
    """Return the images, uint8 (N, H, W, 3), stored as JPEG of quality `iss_jpeg_quality` and read again."""
    return material.jpeg(material.images, config.iss_jpeg_quality)
