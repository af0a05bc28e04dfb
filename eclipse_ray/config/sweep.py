"""Settings of the search for settings: what is varied, how, and by what trials are judged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from eclipse_ray.config.section import Section

Objective = Literal["proxy_accuracy", "shortcut_score"]
Search = Literal["grid", "random", "optuna"]


class Range(Section):
    """Numbers from `low` to `high`, both included; integers if both and the step are."""

    low: int | float
    high: int | float
    step: int | float | None = Field(None, gt=0, description="Distance of two values; null: all between.")
    log: bool = Field(False, description="Draw evenly over the logarithm.")

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range starts above 0 and has no step")
        return self


class SweepConfig(Section):
    """The search of `eclipse-ray sweep` (docs/tuning.md). No test label is ever read."""

    space: dict[str, list[Any] | Range] = Field(
        default_factory=dict,
        description="Keys of purify, compensation, denoiser, or sweep.sparse_percent: values, or low, high, step, "
        "log; empty: depth, steps, p and sigma around what the denoiser was trained for.",
    )
    search: Search = Field("grid", description="grid: all points; random: draws; optuna: learns from results.")
    trials: int = Field(36, ge=1, description="Most settings tried; a larger grid is sampled.")
    objective: Objective = Field(
        "proxy_accuracy",
        description="proxy_accuracy: a victim scored on held-out labelled clean images; shortcut_score: a linear "
        "probe on what purification removed, without labels of clean images.",
    )
    images: int = Field(2000, ge=10, description="Images of data.source purified for each setting, by class.")
    holdout: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Part of data.clean that trains no denoiser, where denoisers are trained here.",
    )
    sparse_percent: float | None = Field(
        None, gt=0, le=100, description="B/N: images that train a denoiser here, in % of data.source; null: all."
    )
    seeds: int = Field(1, ge=1, description="Victims of a trial; their mean counts.")
    fidelity_weight: float = Field(
        0.1, ge=0, description="Points of the objective that 1 dB of PSNR on held-out clean images is worth."
    )
    asha: bool = Field(False, description="Stop the worse victims early, epoch by epoch.")
    grace_epochs: int = Field(3, ge=1, description="asha: epochs that every victim has.")
    reduction_factor: int = Field(3, ge=2, description="asha: one of so many goes on at each halt.")
    max_concurrent: int | None = Field(None, ge=1, description="Trials at once; null: as many as have room.")
    num_gpus: float | None = Field(None, ge=0, le=1, description="GPUs of a trial; null: a quarter if any.")

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        for key, values in self.space.items():
            if isinstance(values, list) and not values:
                raise ValueError(f"space: {key} lists no value")
        if self.asha and (self.seeds > 1 or self.objective != "proxy_accuracy"):
            raise ValueError("asha stops single victims: it needs objective proxy_accuracy and seeds 1")
        return self
