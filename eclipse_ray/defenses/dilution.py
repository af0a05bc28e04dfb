"""Dilution: no purification, the labelled sparse clean set beside the poisoned one; the honest control."""

from __future__ import annotations

from torch import Tensor

from eclipse_ray.defenses.interface import Material
from eclipse_ray.errors import InputError


def labelled_clean(material: Material) -> tuple[Tensor, Tensor]:
    """Return the sparse clean set, uint8 (M, H, W, 3) and int64 (M,), that the victim's training set is given.

    Raises InputError where there is no such set, no labels of it, or it has another size than the images.
    """
    images, labels = material.clean_images, material.clean_labels
    if images is None or labels is None:
        raise InputError(
            "the defense dilution needs a sparse clean set with labels; name one with data.clean, or leave it out"
        )
    if images.shape[1:] != material.images.shape[1:]:
        raise InputError(
            f"the sparse clean set has images of {tuple(images.shape[1:3])} pixels, the training set of "
            f"{tuple(material.images.shape[1:3])}; set data.resize for both"
        )
    if labels.shape != (len(images),):
        raise InputError(f"{len(images)} sparse clean images came with labels of shape {tuple(labels.shape)}")
    return images, labels
