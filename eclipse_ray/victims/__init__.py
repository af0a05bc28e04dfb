"""Victims: the classifiers that are trained to judge a dataset."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from eclipse_ray.victims.resnet import resnet18
from eclipse_ray.victims.small import small_network

VICTIMS: dict[str, Callable[[int], nn.Module]] = {"small": small_network, "resnet18": resnet18}
"""Constructors by the name of `victim.arch`; each takes the number of classes."""
