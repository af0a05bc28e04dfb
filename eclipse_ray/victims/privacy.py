"""Differentially private training of a victim (DP-SGD, Abadi et al., arXiv 1607.00133) through Opacus.

Used as a defense: a poisoned image moves the weights by no more than the bound. No privacy budget is computed,
since batches are shuffled as in all other training, not drawn by Poisson sampling.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from eclipse_ray.config import PrivacyConfig
from eclipse_ray.errors import ConfigError


def make_private(model: nn.Module) -> nn.Module:
    """Return `model` with group for batch normalisation, so that Opacus finds each image's own gradient.

    Batch normalisation lets the images of a batch see each other: an image has no gradient of its own. Opacus'
    ModuleValidator.fix puts gcd(32, channels) groups in its place; all other weights stay as they are. Raises
    ConfigError when Opacus is missing.
    """
    try:
        from opacus import GradSampleModule
        from opacus.validators import ModuleValidator
    except ImportError as error:
        raise ConfigError(f"DP-SGD needs Opacus ({error}): pip install 'eclipse-ray[defenses]'") from None
    fixed = ModuleValidator.fix(model)
    # Opacus 1.6.0 takes wrong gradients of convolutions, without a word, where activations are channels-last.
    fixed.to(memory_format=torch.contiguous_format)
    fixed.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    for module in fixed.modules():
        # Hooks watch what the normalisation returns, which must not be overwritten.
        if isinstance(module, nn.ReLU):
            module.inplace = False
    # Of the first layer, whose input is the images.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    watched: nn.Module = GradSampleModule(fixed)
    return watched


def private_optimizer(
    optimizer: torch.optim.Optimizer, privacy: PrivacyConfig, batch_size: int, generator: torch.Generator
) -> torch.optim.Optimizer:
    """Return `optimizer` with each image's gradient cut to `max_grad_norm` and noise added to their sum.

    The sum of the gradients of a mean loss over `batch_size` images, plus noise of standard deviation
    noise_multiplier * max_grad_norm drawn from `generator`, is divided by `batch_size`; a smaller last batch so
    takes a smaller step. The parameters must be those of a model from `make_private`.
    """
    from opacus.optimizers import DPOptimizer

    private: torch.optim.Optimizer = DPOptimizer(
        optimizer,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=batch_size,
        generator=generator,
    )
    return private


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Let a model from `make_private` be called without recording gradients of images."""
    model.disable_hooks()  # type: ignore[operator]
    try:
        yield
    finally:
        model.enable_hooks()  # type: ignore[operator]
