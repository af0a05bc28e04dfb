"""What a search for settings is judged by: a score of what purification removed, ranks, and the Pareto front.

The shortcut score asks whether the removed part (image minus purified image) tells the label. Of a clean image it
holds edges and texture, of a poisoned one also the shortcut that a victim would have learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eclipse_ray.errors import InputError

POOLED = 16
"""Side to which removed parts are averaged: constant patterns survive it, and the probe stays small."""
REACH = 2
"""Autocorrelations up to so many pixels apart: an autoregressive poison of 3 x 3 shows in them alone."""
FOLDS = 5
PENALTIES = (10.0, 1.0, 0.1)
"""Candidates of the probe's ridge penalty, for each image; of equally good ones the strongest is taken."""
BATCH = 512


@dataclass(frozen=True)
class ShortcutScore:
    """All in per cent: `score` is `removed_accuracy` less `clean_confidence`.

    `removed_accuracy` is the probe's cross-validated accuracy on the removed parts of the dataset,
    `clean_confidence` the accuracy that the same probe claims on those of clean images, with no labels.
    """

    score: float
    removed_accuracy: float
    clean_confidence: float


def shortcut_score(removed: Tensor, labels: Tensor, removed_clean: Tensor, seed: int) -> ShortcutScore:
    """Return how much better a linear probe knows labels from `removed` than it claims to from `removed_clean`.

    Both are differences image - purified, (N, H, W, 3) and (M, H, W, 3), of any real dtype; `labels` int (N,) from
    0. The probe is a ridge regression on averaged pixels and autocorrelations, its penalty the best of three.
    Raises InputError for fewer than 2 FOLDS images, no clean image, or two shapes.
    """
    if len(removed) < 2 * FOLDS or len(labels) != len(removed) or not len(removed_clean):
        raise InputError(
            f"shortcut_score: {len(removed)} removed parts, {len(labels)} labels and {len(removed_clean)} clean "
            f"ones; at least {2 * FOLDS} labelled and one clean image are needed"
        )
    if removed.shape[1:] != removed_clean.shape[1:]:
        raise InputError(f"shortcut_score: shapes {tuple(removed.shape)}, {tuple(removed_clean.shape)} differ")
    target, classes = labels.to(torch.int64), int(labels.max()) + 1
    features, clean = probe_features(removed), probe_features(removed_clean)
    order = torch.randperm(len(removed), generator=torch.Generator().manual_seed(seed))
    own = torch.empty(len(PENALTIES), len(removed), classes, dtype=torch.float64)
    other = torch.zeros(len(PENALTIES), len(clean), classes, dtype=torch.float64)
    for held in order.chunk(FOLDS):
        kept = torch.ones(len(removed), dtype=torch.bool)
        kept[held] = False
        outputs = _probe(features[kept], F.one_hot(target[kept], classes), torch.cat([features[held], clean]))
        own[:, held], other = outputs[:, : len(held)], other + outputs[:, len(held) :] / FOLDS
    accuracies = (own.argmax(2) == target).double().mean(1)
    best = int(accuracies.argmax())
    # A regression on one-hot labels estimates probabilities, so its largest output is the accuracy that it claims:
    # too much with few images, and by how much is known where there are labels.
    claims = [float(outputs[best].amax(1).clamp(0, 1).mean()) for outputs in (own, other)]
    accuracy = 100 * float(accuracies[best])
    confidence = min(100.0, accuracy * claims[1] / claims[0])
    return ShortcutScore(accuracy - confidence, accuracy, confidence)


def probe_features(removed: Tensor) -> Tensor:
    """Return what the probe sees of removed parts (N, H, W, 3), float64 (N, features)."""
    return torch.cat([_features(part) for part in torch.split(removed, BATCH)])


def _features(removed: Tensor) -> Tensor:
    planes = removed.permute(0, 3, 1, 2).double()
    pooled = F.adaptive_avg_pool2d(planes, (min(POOLED, planes.shape[2]), min(POOLED, planes.shape[3])))
    centred = planes - planes.mean(dim=(2, 3), keepdim=True)
    variance = centred.square().mean(dim=(2, 3))
    parts = [pooled.flatten(1), variance.add(1e-6).log()]
    for down in range(REACH + 1):
        for right in range(-REACH if down else 1, REACH + 1):
            parts.append(_covariance(centred, down, right) / (variance + 1e-6))
    return torch.cat(parts, 1)


def _covariance(planes: Tensor, down: int, right: int) -> Tensor:
    """Return the mean product (N, C) of pixels that lie (down, right) apart."""
    height, width = planes.shape[2:]
    first = planes[:, :, : height - down, max(0, -right) : width - max(0, right)]
    second = planes[:, :, down:, max(0, right) : width + min(0, right)]
    return (first * second).mean(dim=(2, 3))


def _probe(features: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
    """Return ridge outputs (penalties, queries, classes); features are standardised as the fitted ones are."""
    mean, deviation = features.mean(0), features.std(0) + 1e-9
    x, level = (features - mean) / deviation, targets.double().mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    rotated = vectors.T @ (x.T @ (targets.double() - level))
    projected = ((queries - mean) / deviation) @ vectors
    # Not the frequency of each class: with few images it is lowest for just the classes that were held out.
    base = 1 / targets.shape[1]
    return torch.stack(
        [projected @ (rotated / (values + penalty * len(x))[:, None]) + base for penalty in PENALTIES]
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, equal values sharing their mean rank; None if either side is constant.

    Raises InputError for sequences of two lengths.
    """
    if len(first) != len(second):
        raise InputError(f"spearman: {len(first)} and {len(second)} values; each needs its partner")
    ranks = torch.stack([_ranks(first), _ranks(second)])
    centred = ranks - ranks.mean(1, keepdim=True)
    scale = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / scale if scale > 0 else None


def _ranks(values: Sequence[float]) -> Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    below = (x[None, :] < x[:, None]).sum(1)
    return below + ((x[None, :] == x[:, None]).sum(1) - 1) / 2


def pareto_front(defense: Sequence[float], fidelity: Sequence[float]) -> list[bool]:
    """Return which points no other one beats: better in one of the two and not worse in the other."""
    pairs = list(zip(defense, fidelity, strict=True))
    return [
        not any(a >= x and b >= y and (a, b) != (x, y) for a, b in pairs if not math.isnan(a + b))
        for x, y in pairs
    ]
