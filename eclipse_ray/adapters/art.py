"""Purification as a preprocessor of the Adversarial Robustness Toolbox: pip install 'eclipse-ray[art]'."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import numpy as np
from art.defences.preprocessor.preprocessor import Preprocessor
from numpy.typing import NDArray

from eclipse_ray.diffusion.checkpoint import load_denoiser
from eclipse_ray.diffusion.sampling import purify_images


class EclipsePreprocessor(Preprocessor):
    """Purifies batches with the denoiser in a folder; labels pass through.

    Without ids from ART, noise is keyed by an image's content: the same image gives the same result in any batch.
    By default it is applied to training data only, since the poison is there and test images are not.
    """

    params: ClassVar[list[str]] = [
        "denoiser",
        "t_star",
        "num_inference_steps",
        "seed",
        "clip_values",
        "channels_first",
        "batch_size",
    ]

    def __init__(
        self,
        denoiser: str,
        *,
        t_star: int | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        clip_values: tuple[float, float] = (0.0, 1.0),
        channels_first: bool = False,
        batch_size: int = 64,
        apply_fit: bool = True,
        apply_predict: bool = False,
    ) -> None:
        super().__init__(is_fitted=True, apply_fit=apply_fit, apply_predict=apply_predict)
        self.denoiser, self.t_star, self.num_inference_steps = denoiser, t_star, num_inference_steps
        self.seed, self.clip_values, self.channels_first = seed, clip_values, channels_first
        self.batch_size = batch_size
        low, high = clip_values
        if not low < high:
            raise ValueError(f"clip_values {clip_values}: the first must be below the second")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = load_denoiser(denoiser)

    def __call__(self, x: NDArray[Any], y: Any | None = None) -> tuple[NDArray[Any], Any | None]:
        """Return x (B, H, W, 3), or (B, 3, H, W) if channels_first, purified, in its range and dtype, and y."""
        low, high = self.clip_values
        images = np.moveaxis(x, 1, -1) if self.channels_first else x
        scaled = np.clip((images.astype(np.float64) - low) / (high - low), 0, 1)
        pixels = np.ascontiguousarray(np.rint(scaled * 255).astype(np.uint8))
        batches = [
            self._purified(pixels[at : at + self.batch_size]) for at in range(0, len(pixels), self.batch_size)
        ]
        done = np.concatenate(batches) if batches else pixels
        result = (done.astype(np.float64) / 255 * (high - low) + low).astype(x.dtype)
        return (np.moveaxis(result, -1, 1) if self.channels_first else result), y

    def _purified(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        ids = [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels]
        purified = purify_images(
            pixels,
            self.model,
            t_star=self.t_star,
            num_inference_steps=self.num_inference_steps,
            seed=self.seed,
            ids=ids,
        )
        return np.asarray(purified.numpy())
