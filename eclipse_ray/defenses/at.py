"""Adversarial training (Madry et al., arXiv 1706.06083): the victim learns from images attacked at its expense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from eclipse_ray.attacks import frozen, pgd
from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.interface import DefenseSettings
from eclipse_ray.victims.training import Augmentation, classify


class At(DefenseSettings):
    """The settings of at."""

    at_eps_255: float = Field(8.0, gt=0, description="L-inf radius of the attack, in 1/255.")
    at_steps: int = Field(10, ge=1, description="Steps of projected gradient ascent.")
    at_step_size_255: float | None = Field(None, gt=0, description="In 1/255; null: a quarter of the radius.")


def adversarial_training(config: DefenseConfig) -> Augmentation:
    """Return the augmentation that moves each image by PGD towards a higher loss of the model being trained.

    `at_steps` sign steps of `at_step_size_255` (null: a quarter of the radius) from a uniform start, kept within
    L-inf `at_eps_255` of the image and within [0, 1]. The model attacks itself in evaluation mode, as the public
    code of the poisons' benchmark does (lafeat/apbench): its running statistics stay untouched and the attack on
    an image does not depend on the rest of the batch.
    """
    own = At.of(config)
    radius = own.at_eps_255 / 255
    step = radius / 4 if own.at_step_size_255 is None else own.at_step_size_255 / 255

    def augment(
        images: Tensor, targets: Tensor, model: nn.Module, generator: torch.Generator, _progress: float
    ) -> tuple[Tensor, Tensor]:
        unit = torch.rand(images.shape, generator=generator, device=images.device)
        with torch.enable_grad(), frozen(model):
            moved = pgd(
                images,
                lambda attacked, _: F.cross_entropy(classify(model, attacked), targets, reduction="none"),
                radius,
                step,
                own.at_steps,
                start=radius * (2 * unit - 1),
                maximise=True,
            )
        return (images + moved).clamp(0, 1), targets

    return augment
