"""Named groups of settings: of the denoiser, and of the victim's training."""

from __future__ import annotations

from typing import Any, Literal

Recipe = Literal["quick", "paper", "modern"]

# `small` is the defaults above. `paper` is the published setting; what the paper leaves open (batch size,
# learning rate, dropout) follows the public improved-diffusion recipe.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {},
    "debug": {
        "denoiser": {
            "image_size": 16,
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
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
            "block_out_channels": [128, 256, 256, 256],
            "layers_per_block": 3,
            "attention_levels": [1, 2],
            "attention_head_dim": 64,
            "norm_num_groups": 32,
            "dropout": 0.3,
            "variance_type": "learned_range",
            "rescale_timesteps": True,
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
        "compensation": {"coarse_sigma": 0.0},
    },
}

# What the name in `victim.recipe` stands for (docs/victims.md). `paper` is the published setting, which decays
# neither the learning rate nor the weights. `modern` scales the usual CIFAR setting, a peak of 0.1 for a batch of
# 128 and weight decay 5e-4, to a batch of 256.
RECIPES: dict[Recipe, dict[str, Any]] = {
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
