"""What the tests of defenses share: small labelled material, a generator, a fixed linear victim."""

import torch
from torch import nn

from eclipse_ray.config import CompensationConfig, PurifyConfig
from eclipse_ray.datasets.images import jpeg_roundtrip
from eclipse_ray.defenses.interface import Material


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels(count, classes=4):
    return torch.arange(count) % classes


def images(count, size=16, seed=0):
    """Return random colours on a coarse grid, uint8 (count, size, size, 3)."""
    points = torch.rand(count, 3, 5, 5, generator=generator(seed))
    smooth = nn.functional.interpolate(points, size=(size, size), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def material(count=24, size=16, classes=4, **changes):
    """Return material without a denoiser, unless changed."""
    fields = {
        "images": images(count, size),
        "labels": labels(count, classes),
        "ids": [f"image-{index}" for index in range(count)],
        "num_classes": classes,
        "denoiser": None,
        "purify": PurifyConfig(),
        "compensation": CompensationConfig(),
        "seed": 7,
        "device": torch.device("cpu"),
        "jpeg": lambda batch, quality: torch.from_numpy(jpeg_roundtrip(batch.numpy(), quality)),
    }
    return Material(**{**fields, **changes})


def linear_victim(size=16, classes=4, seed=3):
    """Return a linear classifier of float (B, 3, size, size) with drawn weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes))


def batch(count=8, size=16, classes=4, seed=1):
    """Return (images float (count, 3, size, size) in [0, 1], one-hot targets (count, classes))."""
    drawn = torch.rand(count, 3, size, size, generator=generator(seed))
    return drawn, nn.functional.one_hot(labels(count, classes), classes).float()
