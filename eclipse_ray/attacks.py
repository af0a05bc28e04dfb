"""Sign-gradient attacks and differentiable crops, which poisons and adversarial training share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eclipse_ray.diffusion.noise import uniform

Objective = Callable[[Tensor, int], Tensor]
"""(images (B, 3, H, W) in [0, 1], step) to one value per image (B,)."""
Crops = tuple[Tensor, Tensor]
"""Row and column shifts, int64 (2, B) in 0..2 padding, and flips, bool (B,)."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of the weights within; what was before comes back after."""
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, value in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(value)


def pgd(
    images: Tensor,
    objective: Objective,
    bound: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    *,
    start: Tensor | None = None,
    maximise: bool = False,
) -> Tensor:
    """Return the perturbation (B, 3, H, W) after `steps` sign steps down (or up) the objective.

    It stays within L-inf `bound`, and `images` (B, 3, H, W) plus it within [0, 1]; it begins at `start`, or zero.
    Bound and step size are those of all images, or (B, 1, 1, 1).
    Images do not influence each other as long as the network is in evaluation mode.
    """
    signed = step_size if maximise else -step_size
    limit = torch.as_tensor(bound, dtype=images.dtype, device=images.device)
    delta = torch.zeros_like(images) if start is None else (images + start).clamp(0, 1) - images
    for step in range(steps):
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(images + delta, step).sum(), delta)
        moved = (delta.detach() + signed * gradient.sign()).clamp(-limit, limit)
        delta = (images + moved).clamp(0, 1) - images
    return delta.detach()


def draw_crops(count: int, padding: int, generator: torch.Generator) -> Crops:
    """Return a random crop and flip for each of `count` images, as victims draw them."""
    shift = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    return shift, torch.rand(count, generator=generator) < 0.5


def keyed_crops(seed: int, ids: Sequence[str], slot: int, draws: int, padding: int) -> list[Crops]:
    """Return `draws` crops and flips of every image that depend only on (seed, its id, slot)."""
    numbers = uniform(seed, ids, slot, (draws, 3))
    shifts = (numbers[..., :2] * (2 * padding + 1)).long()
    return [(shifts[:, draw].T, numbers[:, draw, 2] < 0.5) for draw in range(draws)]


def crop_flip(images: Tensor, crops: Crops, padding: int) -> Tensor:
    """Return images (B, 3, H, W) cropped after padding with zeros, then flipped; gradients flow through."""
    shift, flip = crops[0].to(images.device), crops[1].to(images.device)
    count, channels, height, width = images.shape
    ys = shift[0, :, None] + torch.arange(height, device=images.device)
    xs = torch.arange(width, device=images.device).expand(count, width)
    xs = torch.where(flip[:, None], width - 1 - xs, xs) + shift[1, :, None]
    padded = F.pad(images, (padding,) * 4)
    rows = padded.gather(2, ys[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return rows.gather(3, xs[:, None, None, :].expand(-1, channels, height, -1))
