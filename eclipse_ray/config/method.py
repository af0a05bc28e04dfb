"""Settings of the method itself: data, denoiser, purification, compensation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from eclipse_ray.config.section import Alpha, Animated, Precision, Sampler, Section

# Side of a tile: few of its pixels lie near a border, and self-attention, of cost tile**4, is still affordable.
TILE = 128
# What two tiles share. 16 shows no seam with the small network either; deeper ones see further.
TILE_OVERLAP = 32
# Most pixels of one pass, 64 images of 64 px or 16 tiles: bounds the memory of activations.
BATCH_PIXELS = 2**18


class DataConfig(Section):
    """Where images come from and how they are written; every location is a path or an fsspec URL."""

    source: str | None = Field(None, description="Dataset to read.")
    output: str | None = Field(None, description="Folder to write.")
    clean: str | None = Field(None, description="Sparse clean set the denoiser is fitted on.")
    test: str | None = Field(None, description="Clean labelled test set.")
    image_column: str = Field("image", description="Parquet column holding the images.")
    label_column: str = Field("label", description="Parquet column holding the labels.")
    encoding: str = Field("png", description="png, webp-lossless, or jpeg:Q with allow_lossy.")
    allow_lossy: bool = Field(False, description="Permit an encoding that changes pixels.")
    max_pixels: int = Field(40_000_000, ge=1, description="Images with more pixels become error rows.")
    on_error: Literal["row", "stop"] = Field(
        "row", description="An undecodable image becomes an error row, or ends the run with exit code 2."
    )
    alpha: Alpha = Field("composite", description="Transparency is laid on white, or makes an image undecodable.")
    animated: Animated = Field("first", description="First frame of several, or they make an image undecodable.")
    extra_columns: Literal["keep", "drop"] = Field("keep", description="What becomes of columns that came along.")
    tar_ids: Literal["key", "path"] = Field(
        "key", description="ids of tar members: the sample's key, or the tar's name before it."
    )
    resize: int | None = Field(None, ge=16, description="Central square resized to so many pixels; null: no.")


class DenoiserConfig(Section):
    """Network and training of the denoiser (arXiv 2406.15093, Algorithm 1)."""

    preset: Literal["debug", "small", "paper"] = Field("small", description="Named group of defaults.")
    output: str | None = Field(None, description="Folder of the trained denoiser.")
    image_size: int = Field(32, ge=8, description="Training size in pixels.")
    block_out_channels: tuple[int, ...] = Field((24, 48), min_length=1, description="Channels of each level.")
    layers_per_block: int = Field(1, ge=1, description="Residual blocks of each level.")
    attention_levels: tuple[int, ...] = Field((), description="Levels with self-attention, 0 = full size.")
    attention_head_dim: int = Field(8, ge=1, description="Channels of one attention head.")
    norm_num_groups: int = Field(8, ge=1, description="Groups of every group normalisation.")
    resnet_time_scale_shift: Literal["default", "scale_shift"] = Field("scale_shift")
    dropout: float = Field(0.0, ge=0, lt=1)
    num_train_timesteps: int = Field(4000, ge=2, description="T of the cosine schedule.")
    variance_type: Literal["fixed_small", "learned_range"] = Field(
        "fixed_small", description="Variance of a reverse step; learned_range doubles the output channels."
    )
    vlb_weight: float = Field(1e-3, ge=0, description="gamma of loss_vlb, learned_range only.")
    timestep_sampler: Literal["uniform", "loss_second_moment"] = Field(
        "uniform", description="How training draws t; the second weighs t by the root mean square of its loss."
    )
    rescale_timesteps: bool = Field(False, description="Show the network t * 1000 / T, as published.")
    t_star: int = Field(400, ge=1, description="Recommended purification depth, in steps of T.")
    num_inference_steps: int = Field(1, ge=1, description="Recommended number of respaced steps.")
    sampler: Sampler = Field("ddpm", description="Recommended sampler.")
    t_max: int | None = Field(None, ge=1, description="Training draws t < t_max; null: 1.25 t_star.")
    replication: int = Field(4, ge=0, description="M: copies of each sparse image added to the clean set.")
    iterations: int = Field(3000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(16, ge=1, description="Images of one optimiser step, over all workers.")
    learning_rate: float = Field(1e-3, gt=0)
    lr_decay: Literal["none", "cosine"] = Field("cosine")
    warmup_iterations: int = Field(100, ge=0, description="Optimiser steps in which the learning rate rises.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Longer gradients are cut to it; null: none are.")
    weight_decay: float = Field(0.0, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    ema_warmup: bool = Field(True, description="Lower the decay early on, so that the random start is forgotten.")
    heldout_fraction: float = Field(0.05, gt=0, lt=0.5, description="Part of the sparse set never trained on.")
    report_every: int = Field(100, ge=1, description="Optimiser steps between progress reports.")
    checkpoint_every: int = Field(500, ge=1, description="Optimiser steps between checkpoints.")
    num_workers: int | None = Field(None, ge=1, description="null: one for each GPU, else for each core.")
    use_gpu: bool | None = Field(None, description="null: a GPU a worker when the cluster has enough.")

    @model_validator(mode="after")
    def _consistent(self) -> DenoiserConfig:
        if self.t_max is None:
            # Past pydantic's bookkeeping, so that a later override of t_star moves this default along.
            self.__dict__["t_max"] = min(self.num_train_timesteps, -(-self.t_star * 5 // 4))
        if not self.t_star <= int(self.t_max or 0) <= self.num_train_timesteps:
            raise ValueError(
                f"t_star {self.t_star} <= t_max {self.t_max} <= num_train_timesteps "
                f"{self.num_train_timesteps} must hold: only timesteps below t_max are trained"
            )
        if self.num_inference_steps > self.t_star:
            raise ValueError(f"num_inference_steps {self.num_inference_steps} exceeds t_star {self.t_star}")
        if (self.num_workers or 1) > self.batch_size:
            raise ValueError(f"num_workers {self.num_workers} exceeds batch_size {self.batch_size}")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"norm_num_groups {self.norm_num_groups} must divide every one of block_out_channels "
                f"{list(self.block_out_channels)}"
            )
        return self


class PurifyConfig(Section):
    """Absorb and eliminate (arXiv 2406.15093, Algorithm 1), and how the work is spread."""

    denoiser: str | None = Field(None, description="Folder of the trained denoiser.")
    t_star: int | None = Field(None, ge=1, description="null: what the denoiser recommends.")
    num_inference_steps: int | None = Field(None, ge=1, description="null: what the denoiser recommends.")
    sampler: Sampler | None = Field(
        None, description="ancestral, deterministic, or second-order; null: what the denoiser recommends."
    )
    precision: Precision = Field("float32", description="Of the network's arithmetic; bfloat16 is for GPUs.")
    shard_images: int = Field(512, ge=1, description="Most images of a shard, the unit of commit and resume.")
    shard_bytes: int = Field(64 * 2**20, ge=1, description="Most decoded bytes of a shard.")
    batch_size: int = Field(64, ge=1, description="Images of one pass through the denoiser.")
    batch_pixels: int = Field(BATCH_PIXELS, ge=1, description="Most pixels of one pass, so fewer large images.")
    tile: int = Field(TILE, ge=32, description="Larger images are denoised in tiles of this side, blended.")
    tile_overlap: int = Field(TILE_OVERLAP, ge=0, description="Least overlap of two tiles, at most half a tile.")
    actors: int | None = Field(None, ge=1, description="null: one for each GPU, else one for each CPU core.")
    num_gpus: float | None = Field(None, ge=0, description="GPUs of an actor; null: 1 if there are any.")
    max_failed_fraction: float = Field(0.01, ge=0, le=1, description="More failed images end in exit 3.")
    single_writer: bool = Field(
        False, description="Write to a store without put-if-absent too; unsafe with two drivers on one output."
    )
    watchdog_seconds: float = Field(1800, gt=0, description="No finished shard for so long ends the run.")

    @model_validator(mode="after")
    def _consistent(self) -> PurifyConfig:
        if 2 * self.tile_overlap > self.tile:
            raise ValueError(f"tile_overlap {self.tile_overlap} exceeds half of tile {self.tile}")
        return self


class CompensationConfig(Section):
    """Lightweight corruption compensation (arXiv 2406.15093, Algorithm 1)."""

    mode: Literal["augment", "baked", "none"] = Field(
        "augment", description="augment: anew for every image and epoch; baked: written once into the output."
    )
    p: float = Field(0.4, ge=0, le=1, description="Probability of grayscale.")
    sigma: float = Field(0.05, ge=0, description="Standard deviation of the noise, on [0, 1].")
    coarse_sigma: float = Field(
        0.08, ge=0, description="Standard deviation of noise on a coarse grid, on [0, 1]; 0 as published."
    )
    coarse_grid: int = Field(6, ge=2, description="Points of that grid along each side of an image.")
