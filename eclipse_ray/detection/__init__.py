"""Is a dataset poisoned? Scores of images and labels, each with a null distribution, and their verdict."""

from __future__ import annotations

from eclipse_ray.detection.scores import Score, score_images
from eclipse_ray.detection.verdict import Finding, judge
from eclipse_ray.detection.views import Images

__all__ = ["Finding", "Images", "Score", "judge", "score_images"]
