"""The sections of the configuration, and the named groups of settings: presets and recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Settings = Mapping[str, Any]
Location = Annotated[str, "location"]
"""A path or an fsspec URL."""
Recipe = Literal["quick", "paper", "modern"]
Sampler = Literal["ddpm", "ddim"]
Precision = Literal["float32", "bfloat16"]
Computed = Literal["float32", "bfloat16", "int8"]
ScheduleName = Literal["cosine", "linear"]
Layout = Literal["parquet", "folder", "webdataset", "npz", "npy", "pt", "pkl"]
Half = Literal["signed", "positive"]
Rounding = Literal["nearest", "truncate"]
Unit = Literal["auto", "1", "255", "8/255"]
Alpha = Literal["composite", "refuse"]
Arch = Literal["small", "airbench", "resnet18", "resnet50", "vgg16", "vgg19", "densenet121"]
LoggerName = Literal["tensorboard", "mlflow", "wandb"]
Animated = Literal["first", "refuse"]


# `small` is the defaults below; `unet` is what they were before, a U-Net of diffusers. `paper` is the published
# setting; what the paper leaves open (batch size, learning rate, dropout) follows the improved-diffusion recipe.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {},
    "unet": {
        "denoiser": {
            "network": "unet2d",
            "block_out_channels": [24, 48],
            "layers_per_block": 1,
            "iterations": 3000,
            "spots": 0.0,
        },
    },
    "debug": {
        "denoiser": {
            "image_size": 16,
            "precision": "float32",
            "block_out_channels": [8],
            "layers_per_block": 1,
            "num_train_timesteps": 20,
            "t_star": 4,
            "t_max": 5,
            "iterations": 40,
            "batch_size": 16,
            "ema_decay": 0.9,
            "report_every": 10,
            "checkpoint_every": 20,
        },
    },
    "paper": {
        "denoiser": {
            "network": "unet2d",
            "block_out_channels": [128, 256, 256, 256],
            "layers_per_block": 3,
            "attention_levels": [1, 2],
            "attention_head_dim": 64,
            "norm_num_groups": 32,
            "spots": 0.0,
            "dropout": 0.3,
            "variance_type": "learned_range",
            "rescale_timesteps": True,
            "precision": "float32",
            "t_star": 100,
            "t_max": 4000,
            "num_inference_steps": 100,
            "iterations": 250_000,
            "batch_size": 128,
            "learning_rate": 1e-4,
            "lr_decay": "none",
            "warmup_iterations": 0,
            "max_grad_norm": None,
            "ema_decay": 0.9999,
            "ema_warmup": False,
            "report_every": 1000,
            "checkpoint_every": 5000,
        },
        "purify": {"precision": "float32"},
        "compensation": {"coarse_sigma": 0.0},
    },
}

# What the name in `victim.recipe` stands for (docs/victims.md). `paper` is the published setting, which decays
# neither the learning rate nor the weights. `modern` scales the usual CIFAR setting, a peak of 0.1 for a batch of
# 128 and weight decay 5e-4, to a batch of 256.
RECIPES: dict[str, dict[str, Any]] = {
    "quick": {},
    "paper": {
        "epochs": 80,
        "batch_size": 128,
        "learning_rate": 0.1,
        "lr_schedule": "constant",
        "nesterov": False,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "crop_padding": 4,
    },
    "modern": {
        "epochs": 30,
        "batch_size": 256,
        "learning_rate": 0.2,
        "weight_decay": 5e-4,
        "crop_padding": 4,
        "precision": "bfloat16",
    },
}


class Section(BaseModel):
    """A group of settings; unknown keys, empty texts and infinite numbers are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, str_min_length=1, allow_inf_nan=False)


# Side of a tile by network. Of 128 a U-Net has few pixels near a border, and self-attention, of cost tile**4, is
# still affordable; ours has none.
TILES = {"shuffled": 512, "unet2d": 128}
# What two tiles share. 16 shows no seam with the small network either; deeper ones see further.
TILE_OVERLAP = 32
# Most pixels of one pass, 64 images of 64 px or 16 tiles: bounds the memory of activations.
BATCH_PIXELS = 2**18


class DataConfig(Section):
    """Where images come from and how they are written; every location is a path or an fsspec URL."""

    source: Location | None = Field(None, description="Dataset to read.")
    output: Location | None = Field(None, description="Folder to write.")
    clean: Location | None = Field(None, description="Sparse clean set the denoiser is fitted on.")
    test: Location | None = Field(None, description="Clean labelled test set.")
    image_column: str = Field(
        "image", description="Column, array or extension of tar members that holds the images."
    )
    label_column: str = Field(
        "label", description="Column, tar member, .json field or array that holds the labels."
    )
    labels: Literal["folder", "none"] | Location | None = Field(
        None,
        description="folder: the class is the top folder; none: there are no labels; else a file with the labels "
        "of data.source, by name or in order; null: those that come with the images, and a question if in doubt.",
    )
    strict: bool = Field(False, description="Files that would be passed over end the command with exit code 2.")
    encoding: str = Field(
        "png", description="png, png:L, webp-lossless, webp-lossless:M (L, M: effort), or jpeg:Q with allow_lossy."
    )
    allow_lossy: bool = Field(False, description="Permit an encoding that changes pixels.")
    max_pixels: int = Field(40_000_000, ge=1, description="Images with more pixels become error rows.")
    on_error: Literal["row", "stop"] = Field(
        "row", description="An undecodable image becomes an error row, or ends the run with exit code 2."
    )
    alpha: Alpha = Field("composite", description="Transparency is put on white, or makes an image undecodable.")
    animated: Animated = Field(
        "first", description="The first frame is taken, or several frames make an image undecodable."
    )
    extra_columns: Literal["keep", "drop"] = Field(
        "keep", description="Whether other columns of the source are written too."
    )
    tar_ids: Literal["key", "path"] = Field(
        "key", description="ids of tar members: the sample's key, or the tar's name before it."
    )
    resize: int | None = Field(
        None,
        ge=16,
        description="Side in pixels to which the central square is resized; null: images keep their size.",
    )

    @property
    def label_file(self) -> str | None:
        """The location of a label file, if `labels` names one."""
        return None if self.labels in (None, "folder", "none") else self.labels

    def deciding_labels(self) -> dict[str, str]:
        """Return what a fingerprint holds of `labels`; the content of a label file belongs to the input."""
        return {"labels": self.labels} if self.labels in ("folder", "none") else {}


def default_t_max(t_star: int, num_train_timesteps: int) -> int:
    """Return below which timestep training draws t where nothing else is said: 1.25 t_star, rounded up."""
    return min(num_train_timesteps, -(-t_star * 5 // 4))


class DenoiserConfig(Section):
    """Network and training of the denoiser (arXiv 2406.15093, Algorithm 1)."""

    # Locations, and how training is spread or watched; all others decide the weights.
    OF_A_RUN: ClassVar = {"output", "against", "num_workers", "use_gpu", "report_every", "checkpoint_every"}

    preset: Literal["debug", "small", "unet", "paper"] = Field("small", description="Named group of defaults.")
    output: Location | None = Field(None, description="Folder of the trained denoiser.")
    against: Location | None = Field(
        None, description="Suspicious labelled set; the denoiser learns what networks trained on it have learned."
    )
    image_size: int = Field(32, ge=8, description="Training size in pixels.")
    network: Literal["shuffled", "unet2d"] = Field(
        "shuffled", description="shuffled: ours, on blocks of 2 x 2 pixels, fast; unet2d: diffusers' UNet2DModel."
    )
    block_out_channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64,), min_length=1, description="Channels of each level; shuffled has one level."
    )
    layers_per_block: int = Field(4, ge=1, description="Residual blocks of each level.")
    attention_levels: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="unet2d: levels with self-attention, 0 = full size."
    )
    attention_head_dim: int = Field(8, ge=1, description="unet2d: channels of one attention head.")
    norm_num_groups: int = Field(8, ge=1, description="unet2d: groups of every normalisation.")
    resnet_time_scale_shift: Literal["default", "scale_shift"] = Field(
        "scale_shift", description="unet2d: the timestep is added in a residual block, or is scale and shift."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="unet2d: probability that a value is dropped in training.")
    num_train_timesteps: int = Field(4000, ge=2, description="T of the cosine schedule.")
    variance_type: Literal["fixed_small", "learned_range"] = Field(
        "fixed_small", description="Variance of a reverse step; learned_range doubles the output channels."
    )
    vlb_weight: float = Field(1e-3, ge=0, description="gamma of loss_vlb, learned_range only.")
    rescale_timesteps: bool = Field(False, description="Show the network t * 1000 / T, as published.")
    t_star: int = Field(400, ge=1, description="Recommended purification depth, in steps of T.")
    num_inference_steps: int = Field(1, ge=1, description="Recommended number of respaced steps.")
    sampler: Sampler = Field("ddpm", description="Recommended sampler.")
    t_max: int | None = Field(
        None, ge=1, description="Training draws timesteps below this one; null: 1.25 t_star."
    )
    replication: int = Field(4, ge=0, description="M: copies of each sparse image added to the clean set.")
    spots: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Part of the training images that get one to four spots of any colour, for the denoiser to "
        "remove; 0 as published.",
    )
    iterations: int = Field(10_000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(16, ge=1, description="Images of one optimiser step, over all workers.")
    learning_rate: float = Field(1e-3, gt=0, description="At its highest.")
    lr_decay: Literal["none", "cosine"] = Field("cosine", description="How the learning rate falls to the end.")
    warmup_iterations: int = Field(100, ge=0, description="Optimiser steps in which the learning rate rises.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Longer gradients are cut to this norm; null: none are cut."
    )
    weight_decay: float = Field(0.0, ge=0, description="Of the optimiser AdamW.")
    precision: Precision | None = Field(
        None, description="Of the network in training; null: as for purify.precision."
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Of the moving average of the weights that is kept.")
    ema_warmup: bool = Field(True, description="Lower the decay early on, so that the random start is forgotten.")
    heldout_fraction: float = Field(0.05, gt=0, lt=0.5, description="Part of the sparse set never trained on.")
    report_every: int = Field(100, ge=1, description="Optimiser steps between progress reports.")
    checkpoint_every: int = Field(500, ge=1, description="Optimiser steps between checkpoints.")
    num_workers: int | None = Field(
        None, ge=1, description="Training processes; null: one per GPU, else one per core."
    )
    use_gpu: bool | None = Field(None, description="Train on GPUs; null: if the cluster has one per worker.")

    @model_validator(mode="after")
    def _consistent(self) -> DenoiserConfig:
        if self.t_max is None:
            self.t_max = default_t_max(self.t_star, self.num_train_timesteps)
        if not self.t_star <= int(self.t_max or 0) <= self.num_train_timesteps:
            raise ValueError(
                f"t_star {self.t_star} <= t_max {self.t_max} <= num_train_timesteps "
                f"{self.num_train_timesteps} must hold: only timesteps below t_max are trained"
            )
        if self.num_inference_steps > self.t_star:
            raise ValueError(f"num_inference_steps {self.num_inference_steps} exceeds t_star {self.t_star}")
        if (self.num_workers or 1) > self.batch_size:
            raise ValueError(f"num_workers {self.num_workers} exceeds batch_size {self.batch_size}")
        if self.network == "shuffled" and (
            len(self.block_out_channels) > 1 or self.attention_levels or self.dropout
        ):
            raise ValueError(
                "network shuffled has one entry in block_out_channels, no attention_levels and no dropout; "
                "set network to unet2d for more"
            )
        levels = len(self.block_out_channels)
        if max(self.attention_levels, default=0) >= levels:
            raise ValueError(
                f"attention_levels {list(self.attention_levels)}: the levels of block_out_channels are 0 to "
                f"{levels - 1}"
            )
        if self.network == "unet2d" and any(
            channels % self.norm_num_groups for channels in self.block_out_channels
        ):
            raise ValueError(
                f"norm_num_groups {self.norm_num_groups} must divide every one of block_out_channels "
                f"{list(self.block_out_channels)}"
            )
        return self


class PurifyConfig(Section):
    """Absorb and eliminate (arXiv 2406.15093, Algorithm 1), and how the work is spread."""

    denoiser: Location | None = Field(None, description="Folder of the trained denoiser.")
    t_star: int | None = Field(
        None, ge=1, description="Depth of purification; null: what the denoiser recommends."
    )
    num_inference_steps: int | None = Field(
        None, ge=1, description="Respaced steps; null: what the denoiser recommends."
    )
    sampler: Sampler | None = Field(
        None, description="ddpm is ancestral, ddim deterministic; null: what the denoiser recommends."
    )
    precision: Computed | None = Field(
        None,
        description="Of the network; null: bfloat16 where it is fast (GPUs since Ampere, CPUs with AVX512-BF16), "
        "else float32. int8 is faster still, on CPUs with AVX512-VNNI, and a little less exact.",
    )
    shard_images: int | None = Field(
        None,
        ge=1,
        description="Most images of a shard, the unit of commit and resume; null: a 32nd of the source, at least "
        "512 or 16 MiB of pixels, at most 4,096; set it for more than 16 actors.",
    )
    shard_bytes: int = Field(64 * 2**20, ge=1, description="Decoded bytes of a shard, estimated from 64 images.")
    batch_size: int = Field(64, ge=1, description="Images of one pass through the denoiser.")
    batch_pixels: int = Field(BATCH_PIXELS, ge=1, description="Most pixels of one pass, so fewer large images.")
    tile: int | None = Field(
        None,
        ge=32,
        description="Larger images are denoised in tiles of this side, blended; null: 512, of a U-Net 128.",
    )
    tile_overlap: int = Field(TILE_OVERLAP, ge=0, description="Least overlap of two tiles, at most half a tile.")
    actors: int | None = Field(
        None, ge=1, description="Actors that denoise; null: one per GPU, else one per CPU core."
    )
    num_gpus: float | None = Field(None, ge=0, description="GPUs of an actor; null: 1 if there are any.")
    max_failed_fraction: float = Field(0.01, ge=0, le=1, description="More failed images end in exit 3.")
    single_writer: bool = Field(
        False, description="The store has no conditional writes, and nobody else writes to this output."
    )

    @model_validator(mode="after")
    def _consistent(self) -> PurifyConfig:
        # Of null the denoiser decides, and what opens it checks.
        if self.tile and 2 * self.tile_overlap > self.tile:
            raise ValueError(f"tile_overlap {self.tile_overlap} exceeds half of tile {self.tile}")
        return self


class CompensationConfig(Section):
    """Lightweight corruption compensation (arXiv 2406.15093, Algorithm 1)."""

    mode: Literal["augment", "baked", "none"] = Field(
        "augment",
        description="augment: drawn anew for every image and epoch; baked: written once into the output.",
    )
    p: float = Field(0.4, ge=0, le=1, description="Probability of grayscale.")
    sigma: float = Field(0.05, ge=0, description="Standard deviation of the noise, on [0, 1].")
    coarse_sigma: float = Field(
        0.08, ge=0, description="Standard deviation of noise on a coarse grid, on [0, 1]; 0 as published."
    )
    coarse_grid: int = Field(6, ge=2, description="Points of the coarse grid along each side of an image.")
    # Left out where it is 0, so that fingerprints and keys of before it was there stay as they are.
    colour_sigma: float = Field(
        0.0,
        ge=0,
        exclude_if=lambda value: value == 0,
        description="Standard deviation of one shift per image and colour channel, on [0, 1]; 0: none.",
    )


class DefenseConfig(Section):
    """Rival defenses; the defaults are the published numbers (docs/defenses.md).

    Each defense declares its settings in its file below `eclipse_ray/defenses/`, such as `aa_draws`.
    """

    model_config = ConfigDict(extra="allow")


class PoisonConfig(Section):
    """An availability poison: what all of them share, and the settings of the named one beside it.

    Each poison declares its own settings in its file below `eclipse_ray/poisons/`, with its numbers at full and at
    reduced cost. Null stands for the number of `cost`.
    """

    model_config = ConfigDict(extra="allow")
    # How a poison is computed and stored does not decide its pixels.
    OF_A_RUN: ClassVar = ("denoiser", "store_perturbation", "save_seconds", "chunk_images")

    name: str = Field(
        "ar", description="urp, lsp, ar, ar-published, cuda, shift, mixture, ops, em, tap, rem, sep, efp or adp."
    )
    cost: Literal["full", "reduced"] = Field(
        "full", description="Numbers of optimised poisons: as published, or for two CPU cores."
    )
    eps_255: float | None = Field(
        None, gt=0, description="Bound in 1/255: L2 for lsp and ar, none for cuda, ops and mixture, else L-inf."
    )
    scope: Literal["sample", "class"] | None = Field(None, description="One draw per image, or one per class.")
    variant: str | None = Field(None, description="sep: plain, fa_vr; efp: push, pull; adp: paper, strong.")
    denoiser: Location | None = Field(None, description="adp strong: folder of the denoiser that is attacked.")
    store_perturbation: bool = Field(False, description="Add a column `perturbation`: int16 differences, raw.")
    save_seconds: float = Field(60, ge=0, description="Least seconds between two saved states of a fit.")
    chunk_images: int = Field(512, ge=1, description="Images of one task of an optimised poison.")

    def own(self) -> dict[str, Any]:
        """Return what was chosen of the settings that the named poison declares."""
        chosen = {
            "eps_255": self.eps_255,
            "scope": self.scope,
            "variant": self.variant,
            **(self.model_extra or {}),
        }
        return {key: value for key, value in chosen.items() if value is not None}


class VictimConfig(Section):
    """The classifier that is trained to judge a dataset; the defaults are the recipe `quick`."""

    recipe: Recipe = Field("quick", description="Named group of defaults of the keys below.")
    arch: Arch = Field("small", description="The network (docs/victims.md).")
    epochs: int = Field(12, ge=1, description="Passes over the training images.")
    batch_size: int = Field(64, ge=1, description="Images of one optimiser step.")
    learning_rate: float = Field(0.1, gt=0, description="At its highest.")
    lr_schedule: Literal["constant", "one_cycle"] = Field(
        "one_cycle", description="Constant, or rising over a fifth of the steps and falling to 0."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Of the victim's SGD.")
    nesterov: bool = Field(True, description="Nesterov momentum; no effect without momentum.")
    weight_decay: float = Field(1e-3, ge=0, description="Of the victim's SGD.")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="Part of a label given to all classes.")
    crop_padding: int = Field(3, ge=0, description="Pixels of padding before a random crop.")
    flip: bool = Field(True, description="Random horizontal flip.")
    precision: Precision = Field(
        "float32", description="Of the network; bfloat16 only where it is fast, as for purify.precision."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_recipe(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**RECIPES.get(str(values.get("recipe", "quick")), {}), **values}


class PrivacyConfig(Section):
    """DP-SGD (Abadi et al., arXiv 1607.00133), as arXiv 2406.15093 uses it against poisons."""

    max_grad_norm: float = Field(1.0, gt=0, description="Bound of the gradient of one image, L2.")
    noise_multiplier: float = Field(
        0.01, ge=0, description="Standard deviation of the noise, in units of that bound."
    )


class EvaluateConfig(Section):
    """How a dataset is judged."""

    seeds: int = Field(3, ge=1, description="Victims trained, with seeds run.seed, run.seed + 1 and so on.")
    compensation: Literal["recorded", "augment", "none"] = Field(
        "recorded",
        description="Of one dataset. recorded: as the run that wrote it says, else none; augment: as section "
        "compensation says, anew for every image and epoch.",
    )


MatrixItem = str | dict[str, Any]


class MatrixConfig(Section):
    """The grid that `evaluate` measures: poisons x defenses x victims x seeds. Without a column it is off.

    An entry is a name or a mapping. A mapping has `name`, an optional `label` for the tables, an optional
    `published` (the row or column of the paper's numbers), and settings that differ from the rest of the file.
    A poison that others published has `name: published` and, in place of settings, `source`: a poisoned copy of
    data.source.
    """

    poisons: tuple[MatrixItem, ...] = Field((), description="Columns, in the order in which they are measured.")
    clean: bool = Field(False, description="Add a column of unpoisoned images and measure it first.")
    defenses: tuple[MatrixItem, ...] = Field(("none", "eclipse"), description="Rows; + joins several defenses.")
    victims: tuple[MatrixItem, ...] = Field((), description="Architectures; empty: the one of section victim.")
    first_poisons: tuple[str, ...] = Field((), description="Labels of columns to measure first; empty: all.")
    first_defenses: tuple[str, ...] = Field((), description="Labels of rows to measure first; empty: all.")
    limit: int | None = Field(None, ge=2, description="Number of training images, the first ones; null: all.")
    sparse_limit: int | None = Field(None, ge=2, description="Number of sparse images, the first ones; null: all.")
    test_limit: int | None = Field(None, ge=1, description="Number of test images, the first ones; null: all.")
    max_concurrent: int | None = Field(
        None, ge=1, description="Most victims at the same time; null: as many as fit."
    )
    num_gpus: float | None = Field(None, ge=0, le=1, description="GPUs per victim; null: 0.25 if there is a GPU.")
    published: Literal["cifar10", "imagenet"] | None = Field(
        None, description="Dataset of the paper whose numbers are printed beside ours; null: none."
    )

    @property
    def on(self) -> bool:
        """Whether there is a column."""
        return bool(self.poisons) or self.clean


Search = Literal["grid", "random", "optuna"]


MOST_VALUES = 10_000
"""Values of an axis of a sweep, which are all listed."""


class Range(Section):
    """Numbers from `low` to `high`, both included; integers if low, high and step are integers."""

    low: int | float
    high: int | float
    step: int | float | None = Field(None, gt=0, description="Distance between two values; null: any value.")
    log: bool = Field(False, description="Draw uniformly on a logarithmic scale.")

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        if self.step and self.high - self.low > MOST_VALUES * self.step:
            raise ValueError(f"step {self.step} gives more than {MOST_VALUES:,} values; raise it")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range starts above 0 and has no step")
        return self


class SweepConfig(Section):
    """The search of `eclipse-ray sweep` (docs/tuning.md). No test label is ever read."""

    space: dict[str, list[Any] | Range] = Field(
        default_factory=dict,
        description="Keys of purify, compensation or denoiser, or sweep.sparse_percent, each with its values or "
        "with low, high, step, log. Empty: depth, steps, p, sigma around what the denoiser was trained for.",
    )
    search: Search = Field("grid", description="grid: every point; random: draws; optuna: learns from results.")
    trials: int = Field(36, ge=1, description="Most points tried; a larger grid is sampled.")
    images: int = Field(2000, ge=10, description="Images of data.source per point, stratified by class.")
    holdout: float = Field(
        0.5, gt=0, lt=1, description="Part of data.clean that only scores, when the sweep trains denoisers itself."
    )
    sparse_percent: float | None = Field(
        None, gt=0, le=100, description="B/N: images that train a denoiser here, in % of data.source; null: all."
    )
    seeds: int = Field(1, ge=1, description="Victims per point; their mean accuracy counts.")
    fidelity_weight: float = Field(
        0.1, ge=0, description="Points of accuracy that 1 dB of PSNR on held-out clean images is worth."
    )
    asha: bool = Field(False, description="Stop the worse victims early.")
    grace_epochs: int = Field(3, ge=1, description="asha: epochs that every victim is trained for.")
    reduction_factor: int = Field(3, ge=2, description="asha: at each rung, one in this many trials continues.")
    max_concurrent: int | None = Field(
        None, ge=1, description="Most victims at the same time; null: as many as fit."
    )
    num_gpus: float | None = Field(None, ge=0, le=1, description="GPUs per victim; null: 0.25 if there is a GPU.")

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        for key, values in self.space.items():
            if isinstance(values, list) and not values:
                raise ValueError(f"space: {key} lists no value")
        if self.asha and self.seeds > 1:
            raise ValueError("asha stops single victims: it needs seeds 1")
        return self


class AuditConfig(Section):
    """Is a dataset poisoned? A sample decides; docs/audit.md says how large it has to be."""

    images: int = Field(5000, ge=100, description="Most images in the random sample, and most of the clean set.")
    classes: int = Field(
        20, ge=2, description="Most classes that are scored; the largest of the sample are taken."
    )
    crop: int = Field(
        64, ge=16, multiple_of=8, description="Longest side in pixels of the central crop that is scored."
    )
    alpha: float = Field(0.01, gt=0, lt=1, description="False positive rate under the nulls of the scores.")
    denoiser: Location | None = Field(
        None, description="Folder of a denoiser whose residual is scored; null: a blur is used instead."
    )
    output: Location | None = Field(
        None, description="Folder for audit.json, audit.png and config.yaml; null: none."
    )


class RunConfig(Section):
    """What concerns the whole run."""

    seed: int = Field(0, ge=0, lt=2**63, description="Of everything that is random.")
    address: str | None = Field(None, description="Ray address; null: RAY_ADDRESS, else a local cluster.")
    max_cpus: int | None = Field(
        None, ge=1, description="CPUs an autoscaler may reach; null: those that are there."
    )
    max_gpus: int | None = Field(None, ge=0, description="GPUs an autoscaler may reach; null: those there are.")
    progress_seconds: float = Field(10, gt=0, description="Seconds between progress lines off a terminal.")
    watchdog_seconds: float = Field(
        1800, gt=0, description="Seconds without any finished work after which a run ends with exit 75."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Messages on standard error: for people, or one JSON object per line."
    )
    loggers: tuple[LoggerName, ...] = Field(
        (), description="Services that get the curves of training, victims and trials too."
    )
