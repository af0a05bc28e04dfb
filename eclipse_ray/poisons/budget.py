"""What every poison shares: checked inputs, the norm bound, and 8-bit storage by rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eclipse_ray.config import PoisonConfig
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.poisons.costs import LINF_255

AR_L2 = 1.0
"""Published L2 bound of ar on [0, 1] (arXiv 2206.03693)."""
LSP_RMS = 6 / 255
"""Published root mean square of lsp on [0, 1], so L2 1.304 at 32 px (arXiv 2111.00898)."""

# First timesteps reserved for the draws of each poison, far above any diffusion timestep and apart from
# those of compensation, so that no draw is ever shared.
URP_T = 2**30 + 2**16
LSP_T = 2**30 + 2 * 2**16
AR_T = 2**30 + 3 * 2**16
CUDA_T = 2**30 + 4 * 2**16
TAP_T = 2**30 + 5 * 2**16
REM_T = 2**30 + 6 * 2**16
SEP_T = 2**30 + 7 * 2**16
EFP_T = 2**30 + 8 * 2**16
ADP_T = 2**30 + 9 * 2**16


def budget(config: PoisonConfig, shape: Sequence[int]) -> tuple[str, float]:
    """Return ("linf", "l2" or "none", bound on [0, 1]) of `config` for images of `shape` (H, W, 3).

    Raises ConfigError when an L-inf bound is below 1/255 and so vanishes in 8-bit storage.
    """
    if config.name == "cuda":
        if config.eps_255 is not None:
            raise ConfigError("poison.eps_255: cuda convolves images and has no norm bound; leave it out")
        return "none", math.inf
    if config.name in ("lsp", "ar"):
        published = AR_L2 if config.name == "ar" else LSP_RMS * math.sqrt(math.prod(shape))
        return "l2", published if config.eps_255 is None else config.eps_255 / 255
    eps_255 = LINF_255 if config.eps_255 is None else config.eps_255
    if eps_255 < 1:
        raise ConfigError(f"poison.eps_255 {eps_255}: an L-inf bound below 1 vanishes in 8-bit images")
    return "linf", eps_255 / 255


def check_inputs(images: Tensor, labels: Tensor, ids: Sequence[str], num_classes: int) -> list[int]:
    """Return `labels` as a list; raise InputError unless images, labels and ids form one labelled batch."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"expected uint8 images (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    if labels.shape != (len(images),) or len(ids) != len(images):
        raise InputError(
            f"{len(images)} images came with labels of shape {tuple(labels.shape)} and {len(ids)} ids; "
            "a poison needs one of each for every image"
        )
    values = [int(label) for label in labels]
    wrong = [label for label in values if not 0 <= label < num_classes]
    if wrong:
        raise InputError(f"label {wrong[0]} lies outside 0..{num_classes - 1}; relabel from 0")
    return values


def class_id(label: int) -> str:
    """Return the id that class-wise draws are keyed by."""
    return f"class-{label}"


def draw_ids(labels: Sequence[int], ids: Sequence[str], scope: str) -> list[str]:
    """Return the key of each image's draw: its own id for scope "sample", its class for "class"."""
    return list(ids) if scope == "sample" else [class_id(label) for label in labels]


def scale_to_l2(values: Tensor, bound: float) -> Tensor:
    """Return float64 `values` (B, H, W, 3) scaled to L2 norm `bound` each, as float32."""
    # One image at a time and in numpy: torch may sum in another order for another batch or thread count.
    norms = [math.sqrt(float(np.square(row).sum())) for row in values.flatten(1).numpy()]
    factors = [bound / norm if norm > 0 else 0.0 for norm in norms]
    return (values * values.new_tensor(factors)[:, None, None, None]).float()


def store(images: Tensor, perturbation: Tensor, config: PoisonConfig) -> Tensor:
    """Return `images`, uint8 (B, H, W, 3), plus `perturbation` (on [0, 1]), rounded and clamped to uint8.

    The bound is asserted on what is stored: L-inf holds exactly, L2 within sqrt(d)/510 for d values; cuda: none.
    """
    norm, bound = budget(config, tuple(images.shape[1:]))
    change = (perturbation.double() * 255).round()
    if norm == "linf":
        # The slack only undoes float error in 255 * (eps_255 / 255).
        limit = math.floor(bound * 255 + 1e-9)
        change = change.clamp(-limit, limit)
    stored = (images.double() + change).clamp(0, 255).to(torch.uint8)
    difference = (stored.double() - images.double()).flatten(1) / 255
    if len(difference) and norm == "linf":
        assert float(difference.abs().max()) <= bound + 1e-12, "L-inf bound broken in 8-bit storage"
    elif len(difference) and norm == "l2":
        slack = math.sqrt(difference.shape[1]) / 510
        assert float(difference.norm(dim=1).max()) <= bound + slack + 1e-6, "L2 bound broken in 8-bit storage"
    return stored
