"""Exponential moving average of the weights; the average is what gets saved and used."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def start_ema(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the module's floating-point parameters and buffers, by name."""
    return {
        name: value.detach().clone() for name, value in module.state_dict().items() if value.is_floating_point()
    }


@torch.no_grad()
def update_ema(
    average: dict[str, Tensor], module: nn.Module, decay: float, iteration: int, warmup: bool = True
) -> None:
    """Move the average towards the module, in place; with warm-up the decay is (1 + i) / (10 + i) if smaller.

    Without the warm-up a short training would average over its own random start.
    """
    if warmup:
        decay = min(decay, (1 + iteration) / (10 + iteration))
    state = module.state_dict()
    torch._foreach_lerp_(list(average.values()), [state[name] for name in average], 1 - decay)
