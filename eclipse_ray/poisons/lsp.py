"""LSP: linearly separable patches (Yu et al., arXiv 2111.00898).

The clusters are those of scikit-learn's `make_classification` as the public code calls it: all features
informative, one cluster a class about a vertex of a hypercube, mixed by a matrix U(-1, 1), no label flipped. Two
things differ. An image's draw is keyed by its id, not by its place among those of its class; and features are
not shuffled, which changes nothing, as the coordinates of a vertex and of the noise are exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from pydantic import Field
from torch import Tensor

from eclipse_ray.diffusion.noise import noise, uniform
from eclipse_ray.errors import ConfigError
from eclipse_ray.poisons.interface import LSP_T, LabelledImages, PoisonSettings, class_id, scale_to_l2

RMS = 6 / 255
"""Published root mean square on [0, 1], so L2 1.304 at 32 px."""
CLASS_SEP = 10.0
"""Half the side of the hypercube whose vertices are the class centres."""
MIXING_T, SAMPLE_T, VERTEX_T = LSP_T, LSP_T + 1, LSP_T + 2
"""Timesteps of the covariance, of an image's own draw, and of the first attempt at a vertex."""
ATTEMPTS = 2**12


class Lsp(PoisonSettings):
    """The settings of lsp."""

    eps_255: float | None = Field(None, gt=0, description="L2 bound in 1/255; null: root mean square 6/255.")
    patch: int | None = Field(
        None, ge=1, description="Side of a constant patch in pixels; null: 8, or 32 from 224 px."
    )

    def budget(self, shape: Sequence[int]) -> tuple[str, float]:
        """Return ("l2", bound on [0, 1])."""
        return "l2", RMS * math.sqrt(math.prod(shape)) if self.eps_255 is None else self.eps_255 / 255


def lsp_perturbation(data: LabelledImages, settings: Lsp, seed: int) -> Tensor:
    """Return the perturbation of each image; see `ClosedForm`.

    Each class is a Gaussian cluster with its own random covariance about a vertex of a hypercube, in the
    space of patch colours; an image takes a draw of its class's cluster (scope "class": the vertex),
    repeated over each patch and scaled to the L2 bound. Raises ConfigError when there are too few patches to tell
    the classes apart.
    """
    height, width = data.images.shape[1:3]
    patch = settings.patch or default_patch(height, width)
    rows, columns = -(-height // patch), -(-width // patch)
    grid = _colours(data, settings.scope, seed, rows * columns * 3).reshape(-1, rows, columns, 3)
    full = grid.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
    return scale_to_l2(full[:, :height, :width], settings)


def default_patch(height: int, width: int) -> int:
    """Return the published patch side: 8 pixels, 32 from 224 px on."""
    return 32 if min(height, width) >= 224 else 8


def _colours(data: LabelledImages, scope: str, seed: int, size: int) -> Tensor:
    centres = _centres(seed, data.num_classes, size)[data.labels]
    if scope == "class":
        return centres
    drawn = noise(seed, data.ids, SAMPLE_T, (size,)).double()
    # One vector-matrix product an image: a batched product may round differently in another batch.
    mixed = [row @ _mixing(seed, label, size) for row, label in zip(drawn, data.labels.tolist(), strict=True)]
    return centres + torch.stack(mixed)


@lru_cache(maxsize=256)
def _mixing(seed: int, label: int, size: int) -> Tensor:
    return 2 * uniform(seed, [class_id(label)], MIXING_T, (size, size))[0] - 1


@lru_cache(maxsize=16)
def _centres(seed: int, num_classes: int, size: int) -> Tensor:
    """Return distinct vertices (num_classes, size) of {-class_sep, class_sep}^size."""
    if 2**size < num_classes:
        raise _too_few(size, num_classes)
    taken: set[tuple[bool, ...]] = set()
    vertices = []
    for label in range(num_classes):
        for attempt in range(ATTEMPTS):
            vertex = uniform(seed, [class_id(label)], VERTEX_T + attempt, (size,))[0] < 0.5
            if (corner := tuple(vertex.tolist())) not in taken:
                break
        else:
            raise _too_few(size, num_classes)
        taken.add(corner)
        vertices.append(CLASS_SEP * (2 * vertex.double() - 1))
    return torch.stack(vertices)


def _too_few(size: int, num_classes: int) -> ConfigError:
    return ConfigError(
        f"poison.patch: {size} patch colours cannot tell {num_classes} classes apart; use smaller patches"
    )
