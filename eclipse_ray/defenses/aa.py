"""Adversarial augmentation: UEraser (Qin et al., arXiv 2303.15127).

Plasma brightness, plasma contrast and channel shuffling, each with probability aa_p, then TrivialAugment, all by
kornia as in the public code. Of `aa_draws` draws of an image the one with the highest loss is trained on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.simple import augmentations, seeded
from eclipse_ray.victims.training import Augmentation, classify


def ueraser(config: DefenseConfig) -> Augmentation:
    """Return UEraser: the worst of `aa_draws` draws while progress < `aa_until`, then a single draw, as published.

    Raises ConfigError if kornia is not installed.
    """
    return _adversarial(config, config.aa_until, "aa")


def ueraser_max(config: DefenseConfig) -> Augmentation:
    """Return UEraser-max: the worst of `aa_draws` draws to the end. Raises as `ueraser` does."""
    return _adversarial(config, 1.0, "aa-max")


def policy(config: DefenseConfig, defense: str = "aa") -> nn.Module:
    """Return what one draw is: float (B, 3, H, W) in [0, 1] to the same. Raises ConfigError without kornia."""
    library = augmentations(defense)
    module: nn.Module = library.AugmentationSequential(
        library.RandomPlasmaBrightness(
            roughness=config.aa_roughness, intensity=config.aa_intensity, p=config.aa_p, keepdim=True
        ),
        library.RandomPlasmaContrast(roughness=config.aa_roughness, p=config.aa_p, keepdim=True),
        library.RandomChannelShuffle(p=config.aa_p, keepdim=True),
        library.auto.TrivialAugment(),
    )
    return module


def _adversarial(config: DefenseConfig, until: float, defense: str) -> Augmentation:
    one = policy(config, defense)

    def augment(
        images: Tensor, targets: Tensor, model: nn.Module, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, Tensor]:
        # Plasma is otherwise drawn on the CPU and copied.
        one.to(images.device)
        draws = config.aa_draws if progress < until else 1
        candidates = [seeded(one, images, generator) for _ in range(draws)]
        chosen = candidates[0] if draws == 1 else worst(candidates, targets, model)
        return chosen.clamp(0, 1), targets

    return augment


@torch.no_grad()
def worst(candidates: list[Tensor], targets: Tensor, model: nn.Module) -> Tensor:
    """Return, for each image, the candidate (B, 3, H, W) of the highest cross-entropy with its target (B, K).

    The model judges in the mode it is in, that is in training mode, as in the public code: normalisation uses the
    batch's own statistics, and the running ones see every candidate.
    """
    chosen, highest = candidates[0], candidates[0].new_full((len(targets),), -torch.inf)
    for candidate in candidates:
        loss = F.cross_entropy(classify(model, candidate), targets, reduction="none")
        higher = loss > highest
        chosen = torch.where(higher[:, None, None, None], candidate, chosen)
        highest = torch.where(higher, loss, highest)
    return chosen
