"""From scores to a verdict: one p-value, low or high frequency, class or sample, and what to purify with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eclipse_ray.detection import views as features
from eclipse_ray.detection.scores import Score, check_labels, class_mean_share
from eclipse_ray.detection.views import Images

Verdict = Literal["clean", "poisoned"]
Frequency = Literal["low", "high"]
Scope = Literal["class", "sample"]

LOW_SHARE = 0.4
"""Part of the class means' energy below 1/8 cycle per pixel from which a pattern is called low."""
COLOUR_SHARE = 0.02
"""Part of the colour residual's energy in class means from which a class shares a pattern: class-wise poisons
measured have 0.05 or more, sample-wise ones 0.005 or less."""
DRAWS = 20
"""Permutations of labels that say how much energy class means have by chance."""


@dataclass(frozen=True)
class Finding:
    """A verdict, its p-value (Holm), and the kind of poison; None where nothing was found or it cannot be told."""

    verdict: Verdict
    p_value: float
    frequency: Frequency | None
    scope: Scope | None
    words: str


def judge(sample: Images, scores: Sequence[Score], alpha: float) -> Finding:
    """Return the verdict at the false positive rate `alpha` under the nulls of the scores."""
    adjusted = holm({score.name: score.p_value for score in scores})
    p_value = min(adjusted.values())
    found = [score for score in scores if adjusted.get(score.name, 1.0) <= alpha]
    if not found:
        words = (
            f"Likely clean: no score is beyond its tolerance (p = {p_value:.2g}, corrected for {len(adjusted)} "
            "scores). A poison that respects the mirror and changes no statistic looked at stays unseen."
        )
        return Finding("clean", p_value, None, None, words)
    names = {score.name for score in found}
    frequency = _frequency(sample, names)
    scope = _scope(sample, names, {score.name: score.effect for score in scores})
    evidence = "; ".join(f"{score.name} (effect {score.effect:.2f}): {score.detail}" for score in found)
    words = f"Likely poisoned: {frequency} frequency, {scope}-wise (p = {p_value:.2g}). {evidence}."
    return Finding("poisoned", p_value, frequency, scope, words)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number: the largest chance that any at most as small one is false."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def _frequency(sample: Images, names: set[str]) -> Frequency:
    """Low where the patterns that classes share lie, for a large part, below 1/8 cycle per pixel; else high."""
    if not names & {"predictability", "class_mean", "coarse", "colour"}:
        return "high"
    labels = check_labels(sample)
    generator = torch.Generator().manual_seed(0)
    chance = [_low_and_all(sample, labels[torch.randperm(len(labels), generator=generator)]) for _ in range(DRAWS)]
    low, everything = _low_and_all(sample, labels)
    noise = torch.tensor([each[0] for each in chance]).square().mean().sqrt()
    return "low" if low > 3 * float(noise) and low > LOW_SHARE * everything else "high"


def _low_and_all(sample: Images, labels: Tensor) -> tuple[float, float]:
    halves = torch.arange(len(labels)) % 2
    one, other = (class_means(sample, labels, halves == half) for half in (0, 1))
    return features.low_and_all(one, other)


def class_means(sample: Images, labels: Tensor, chosen: Tensor) -> Tensor:
    """Return the odd part of each class's mean image less the mean of all classes, float32 (C, 3, S, S)."""
    means = torch.stack(
        [sample.images[chosen & (labels == label)].float().mean(0) for label in range(int(labels.max()) + 1)]
    )
    odd = (means - means.flip(-1)) / 2
    return odd - odd.mean(0)


def _scope(sample: Images, names: set[str], effects: dict[str, float]) -> Scope:
    """Class where its images share one pattern or one filter; else each image has a perturbation of its own."""
    # Natural images have little fine colour, so that a weak pattern of a class shows there first.
    rows = features.rows_of(sample, features.colour)
    share = class_mean_share(rows - rows.mean(0), check_labels(sample))
    shares_pattern = "class_mean" in names or share >= COLOUR_SHARE
    shares_filter = "convolution" in names and effects["convolution"] > effects["autocorrelation"]
    return "class" if shares_pattern or shares_filter else "sample"
