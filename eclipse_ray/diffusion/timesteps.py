"""Two ways for training to draw t: uniformly, or by the size of its loss (Nichol & Dhariwal 2021, section 3.3).

The history of losses is a dictionary of plain tensors on the CPU, so that it can be saved with the training and is
the same on every worker: `losses` float32 (t_max, 10), the last ten of each timestep, and `counts` int64 (t_max,).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSSES_PER_TIMESTEP = 10
# Part of the probability that stays uniform, so that no timestep is forgotten and no weight is unbounded.
UNIFORM_PROBABILITY = 0.001


def start_losses(t_max: int) -> dict[str, Tensor]:
    """Return an empty history of the losses of timesteps 0..t_max - 1."""
    return {
        "losses": torch.zeros(t_max, LOSSES_PER_TIMESTEP, dtype=torch.float32),
        "counts": torch.zeros(t_max, dtype=torch.int64),
    }


def record_losses(history: dict[str, Tensor], t: Tensor, losses: Tensor) -> None:
    """Enter losses (B,) of timesteps t (B,) in their order, in place; each replaces the oldest of its timestep."""
    for timestep, loss in zip(t.tolist(), losses.tolist(), strict=True):
        slot = int(history["counts"][timestep]) % LOSSES_PER_TIMESTEP
        history["losses"][timestep, slot] = loss
        history["counts"][timestep] += 1


def timestep_probabilities(history: dict[str, Tensor]) -> Tensor:
    """Return float64 (t_max,), proportional to sqrt(E[L_t^2]); uniform until every timestep has ten losses."""
    count = len(history["counts"])
    uniform = torch.full((count,), 1 / count, dtype=torch.float64)
    if int(history["counts"].min()) < LOSSES_PER_TIMESTEP:
        return uniform
    root_mean_square = history["losses"].double().square().mean(dim=1).sqrt()
    return (1 - UNIFORM_PROBABILITY) * root_mean_square / root_mean_square.sum() + UNIFORM_PROBABILITY * uniform


def draw_timesteps(
    t_max: int, count: int, generator: torch.Generator, history: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return t int64 (count,) in 0..t_max - 1 and weights float32 (count,); uniform and ones without a history.

    The mean of weight times loss is an unbiased estimate of the mean loss over timesteps whatever the history.
    """
    if history is None:
        return torch.randint(0, t_max, (count,), generator=generator), torch.ones(count)
    probabilities = timestep_probabilities(history)
    drawn = torch.rand(count, dtype=torch.float64, generator=generator)
    # The last cumulative sum may fall short of 1 by a rounding.
    t = torch.searchsorted(probabilities.cumsum(0), drawn, right=True).clamp(max=t_max - 1)
    return t, (1 / (t_max * probabilities[t])).float()
