"""Settings of the audit: how much is looked at, and how sure it must be."""

from __future__ import annotations

from pydantic import Field

from eclipse_ray.config.section import Section


class AuditConfig(Section):
    """Is a dataset poisoned? A sample decides; docs/audit.md says how large it has to be."""

    images: int = Field(5000, ge=100, description="Images of the random sample, and most of the clean set.")
    classes: int = Field(20, ge=2, description="Most classes looked at: those with most images in the sample.")
    crop: int = Field(
        64, ge=16, multiple_of=8, description="Most pixels of a side that are looked at: the middle."
    )
    alpha: float = Field(0.01, gt=0, lt=1, description="False positive rate under the nulls of the scores.")
    denoiser: str | None = Field(None, description="Folder of a denoiser whose residual is looked at; null: none.")
    output: str | None = Field(None, description="Folder for audit.json, audit.png and config.yaml; null: none.")
