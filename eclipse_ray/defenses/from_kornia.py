"""Augmentations of kornia, fed from a generator.

kornia draws from torch's global generators alone (neither Python's nor NumPy's), so a seed drawn from ours makes
them repeatable; the global state is put back afterwards. It needs torch and kornia_rs, and no torchvision.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from eclipse_ray.errors import ConfigError


def augmentations(defense: str) -> ModuleType:
    """Return kornia.augmentation. Raises ConfigError, naming the defense that needs it, if it is not installed."""
    try:
        import kornia.augmentation
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the defense {defense} needs kornia ({error}); install it with: pip install 'eclipse-ray[defenses]'"
        ) from None
    return kornia.augmentation


def seeded(module: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return `module(images)` with all of its draws decided by `generator`, which moves on by one draw.

    Images are float (B, 3, H, W) in [0, 1] on the generator's device; nobody else's random numbers move.
    """
    seed = int(torch.randint(0, 2**63 - 1, (), generator=generator, device=generator.device))
    cuda = images.device.type == "cuda"
    with torch.random.fork_rng(devices=[images.device] if cuda else []), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(images.device):
                torch.cuda.manual_seed(seed)
        result: Tensor = module(images)
    return result
