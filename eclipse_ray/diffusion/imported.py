"""Weights of the public improved-diffusion and guided-diffusion code become a denoiser folder.

Both write a flat state dict of the same U-Net (Nichol & Dhariwal 2021) under the same names. Its shape is read off
the tensors; the number of attention heads, T and the schedule leave no trace in them and have to be said. Two
options of the published code leave no trace either and are taken to have their usual value: timesteps are rescaled
to t * 1000 / T, and queries, keys and values lie in the legacy order, not in guided-diffusion's "new" one.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
from dataclasses import asdict
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor

from eclipse_ray.config import ScheduleName, digest
from eclipse_ray.diffusion.checkpoint import (
    CARD_FILE,
    DENOISER_FILES,
    Card,
    read_card,
    save_denoiser,
)
from eclipse_ray.diffusion.model import Denoiser, parameter_count
from eclipse_ray.diffusion.published import Architecture, convert, first_few, read_architecture
from eclipse_ray.diffusion.schedule import cosine_alphas_cumprod, linear_alphas_cumprod, linear_betas, noise_std
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.results import ImportResult

# The published code shows its network t * 1000 / T.
SHOWN_TIMESTEPS = 1000
# The paper's depth (arXiv 2406.15093, section 5): index 99 of the cosine schedule with T = 4000.
PAPER_TIMESTEPS, PAPER_DEPTH = 4000, 100
# What torch.load raises for files that are damaged, made of something else, or hold more than tensors.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    BadZipFile,
    struct.error,
)


def import_checkpoint(
    file: str | Path,
    *,
    out: str | Path,
    heads: int = 4,
    timesteps: int = 4000,
    schedule: ScheduleName = "cosine",
) -> ImportResult:
    """Write the U-Net of a local `file` (such as ema_0.9999_250000.pt) as the local denoiser folder `out`.

    Its forward pass equals the original's with timesteps rescaled to t * 1000 / T. The same call returns at once
    if `out` is finished. Raises InputError for a file that is not such a U-Net, ConfigError for heads, timesteps
    or a schedule that cannot be, or an `out` that holds another denoiser.
    """
    alphas_cumprod = _alphas_cumprod(timesteps, schedule)
    if "://" in str(out) or Path(out).is_file():
        raise ConfigError(f"{out}: expected a local folder for the denoiser; copy it elsewhere afterwards")
    fingerprint = digest({"sha256": _sha256(file), "heads": heads, "T": timesteps, "schedule": schedule})
    if not _is_finished(Path(out), fingerprint):
        state = read_state(file)
        architecture = read_architecture(state, file)
        unet = convert(state, architecture, heads, file)
        t_star = recommended_depth(alphas_cumprod)
        denoiser = Denoiser(
            unet,
            alphas_cumprod,
            t_max=timesteps,
            t_star=t_star,
            num_inference_steps=t_star,
            timestep_scale=SHOWN_TIMESTEPS / timesteps,
        )
        card = _card(denoiser, architecture, file, heads, schedule, fingerprint)
        try:
            save_denoiser(out, denoiser.eval(), card, schedule)
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written ({error}); name another folder with --out") from None
    return _result(out)


def read_state(file: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name; nothing in the file is ever executed.

    Raises InputError unless the file is a flat dict of floating-point tensors.
    """
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    except _UNREADABLE:
        raise InputError(
            f"{file}: damaged, or holds more than tensors, so nothing in it was executed; expected a state dict "
            "saved by improved-diffusion or guided-diffusion, such as ema_0.9999_250000.pt"
        ) from None
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(f"{file}: holds a {type(loaded).__name__}, expected a dict of tensors by name")
    strange = [str(name) for name, value in loaded.items() if not _is_weight(name, value)]
    if strange:
        raise InputError(
            f"{file}: expected a flat dict of floating-point tensors by name, but {first_few(strange)} is no such "
            "tensor; if the weights lie below one entry, save that entry alone with torch.save"
        )
    return {name: value.float() for name, value in loaded.items()}


def recommended_depth(alphas_cumprod: Tensor) -> int:
    """Return the t_star in 1..T whose noise is nearest to the paper's, 0.0499 on [-1, 1]."""
    target = noise_std(cosine_alphas_cumprod(PAPER_TIMESTEPS), PAPER_DEPTH - 1)
    return int(torch.argmin(((1 - alphas_cumprod).sqrt() - target).abs())) + 1


def iterations_in(file: str | Path) -> int:
    """Return the number that ends a file name such as ema_0.9999_250000.pt or model250000.pt, else 0."""
    found = re.search(r"(?<![\d.])\d+$", Path(file).stem)
    return int(found.group()) if found else 0


def _alphas_cumprod(timesteps: int, schedule: ScheduleName) -> Tensor:
    # Below 21 steps the linear schedule would begin with more noise than signal.
    if timesteps < 21:
        raise ConfigError(f"--timesteps {timesteps}: expected T of the training, for example 4000 or 1000")
    if schedule == "cosine":
        return cosine_alphas_cumprod(timesteps)
    if schedule == "linear":
        return linear_alphas_cumprod(timesteps, *linear_betas(timesteps))
    raise ConfigError(f"--schedule {schedule}: expected cosine or linear")


def _is_weight(name: object, value: object) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain and isinstance(value, Tensor) and value.is_floating_point()


def _sha256(file: str | Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None


def _is_finished(out: Path, fingerprint: str) -> bool:
    """Return whether `out` holds this very import; raise ConfigError if it holds something else."""
    try:
        foreign = sorted({entry.name for entry in out.iterdir()} - set(DENOISER_FILES)) if out.exists() else []
    except OSError as error:
        raise ConfigError(f"{out}: cannot be read ({error.strerror}); name another folder with --out") from None
    if foreign:
        raise ConfigError(f"{out}: holds other files, such as {foreign[0]}; name a new folder with --out")
    if not (out / CARD_FILE).exists():
        return False
    if read_card(out).fingerprint != fingerprint:
        raise ConfigError(
            f"{out}: holds another denoiser, or this one imported with other options; name a new folder with --out"
        )
    return True


def _card(
    denoiser: Denoiser,
    architecture: Architecture,
    file: str | Path,
    heads: int,
    schedule: ScheduleName,
    fingerprint: str,
) -> Card:
    return Card(
        t_max=denoiser.t_max,
        t_star=denoiser.t_star,
        num_inference_steps=denoiser.num_inference_steps,
        sampler=denoiser.sampler,
        timestep_scale=denoiser.timestep_scale,
        iterations=iterations_in(file),
        sparse_images=0,
        sparse_hashes=[],
        fingerprint=fingerprint,
        settings={
            **asdict(architecture),
            "attention_heads": heads,
            "num_train_timesteps": denoiser.num_train_timesteps,
            "schedule": schedule,
            "parameters": parameter_count(denoiser.unet),
            "imported_from": Path(file).name,
        },
    )


def _result(out: str | Path) -> ImportResult:
    card = read_card(out)
    return ImportResult(
        denoiser=str(out),
        parameters=card.settings["parameters"],
        block_out_channels=list(card.settings["block_out_channels"]),
        attention_levels=list(card.settings["attention_levels"]),
        learned_range=card.settings["learned_range"],
        iterations=card.iterations,
        t_star=card.t_star,
    )
