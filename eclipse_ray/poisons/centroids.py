"""Mean features of each class, which sep aligns with and efp entangles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eclipse_ray.errors import InputError
from eclipse_ray.poisons.optimised import LabelledImages, by_id, to_float
from eclipse_ray.poisons.surrogate import EVALUATION_BATCH, features


@torch.no_grad()
def class_means(model: nn.Module, data: LabelledImages, device: torch.device) -> Tensor:
    """Return the mean features, float32 (num_classes, F) on the CPU, of the images of each class.

    The model is in evaluation mode. Raises InputError for a class without images.
    """
    counts = torch.bincount(data.labels, minlength=data.num_classes)
    if int(counts.min()) == 0:
        raise InputError(
            f"class {int(counts.argmin())} of {data.num_classes} has no images, so no mean feature; this poison "
            "needs images of every class"
        )
    data = by_id(data)
    values = torch.cat(
        [features(model, to_float(part, device)).cpu() for part in torch.split(data.images, EVALUATION_BATCH)]
    )
    sums = torch.zeros(data.num_classes, values.shape[1]).index_add_(0, data.labels, values)
    return sums / counts[:, None]
