"""Null distributions by relabelling: signs that turn with the mirror, labels, or which of two sets a row is of.

A p-value is (1 + relabellings at least as extreme) / (1 + relabellings), which is valid for any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 500
"""Relabellings worked on at once."""


def p_of(observed: float, drawn: Tensor) -> float:
    """Return the one-sided p-value of a statistic among those `drawn` under the null."""
    return (1 + int((drawn >= observed).sum())) / (1 + len(drawn))


def sign_flips(values: Tensor, tolerance: float, count: int, generator: torch.Generator) -> tuple[float, float]:
    """Return (effect, p-value) of `values` (N) whose law is symmetric under the null.

    The effect is mean / root mean square. The p-value is of an effect beyond `tolerance`, which is in root mean
    squares: the values are first moved down by it.
    """
    size = float(values.square().mean().sqrt())
    if size == 0:
        return 0.0, 1.0
    moved = values / size - tolerance
    drawn = [moved @ signs for signs in _signs(len(values), count, generator)]
    return float(values.mean()) / size, p_of(float(moved.sum()), torch.cat(drawn))


def class_mean_flips(
    rows: Tensor, labels: Tensor, tolerance: float, count: int, generator: torch.Generator
) -> tuple[float, float]:
    """Return (effect, p-value) of the class means of `rows` (N, d), each row as likely as its negative.

    The effect is the part of the rows' energy that lies in class means, less what chance puts there; the p-value
    is of an effect beyond `tolerance`.
    """
    grams = _class_grams(rows, labels)
    drawn = []
    for signs in _signs(len(rows), count, generator):
        total = torch.zeros(signs.shape[1])
        for members, gram in grams:
            chosen = signs[members]
            total += (chosen * (gram @ chosen)).sum(0)
        drawn.append(total)
    observed = sum(float(gram.sum()) for _, gram in grams)
    return observed, p_of(observed - tolerance, torch.cat(drawn))


def class_mean_share(rows: Tensor, labels: Tensor) -> float:
    """Return the part of the energy of `rows` (N, d) in their class means, less what chance puts there."""
    return sum(float(gram.sum()) for _, gram in _class_grams(rows, labels))


def _class_grams(rows: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each class's members (N,) and inner products of its rows, whose sum is its share of all energy."""
    energy = max(float(rows.square().sum()), torch.finfo(rows.dtype).tiny)
    grams = []
    for label in torch.unique(labels):
        part = rows[labels == label]
        gram = part @ part.T
        # Signs leave the diagonal as it is: without it, the mean over all signs is 0.
        grams.append((labels == label, gram.fill_diagonal_(0) / max(1, len(part) - 1) / energy))
    return grams


def two_samples(
    first: Tensor, second: Tensor, tolerance: float, count: int, generator: torch.Generator
) -> tuple[float, float]:
    """Return (effect, p-value) of the mean of `first` (N) above that of `second` (M), exchangeable under the null.

    The effect is in standard deviations of both together; the p-value is of one beyond `tolerance`.
    """
    deviation = float(torch.cat([first - first.mean(), second - second.mean()]).square().mean().sqrt())
    if deviation == 0:
        return 0.0, 1.0
    both = torch.cat([first - tolerance * deviation, second]).double()
    # The difference of means grows with the sum of the first sample alone, for the sum of both is fixed.
    drawn = torch.stack(
        [both[torch.randperm(len(both), generator=generator)[: len(first)]].sum() for _ in range(count)]
    )
    observed = float(both[: len(first)].sum())
    return float(first.mean() - second.mean()) / deviation, p_of(observed, drawn)


def _signs(rows: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        yield 2.0 * torch.randint(0, 2, (rows, size), generator=generator) - 1.0
