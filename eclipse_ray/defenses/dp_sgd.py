"""DP-SGD (Abadi et al., arXiv 1607.00133): no image may move the victim by more than a bound.

The training itself lies in `victims`, by Opacus; here are its numbers.
"""

from __future__ import annotations

from eclipse_ray.config import DefenseConfig, PrivacyConfig


def privacy(config: DefenseConfig) -> PrivacyConfig:
    """Return what `train_victim` is given for a defense with `privacy`."""
    return PrivacyConfig(max_grad_norm=config.dp_max_grad_norm, noise_multiplier=config.dp_noise_multiplier)
