"""Victims: the classifiers that are trained to judge a dataset."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from eclipse_ray.victims.networks import airbench, densenet121, resnet18, resnet50, small_network, vgg16, vgg19

VICTIMS: dict[str, Callable[[int], nn.Module]] = {
    "small": small_network,
    "airbench": airbench,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "densenet121": densenet121,
}
"""Constructors by the name of `victim.arch`; each takes the number of classes."""
