"""Settings of the proof: poisons, rival defenses, victims, and the grid of all of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from eclipse_ray.config.presets import RECIPES
from eclipse_ray.config.section import Arch, Precision, Recipe, Section


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

    seeds: int = Field(3, ge=1, description="Victims trained, with seeds run.seed, run.seed + 1, ...")


MatrixItem = str | dict[str, Any]


class MatrixConfig(Section):
    """The grid that `evaluate` measures: poisons x defenses x victims x seeds. Without a column it is off.

    An entry is a name, or a mapping with `name`, an optional `label` for tables and `published` (the row or column
    of the paper's numbers), and settings that differ from the rest of the file.
    """

    poisons: tuple[MatrixItem, ...] = Field((), description="Columns, in the order in which they are done.")
    clean: bool = Field(False, description="A column of unpoisoned images too, done first.")
    defenses: tuple[MatrixItem, ...] = Field(("none", "eclipse"), description="Rows; parts are joined by +.")
    victims: tuple[MatrixItem, ...] = Field((), description="Architectures; none: the one of section victim.")
    first_poisons: tuple[str, ...] = Field((), description="Labels of columns done before others; none: all.")
    first_defenses: tuple[str, ...] = Field((), description="Labels of rows done before others; none: all.")
    limit: int | None = Field(None, ge=2, description="First so many training images; null: all.")
    sparse_limit: int | None = Field(None, ge=2, description="First so many sparse images; null: all.")
    test_limit: int | None = Field(None, ge=1, description="First so many test images; null: all.")
    max_concurrent: int | None = Field(None, ge=1, description="Trials at once; null: as many as have room.")
    num_gpus: float | None = Field(None, ge=0, le=1, description="GPUs of a trial; null: a quarter if any.")
    published: Literal["cifar10", "imagenet"] | None = Field(
        None, description="The paper's dataset whose numbers stand beside ours; null: none."
    )
