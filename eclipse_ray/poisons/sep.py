"""SEP: self-ensemble protection (Chen et al., arXiv 2211.12005).

Targeted noise crafted against the checkpoints of one training run, whose gradients are nearly orthogonal to each
other. `plain` lowers the cross-entropy of a wrong class; `fa_vr` moves the features to that class's mean (feature
alignment) along variance-reduced gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eclipse_ray.poisons.descent import Objective, gradient_of, project, sign_descent


def target_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Return the class that each image is moved to: half the number of classes further on."""
    return (labels + num_classes // 2) % num_classes


def mean_gradient(objectives: Sequence[Objective], x: Tensor) -> Tensor:
    """Return the mean over the objectives of their gradients at x."""
    total = torch.zeros_like(x)
    for objective in objectives:
        total += gradient_of(objective, x)
    return total / len(objectives)


def ensemble_noise(
    objectives: Sequence[Objective], x: Tensor, eps: float, step_size: float, steps: int
) -> Tensor:
    """Return noise (B, 3, H, W): sign steps from zero against the mean gradient of all objectives."""
    start = torch.zeros_like(x)
    return sign_descent(lambda moved, _: mean_gradient(objectives, moved), x, start, eps, step_size, steps)


def variance_reduced_noise(
    objectives: Sequence[Objective], x: Tensor, eps: float, step_size: float, choices: Sequence[Sequence[int]]
) -> Tensor:
    """Return noise (B, 3, H, W) by sign steps against variance-reduced gradients.

    `choices` names, for each outer step, the objective of each inner step. An inner step adds to a sum the
    gradient at a scout point, less what that objective's gradient at the outer point differs from the mean there,
    and moves the scout against the sum's sign. The outer step then follows the sign of the whole sum.
    """

    def gradient(moved: Tensor, step: int) -> Tensor:
        outer = [gradient_of(objective, moved) for objective in objectives]
        mean = torch.stack(outer).mean(0)
        scout, total = moved, torch.zeros_like(x)
        for index in choices[step]:
            total = total + gradient_of(objectives[index], scout) - (outer[index] - mean)
            scout = project(scout - step_size * total.sign(), x, eps)
        return total

    return sign_descent(gradient, x, torch.zeros_like(x), eps, step_size, len(choices))
