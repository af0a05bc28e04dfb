"""Training on what is worst for the victim: of several augmentations (aa), or within a small radius (at).

aa is UEraser (Qin et al., arXiv 2303.15127): plasma brightness, plasma contrast and channel shuffling, each with
probability aa_p, then TrivialAugment, all by kornia as in the public code. Of `aa_draws` draws of an image the one
with the highest loss is trained on. at is adversarial training (Madry et al., arXiv 1706.06083).
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from eclipse_ray.attacks import frozen, pgd
from eclipse_ray.config import DefenseConfig
from eclipse_ray.defenses.interface import DefenseSettings
from eclipse_ray.defenses.simple import augmentations, seeded
from eclipse_ray.victims.training import Augmentation, classify


def _in_order(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("expected the smaller number first")
    return ends


End = Annotated[float, Field(ge=0)]
Interval = Annotated[tuple[End, End], AfterValidator(_in_order)]


class Aa(DefenseSettings):
    """The settings of aa and aa-max."""

    aa_draws: int = Field(5, ge=1, description="Draws, of which the one of highest loss is kept.")
    aa_until: float = Field(
        0.3, ge=0, le=1, description="aa: part of training with that many draws, one after it; 60 of 200 epochs."
    )
    aa_p: float = Field(0.5, ge=0, le=1, description="Probability of each operation before TrivialAugment.")
    aa_roughness: Interval = Field((0.3, 0.7), description="Range of the plasma's roughness.")
    aa_intensity: Interval = Field((0.5, 1.0), description="Range of plasma brightness.")


def ueraser(config: DefenseConfig) -> Augmentation:
    """Return UEraser: the worst of `aa_draws` draws while progress < `aa_until`, then a single draw, as published.

    Raises ConfigError if kornia is not installed.
    """
    own = Aa.of(config)
    return _adversarial(own, own.aa_until, "aa")


def ueraser_max(config: DefenseConfig) -> Augmentation:
    """Return UEraser-max: the worst of `aa_draws` draws to the end. Raises as `ueraser` does."""
    return _adversarial(Aa.of(config), 1.0, "aa-max")


def policy(settings: Aa, defense: str = "aa") -> nn.Module:
    """Return what one draw is: float (B, 3, H, W) in [0, 1] to the same. Raises ConfigError without kornia."""
    library = augmentations(defense)
    module: nn.Module = library.AugmentationSequential(
        library.RandomPlasmaBrightness(
            roughness=settings.aa_roughness, intensity=settings.aa_intensity, p=settings.aa_p, keepdim=True
        ),
        library.RandomPlasmaContrast(roughness=settings.aa_roughness, p=settings.aa_p, keepdim=True),
        library.RandomChannelShuffle(p=settings.aa_p, keepdim=True),
        library.auto.TrivialAugment(),
    )
    return module


def _adversarial(settings: Aa, until: float, defense: str) -> Augmentation:
    one = policy(settings, defense)

    def augment(
        images: Tensor, targets: Tensor, model: nn.Module, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, Tensor]:
        # Plasma is otherwise drawn on the CPU and copied.
        one.to(images.device)
        draws = settings.aa_draws if progress < until else 1
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
