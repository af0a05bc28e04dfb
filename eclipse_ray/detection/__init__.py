"""Is a dataset poisoned? Scores of images and labels, each with a null distribution, and their verdict."""

from __future__ import annotations

from eclipse_ray.detection.scores import Finding, Score, judge, score_images
from eclipse_ray.detection.views import Images

__all__ = ["Finding", "Images", "Score", "judge", "score_images"]
