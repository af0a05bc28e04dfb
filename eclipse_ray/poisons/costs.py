"""What every optimised poison costs: all its numbers, as published and reduced for two CPU cores.

Published numbers are of the public code of each method, for CIFAR-10 and a ResNet-18. Three of them are no one's:
no code names a cap on rounds, the learning-rate schedule of efp's surrogate, or adp's surrogate and bound
(docs/poisons.md). Reduced numbers are ours: 10,000 images of 32 px and the small victim as surrogate.
"""

from __future__ import annotations

from typing import Any

from eclipse_ray.config import POISON_VARIANTS, PoisonConfig

Numbers = dict[str, Any]

LINF_255 = 8.0
"""Published L-inf bound in 1/255 of every poison that has one (arXiv 2406.15093)."""

_SGD: Numbers = {
    "surrogate_learning_rate": 0.1,
    "surrogate_schedule": "constant",
    "surrogate_milestones": (),
    "surrogate_weight_decay": 5e-4,
    "surrogate_augment": True,
    "max_grad_norm": 0.0,
}
_FULL: Numbers = _SGD | {"surrogate": "resnet18", "surrogate_batch_size": 128, "perturb_batch_size": 512}
_REDUCED: Numbers = _SGD | {"surrogate": "small", "surrogate_batch_size": 128, "perturb_batch_size": 128}

_EM: Numbers = {
    "surrogate_augment": False,
    "max_grad_norm": 5.0,
    "subset": 1.0,
    "stop_error": 0.01,
    "step_size_255": 0.8,
}
_EM_FULL = _FULL | _EM | {"surrogate_batch_size": 512, "steps": 20, "round_batches": 10, "rounds": 200}
_EM_REDUCED = _REDUCED | _EM | {"steps": 4, "step_size_255": 2.0, "round_batches": 20, "rounds": 24}
_EM_CLASS: Numbers = {"steps": 1, "step_size_255": 0.8, "subset": 0.2, "stop_error": 0.1}

_TAP: Numbers = {"surrogate_schedule": "linear", "target_shift": 1, "crop_padding": 4}
_REM: Numbers = {"surrogate_schedule": "milestones", "crop_padding": 4, "adversary_eps_255": 4.0}
# Half the classes further on; no number, because configs do not know how many classes there are.
_SEP: Numbers = {"surrogate_schedule": "milestones", "target_shift": None, "crop_padding": 4}
_SEP_FULL = (
    _FULL | _SEP | {"surrogate_epochs": 120, "surrogate_milestones": (75, 90), "steps": 30, "step_size_255": 1.0}
)
_SEP_REDUCED = _REDUCED | _SEP | {"surrogate_epochs": 24, "surrogate_milestones": (15, 18), "steps": 12}
_EFP: Numbers = {"surrogate_schedule": "milestones", "crop_padding": 4, "adversary_eps_255": 4.0}
_EFP_FULL: Numbers = (
    _FULL
    | _EFP
    | {"surrogate_epochs": 100, "surrogate_milestones": (75, 90), "adversary_steps": 10}
    | {"adversary_step_size_255": 2.0, "steps": 300, "step_size_255": 0.4}
)
_EFP_REDUCED: Numbers = (
    _REDUCED
    | _EFP
    | {"surrogate_epochs": 20, "surrogate_milestones": (15, 18), "adversary_steps": 3}
    | {"adversary_step_size_255": 2.0, "steps": 60, "step_size_255": 0.8}
)
_ADP: Numbers = {"compensation_p": 0.4, "compensation_sigma": 0.05}
_ADP_FULL = _EM_FULL | _ADP | {"perturb_batch_size": 128}
_ADP_REDUCED = _EM_REDUCED | _ADP | {"rounds": 8}
_PAPER: Numbers = {"surrogate": "unet", "eot_draws": 1, "compensation_coarse_sigma": 0.0}
# What the defender does by default, coarse noise included.
_STRONG: Numbers = {"t_star": None, "compensation_coarse_sigma": 0.08}

POISON_COSTS: dict[tuple[str, str, str], Numbers] = {
    ("em", "sample", "full"): _EM_FULL,
    ("em", "sample", "reduced"): _EM_REDUCED,
    ("em", "class", "full"): _EM_FULL | _EM_CLASS,
    ("em", "class", "reduced"): _EM_REDUCED | _EM_CLASS,
    ("tap", "", "full"): _FULL
    | _TAP
    | {"surrogate_epochs": 40, "steps": 250, "step_size_255": 0.4, "restarts": 8},
    ("tap", "", "reduced"): _REDUCED
    | _TAP
    | {"surrogate_epochs": 15, "steps": 40, "step_size_255": 1.0, "restarts": 1},
    ("rem", "", "full"): (
        _FULL
        | _REM
        | {
            "train_steps": 5000,
            "surrogate_milestones": (2000, 4000),
            "steps": 10,
            "step_size_255": 1.6,
            "eot_draws": 5,
        }
        | {"adversary_steps": 10, "adversary_step_size_255": 0.8}
    ),
    ("rem", "", "reduced"): (
        _REDUCED
        | _REM
        | {
            "train_steps": 400,
            "surrogate_milestones": (160, 320),
            "steps": 4,
            "step_size_255": 3.0,
            "eot_draws": 1,
        }
        | {"adversary_steps": 2, "adversary_step_size_255": 2.0}
    ),
    ("sep", "plain", "full"): _SEP_FULL | {"checkpoints": 30},
    ("sep", "plain", "reduced"): _SEP_REDUCED | {"checkpoints": 6, "step_size_255": 2.0},
    ("sep", "fa_vr", "full"): _SEP_FULL | {"checkpoints": 15, "inner_draws": 15},
    ("sep", "fa_vr", "reduced"): _SEP_REDUCED | {"checkpoints": 4, "inner_draws": 4, "step_size_255": 2.0},
    ("efp", "push", "full"): _EFP_FULL,
    ("efp", "push", "reduced"): _EFP_REDUCED,
    ("efp", "pull", "full"): _EFP_FULL,
    ("efp", "pull", "reduced"): _EFP_REDUCED,
    ("adp", "paper", "full"): _ADP_FULL | _PAPER | {"unet_channels": (64, 128, 256)},
    ("adp", "paper", "reduced"): _ADP_REDUCED | _PAPER | {"unet_channels": (16, 32)},
    ("adp", "strong", "full"): _ADP_FULL | _STRONG | {"eot_draws": 4},
    ("adp", "strong", "reduced"): _ADP_REDUCED | _STRONG | {"eot_draws": 1},
}
"""Numbers by (name, variant, cost); em's variant is its scope, that of a poison with one form is empty."""

NUMBER_FIELDS = frozenset(field for row in POISON_COSTS.values() for field in row)
"""Settings that `cost` decides."""


def resolved_poison(config: PoisonConfig) -> PoisonConfig:
    """Return `config` with everything it leaves open: scope, variant, L-inf bound, the numbers of its cost.

    Numbers that this poison has no use for become null: what is written beside a dataset is what was used.
    """
    variant = variant_of(config)
    row = POISON_COSTS.get((config.name, variant, config.cost), {})
    chosen = config.model_dump()
    filled = {name: row.get(name) if chosen[name] is None else chosen[name] for name in NUMBER_FIELDS}
    filled = {name: value if name in row else None for name, value in filled.items()}
    if config.name == "urp" or row:
        filled["eps_255"] = LINF_255 if config.eps_255 is None else config.eps_255
    scopes = {"urp": "class", "cuda": "class"}
    filled["scope"] = config.scope or scopes.get(config.name, "sample")
    filled["variant"] = variant if config.name in POISON_VARIANTS else None
    return PoisonConfig.model_validate(chosen | filled)


def variant_of(config: PoisonConfig) -> str:
    """Return the chosen or first variant of a poison, em's scope, or "" where there is only one form."""
    if config.name == "em":
        return config.scope or "sample"
    return config.variant or POISON_VARIANTS.get(config.name, ("",))[0]
