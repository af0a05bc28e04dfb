"""What all sections of the configuration share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Settings = Mapping[str, Any]
Sampler = Literal["ddpm", "ddim", "dpm"]
Precision = Literal["float32", "bfloat16"]
ScheduleName = Literal["cosine", "linear"]
Layout = Literal["parquet", "folder", "webdataset", "npz", "cifar"]
Alpha = Literal["composite", "refuse"]
Arch = Literal["small", "resnet18", "resnet50", "vgg16", "vgg19", "densenet121"]
Recipe = Literal["quick", "paper", "modern"]
LoggerName = Literal["tensorboard", "mlflow", "wandb"]
Animated = Literal["first", "refuse"]


class Section(BaseModel):
    """A group of settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
