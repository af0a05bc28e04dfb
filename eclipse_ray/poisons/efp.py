"""EFP: entangled features (Wen et al., "Is Adversarial Training Really a Silver Bullet ...", ICLR 2023).

Noise that takes an image's features, as an adversarially trained network sees them, away from the centroid of its
own class (`push`) or towards the nearest centroid of another (`pull`), so that classes overlap.
"""

from __future__ import annotations

import torch
from torch import Tensor


def push_loss(features: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Return minus the mean squared distance of features (B, F) to the centroid of their own class, (B,)."""
    return -(features - centroids[labels]).square().mean(1)


def pull_loss(features: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Return the mean squared distance of features (B, F) to the nearest centroid of another class, (B,)."""
    distances = (features[:, None] - centroids[None]).square().mean(2)
    own = torch.nn.functional.one_hot(labels, len(centroids)).bool()
    return distances.masked_fill(own, torch.inf).amin(1)
