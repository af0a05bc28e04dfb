"""Settings of the proof: poisons, rival defenses, victims, and the grid of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eclipse_ray.config.presets import RECIPES, Recipe

Settings = Mapping[str, Any]
Sampler = Literal["ddpm", "ddim", "dpm"]
Precision = Literal["float32", "bfloat16"]
ScheduleName = Literal["cosine", "linear"]
Layout = Literal["parquet", "folder", "webdataset", "npz", "cifar"]
Alpha = Literal["composite", "refuse"]
Arch = Literal["small", "resnet18", "resnet50", "vgg16", "vgg19", "densenet121"]
LoggerName = Literal["tensorboard", "mlflow", "wandb"]
Animated = Literal["first", "refuse"]


class Section(BaseModel):
    """A group of settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


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


class DefenseConfig(Section):
    """Rival defenses; the defaults are the published numbers (docs/defenses.md)."""

    draws: int = Field(4, ge=1, description="eclipse-draws: independent purifications of each image.")
    cutout_size: int = Field(16, ge=1, description="Side of the black square, in pixels.")
    mix_alpha: float = Field(1.0, gt=0, description="mixup, cutmix: weights are Beta(alpha, alpha).")
    dp_max_grad_norm: float = Field(1.0, gt=0, description="dp-sgd: an image's gradient is cut to this norm.")
    dp_noise_multiplier: float = Field(
        0.01, ge=0, description="dp-sgd: standard deviation of noise, of that norm."
    )
    iss_jpeg_quality: int = Field(10, ge=1, le=100, description="iss-j: Pillow's quality.")
    aa_draws: int = Field(5, ge=1, description="aa: draws of which the one of highest loss is kept.")
    aa_until: float = Field(
        0.3, ge=0, le=1, description="aa: part of training with so many draws, one after it; 60 of 200 epochs."
    )
    aa_p: float = Field(0.5, ge=0, le=1, description="aa: probability of each operation before TrivialAugment.")
    aa_roughness: tuple[float, float] = Field((0.3, 0.7), description="aa: range of the plasma's roughness.")
    aa_intensity: tuple[float, float] = Field((0.5, 1.0), description="aa: range of plasma brightness.")
    op_epochs: int = Field(20, ge=1, description="op: epochs of the linear model.")
    op_learning_rate: float = Field(0.1, gt=0, description="op: of the linear model.")
    op_batch_size: int = Field(1024, ge=1, description="op: of the linear model.")
    op_rotation: float = Field(10.0, ge=0, description="op: most degrees of rotation.")
    op_shear: float = Field(10.0, ge=0, description="op: most degrees of shear.")
    op_scale: float = Field(0.2, ge=0, lt=1, description="op: most change of scale.")
    op_jitter: float = Field(0.2, ge=0, le=1, description="op: most change of brightness, contrast, saturation.")
    op_cutmix_p: float = Field(0.5, ge=0, le=1, description="op: probability of CutMix for a batch.")
    avatar_noise_255: float = Field(
        43.0, gt=0, description="avatar: noise in grey levels of a full-strength image."
    )
    avatar_steps: int = Field(100, ge=1, description="avatar: reverse steps.")
    at_eps_255: float = Field(8.0, gt=0, description="at: L-inf radius of the attack, in 1/255.")
    at_steps: int = Field(10, ge=1, description="at: steps of projected gradient ascent.")
    at_step_size_255: float | None = Field(None, gt=0, description="at: null: a quarter of the radius.")


PoisonName = Literal["urp", "lsp", "ar", "cuda", "em", "tap", "rem", "sep", "efp", "adp"]
PoisonVariant = Literal["plain", "fa_vr", "push", "pull", "paper", "strong"]
POISON_VARIANTS: dict[str, tuple[PoisonVariant, ...]] = {
    "sep": ("plain", "fa_vr"),
    "efp": ("push", "pull"),
    "adp": ("paper", "strong"),
}
"""Variants of a poison, the default first; em's are its scopes."""
# urp, lsp, ar and em come both ways; a filter or a target image by image are other poisons, with other names.
ONE_SCOPE: dict[str, str] = {"cuda": "class", "tap": "sample", "rem": "sample"} | dict.fromkeys(
    POISON_VARIANTS, "sample"
)


class PoisonConfig(Section):
    """An availability poison. Null numbers are those of `cost`, which poisons/costs.py lists in full."""

    name: PoisonName = Field("ar")
    eps_255: float | None = Field(
        None, gt=0, description="Bound in 1/255: L2 for lsp, ar; none for cuda; else L-inf."
    )
    scope: Literal["sample", "class"] | None = Field(None, description="One draw an image, or one a class.")
    distribution: Literal["uniform", "gaussian"] = Field("uniform", description="urp only.")
    patch: int | None = Field(None, ge=1, description="lsp only: side of a constant patch, in pixels.")
    variant: PoisonVariant | None = Field(
        None, description="sep: plain, fa_vr; efp: push, pull; adp: paper, strong; null: the first."
    )
    cost: Literal["full", "reduced"] = Field(
        "full", description="Numbers of optimised poisons: as published, or for two CPU cores."
    )
    store_perturbation: bool = Field(False, description="Add a column `perturbation`: int16 differences, raw.")
    save_seconds: float = Field(60, ge=0, description="Least seconds between two saved states of a fit.")
    chunk_images: int = Field(512, ge=1, description="Images of one task of an optimised poison.")
    surrogate: Literal["small", "resnet18", "unet"] | None = Field(None, description="unet: adp only.")
    surrogate_epochs: int | None = Field(None, ge=1, description="tap, sep, efp: training before the noise.")
    surrogate_batch_size: int | None = Field(None, ge=2)
    surrogate_learning_rate: float | None = Field(None, gt=0)
    surrogate_schedule: Literal["constant", "linear", "milestones"] | None = Field(
        None, description="linear falls to 0 over the training; milestones divide by 10."
    )
    surrogate_milestones: tuple[int, ...] | None = Field(None, description="In epochs; rem: in optimiser steps.")
    surrogate_weight_decay: float | None = Field(None, ge=0)
    surrogate_augment: bool | None = Field(None, description="Crop and flip while the surrogate trains.")
    max_grad_norm: float | None = Field(None, ge=0, description="Longer gradients are cut to it; 0: none are.")
    steps: int | None = Field(None, ge=1, description="Sign steps of one making of the noise.")
    step_size_255: float | None = Field(None, gt=0, description="Size of such a step in 1/255.")
    restarts: int | None = Field(None, ge=1, description="tap: starts, of which the lowest loss is kept.")
    target_shift: int | None = Field(None, ge=1, description="tap, sep: target class y + shift, modulo classes.")
    crop_padding: int | None = Field(None, ge=0, description="Crops after padding by so many pixels.")
    checkpoints: int | None = Field(None, ge=1, description="sep: networks taken from one training run.")
    inner_draws: int | None = Field(None, ge=1, description="sep fa_vr: checkpoints visited in a step.")
    rounds: int | None = Field(None, ge=1, description="em, adp: most rounds of training and noise.")
    round_batches: int | None = Field(None, ge=1, description="em, adp: optimiser steps of a round.")
    stop_error: float | None = Field(None, ge=0, lt=1, description="em, adp: training error that ends the fit.")
    subset: float | None = Field(None, gt=0, le=1, description="em: part of the images a round perturbs.")
    train_steps: int | None = Field(None, ge=1, description="rem: optimiser steps.")
    eot_draws: int | None = Field(None, ge=1, description="rem, adp: random transformations averaged over.")
    adversary_eps_255: float | None = Field(None, gt=0, description="rem, efp: L-inf radius of the adversary.")
    adversary_steps: int | None = Field(None, ge=1, description="rem, efp: its sign steps.")
    adversary_step_size_255: float | None = Field(None, gt=0, description="rem, efp: size of such a step.")
    unet_channels: tuple[int, ...] | None = Field(None, min_length=1, description="adp: channels of its levels.")
    denoiser: str | None = Field(None, description="adp strong: folder of the denoiser attacked.")
    t_star: int | None = Field(None, ge=1, description="adp strong: depth; null: what the denoiser recommends.")
    compensation_p: float | None = Field(None, ge=0, le=1, description="adp: probability of grayscale.")
    compensation_sigma: float | None = Field(None, ge=0, description="adp: deviation of fine noise, on [0, 1].")
    compensation_coarse_sigma: float | None = Field(None, ge=0, description="adp: of coarse noise, on [0, 1].")
    perturb_batch_size: int | None = Field(None, ge=1, description="Images of one pass when noise is made.")

    @model_validator(mode="after")
    def _consistent(self) -> PoisonConfig:
        variants = POISON_VARIANTS.get(self.name, ())
        if self.variant is not None and self.variant not in variants:
            raise ValueError(
                f"poison {self.name} has no variant {self.variant}; it has {', '.join(variants) or 'none'}"
            )
        scope = ONE_SCOPE.get(self.name, self.scope)
        if self.scope not in (None, scope):
            raise ValueError(f"poison {self.name} knows only scope {scope}")
        if self.name not in ("urp", "lsp", "ar", "cuda") and not 1 <= (self.eps_255 or 1) <= 127:
            raise ValueError(f"eps_255 {self.eps_255}: an optimised poison is stored in 8 bits; choose 1 to 127")
        return self


class VictimConfig(Section):
    """The classifier that is trained to judge a dataset; the defaults are the recipe `quick`."""

    recipe: Recipe = Field("quick", description="Named group of defaults of the keys below.")
    arch: Arch = Field("small")
    epochs: int = Field(12, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(0.1, gt=0, description="At its highest.")
    lr_schedule: Literal["constant", "one_cycle"] = Field("one_cycle")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = Field(True, description="Nesterov momentum; no effect without momentum.")
    weight_decay: float = Field(1e-3, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    crop_padding: int = Field(3, ge=0, description="Random crop after padding by so many pixels.")
    flip: bool = Field(True, description="Random horizontal flip.")
    precision: Precision = Field(
        "float32", description="Of the network's arithmetic on a GPU; a CPU always computes in float32."
    )

    @model_validator(mode="after")
    def _by_recipe(self) -> VictimConfig:
        # Past pydantic's bookkeeping, so that a later override of the recipe moves these defaults along.
        self.__dict__.update(
            {key: value for key, value in RECIPES[self.recipe].items() if key not in self.model_fields_set}
        )
        return self


class PrivacyConfig(Section):
    """DP-SGD (Abadi et al., arXiv 1607.00133), as arXiv 2406.15093 uses it against poisons."""

    max_grad_norm: float = Field(1.0, gt=0, description="Bound of the gradient of one image, L2.")
    noise_multiplier: float = Field(0.01, ge=0, description="Standard deviation of the noise, in such bounds.")


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


Search = Literal["grid", "random", "optuna"]


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
        0.5,
        gt=0,
        lt=1,
        description="Part of data.clean that only scores, when the sweep trains denoisers itself.",
    )
    sparse_percent: float | None = Field(
        None,
        gt=0,
        le=100,
        description="B/N: images that train a denoiser here, in % of data.source; null: all.",
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

    images: int = Field(5000, ge=100, description="Images of the random sample, and most of the clean set.")
    classes: int = Field(20, ge=2, description="Most classes looked at: those with most images in the sample.")
    crop: int = Field(
        64, ge=16, multiple_of=8, description="Most pixels of a side that are looked at: the middle."
    )
    alpha: float = Field(0.01, gt=0, lt=1, description="False positive rate under the nulls of the scores.")
    denoiser: str | None = Field(None, description="Folder of a denoiser whose residual is looked at; null: none.")
    output: str | None = Field(None, description="Folder for audit.json, audit.png and config.yaml; null: none.")
