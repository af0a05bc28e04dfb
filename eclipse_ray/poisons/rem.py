"""REM: robust error-minimising noise (Fu et al., arXiv 2203.14533).

Noise that a classifier learns instead of the images even if it trains adversarially: the loss is minimised under an
adversary of a smaller radius, which maximises it, and averaged over random crops and flips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eclipse_ray.poisons.views import Draw, random_view

Classifier = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to logits (B, K)."""


@dataclass(frozen=True)
class MinMax:
    """Bounds and step sizes on [0, 1], and how many steps and draws are spent."""

    eps: float
    step_size: float
    steps: int
    eot_draws: int
    adversary_eps: float
    adversary_step_size: float
    adversary_steps: int


def adversary(classifier: Classifier, x: Tensor, labels: Tensor, setting: MinMax, start: Tensor) -> Tensor:
    """Return x (B, 3, H, W in [0, 1]) moved within adversary_eps to raise the classifier's loss (PGD).

    `start`, of the shape of x in [0, 1], places the first point in the adversary's box.
    """
    eps = setting.adversary_eps
    moved = (x + (2 * start - 1) * eps).clamp(0, 1).detach()
    for _ in range(setting.adversary_steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(_loss(classifier, moved, labels), moved)
        moved = moved.detach() + setting.adversary_step_size * gradient.sign()
        moved = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return moved.detach()


def min_max_noise(classifier: Classifier, x: Tensor, labels: Tensor, setting: MinMax, draw: Draw) -> Tensor:
    """Return noise (B, 3, H, W) within eps that lowers the loss which the adversary then raises again.

    Each step sums the gradients of `eot_draws` random views of x + noise, taken at the point that the adversary
    found near each view, as if the point moved along with the view.
    """
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    delta = (2 * draw(0, shape) - 1) * setting.eps
    views = draw(1, (setting.steps, setting.eot_draws, 3))
    for step in range(setting.steps):
        total = torch.zeros_like(x)
        for index in range(setting.eot_draws):
            delta.requires_grad_()
            seen = random_view((x + delta).clamp(0, 1), views[:, step, index])
            start = draw(2 + step * setting.eot_draws + index, shape)
            worst = adversary(classifier, seen.detach(), labels, setting, start).requires_grad_()
            (gradient,) = torch.autograd.grad(_loss(classifier, worst, labels), worst)
            total += torch.autograd.grad(seen, delta, gradient)[0]
            delta = delta.detach()
        delta = (delta - setting.step_size * total.sign()).clamp(-setting.eps, setting.eps)
    return delta


def _loss(classifier: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    # The sum, so that the gradient of an image does not depend on its batch.
    return F.cross_entropy(classifier(x), labels, reduction="sum")
