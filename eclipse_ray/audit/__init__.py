"""Is a dataset poisoned? Scores of images and labels, each with a null distribution, and their verdict."""

from __future__ import annotations

from eclipse_ray.audit.features import Images
from eclipse_ray.audit.scores import Score, score_images
from eclipse_ray.audit.verdict import Finding, judge

__all__ = ["Finding", "Images", "Score", "judge", "score_images"]
