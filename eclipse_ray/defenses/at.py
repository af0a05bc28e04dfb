"""Adversarial training (Madry et al., arXiv 1706.06083): the victim learns from images attacked at its expense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eclipse_ray.config import DefenseConfig
from eclipse_ray.victims.training import Augmentation, classify


def adversarial_training(config: DefenseConfig) -> Augmentation:
    """Return the augmentation that moves each image by PGD towards a higher loss of the model being trained.

    `at_steps` sign steps of `at_step_size_255` (null: a quarter of the radius) from a uniform start, kept within
    L-inf `at_eps_255` of the image and within [0, 1]. The model attacks itself in evaluation mode, as the public
    code of the poisons' benchmark does (lafeat/apbench): its running statistics stay untouched and the attack on
    an image does not depend on the rest of the batch.
    """
    radius = config.at_eps_255 / 255
    step = radius / 4 if config.at_step_size_255 is None else config.at_step_size_255 / 255

    def augment(
        images: Tensor, targets: Tensor, model: nn.Module, generator: torch.Generator, _progress: float
    ) -> tuple[Tensor, Tensor]:
        training = model.training
        model.eval()
        start = torch.rand(images.shape, generator=generator, device=images.device)
        attacked = (images + radius * (2 * start - 1)).clamp(0, 1)
        for _ in range(config.at_steps):
            attacked = attacked + step * _gradient(model, attacked, targets).sign()
            attacked = attacked.clamp(images - radius, images + radius).clamp(0, 1)
        model.train(training)
        return attacked, targets

    return augment


def _gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of the summed cross-entropy in the images alone; the weights' gradients stay."""
    with torch.enable_grad():
        variable = images.detach().requires_grad_(True)
        loss = F.cross_entropy(classify(model, variable), targets, reduction="sum")
        return torch.autograd.grad(loss, variable)[0]
