"""A linear probe: ridge regression onto one-hot labels, in the smaller of its two forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 0.3
"""Weight of the penalty, in mean squares of a feature."""


def fit_probe(rows: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Return what maps rows (n, d) to class scores (n, classes), fitted to `rows` (N, d) and `labels` (N)."""
    probes = fit_probes(rows, [labels], classes)
    return lambda others: probes(others)[0]


def fit_probes(rows: Tensor, labellings: Sequence[Tensor], classes: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return what maps rows to the class scores of one probe for each labelling; one system is solved for all."""
    centre = rows.mean(0)
    centred = rows - centre
    scale = float(centred.square().mean().sqrt()) or 1.0
    centred = centred / scale
    targets = torch.cat([F.one_hot(labels, classes).float() for labels in labellings], 1)
    targets = targets - targets.mean(0)
    count, width = centred.shape
    penalty = RIDGE * count
    if width <= count:
        weights = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(width), centred.T @ targets)
    else:
        weights = centred.T @ torch.linalg.solve(centred @ centred.T + penalty * torch.eye(count), targets)
    return lambda others: ((others - centre) / scale @ weights).split(classes, 1)


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the score of each row's own class above the mean of all, (n)."""
    return scores.gather(1, labels[:, None])[:, 0] - scores.mean(1)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the part of rows whose own class scores highest, 0-1."""
    return float((scores.argmax(1) == labels).float().mean())


def confidence(scores: Tensor) -> Tensor:
    """Return how far the best class is above the second, (n)."""
    best = scores.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]
