"""A denoiser on disk: a diffusers folder (network and `DDPMScheduler` config, safetensors) and a card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor

from eclipse_ray.config import Computed, Sampler, ScheduleName
from eclipse_ray.diffusion.network import Denoiser, set_precision
from eclipse_ray.diffusion.process import cosine_alphas_cumprod, linear_alphas_cumprod, linear_betas
from eclipse_ray.diffusion.shuffled import MODEL_FILE, WEIGHTS_FILE, ShuffledNetwork, open_shuffled
from eclipse_ray.errors import InputError

if TYPE_CHECKING:
    from diffusers import UNet2DModel

SCHEDULER_FILE = "scheduler_config.json"
CARD_FILE = "eclipse.json"
DENOISER_FILES = (WEIGHTS_FILE, MODEL_FILE, SCHEDULER_FILE, CARD_FILE)

_SCHEDULE_NAMES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


class FilteredClass(BaseModel):
    """A class that went through a filter, and the images for which that is undone (diffusion/filters.py)."""

    model_config = ConfigDict(extra="forbid")

    label: int
    taps: list[list[float]] = Field(description="Correlation of sum 1.")
    images: list[str] = Field(description="Content hashes.")


class Card(BaseModel):
    """What a user of the weights must know: trained range of t, recommendation, provenance, quality."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    t_max: int = Field(description="Trained on timesteps below this one.")
    t_star: int
    num_inference_steps: int
    sampler: Sampler = "ddpm"
    timestep_scale: float = Field(1.0, gt=0, description="The network is shown t times this.")
    iterations: int
    denoise_psnr: float | None = Field(
        None, description="dB, held-out images at t_star, one step; null: imported, unknown."
    )
    noisy_psnr: float | None = Field(None, description="dB, the same images before denoising.")
    sparse_images: int
    sparse_hashes: list[str] = Field(description="Content hashes of the sparse clean set, held-out part included.")
    fingerprint: str
    settings: dict[str, Any] = Field(description="The resolved `denoiser` section and the seed.")
    filters: list[FilteredClass] = Field(default_factory=list, description="What is undone before the noise.")
    history: list[dict[str, float]] = Field(default_factory=list, description="The training curve.")


def save_denoiser(folder: str | Path, denoiser: Denoiser, card: Card, schedule: ScheduleName = "cosine") -> None:
    """Write a local denoiser folder; the card goes last, so a folder without one is known to be unfinished."""
    path = Path(folder)
    denoiser.unet.save_pretrained(path)
    beta_start, beta_end = linear_betas(denoiser.num_train_timesteps)
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": denoiser.num_train_timesteps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": _SCHEDULE_NAMES[schedule],
        "variance_type": "learned_range" if denoiser.learned_range else "fixed_small",
        "prediction_type": "epsilon",
        "clip_sample": True,
    }
    (path / SCHEDULER_FILE).write_text(json.dumps(scheduler, indent=2) + "\n", encoding="utf-8")
    (path / CARD_FILE).write_text(card.model_dump_json(indent=1), encoding="utf-8")


def read_card(folder: str | Path) -> Card:
    """Return the card of a local denoiser folder. Raises InputError if the folder is not a finished denoiser."""
    path = Path(folder) / CARD_FILE
    try:
        return _parsed_card(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: not a denoiser folder ({CARD_FILE} {_reason(error)}); make one with `eclipse-ray train`"
        ) from None


def _parsed_card(text: str) -> Card:
    tree = json.loads(text)
    # With one step the former sampler dpm is ddim, and with more it gained nothing (docs/results.md).
    if isinstance(tree, dict) and tree.get("sampler") == "dpm":
        tree["sampler"] = "ddim"
    return Card.model_validate(tree)


def load_denoiser(
    folder: str | Path, device: torch.device | str | None = None, precision: Computed | None = "float32"
) -> Denoiser:
    """Return the denoiser of a local folder, in evaluation mode.

    It computes in `precision`, None is the fast one of its device, as purify.precision says. The network's class
    is the one that config.json names. Raises InputError if files are missing or damaged, the class is unknown, or
    the schedule is neither cosine nor linear, and ConfigError for a precision that is unknown or not to be had.
    """
    path = Path(folder)
    card = read_card(path)
    for name in DENOISER_FILES:
        try:
            (path / name).open("rb").close()
        except OSError as error:
            problem = f"{name} {_reason(error)}; copy the folder again"
            raise InputError(f"{folder}: the denoiser cannot be read: {problem}") from None
    try:
        schedule = json.loads((path / SCHEDULER_FILE).read_text(encoding="utf-8"))
        unet = _open_unet(path)
        alphas_cumprod = _read_schedule(path / SCHEDULER_FILE, schedule)
        timesteps = len(alphas_cumprod)
        filters = {name: torch.tensor(each.taps) for each in card.filters for name in each.images}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise InputError(f"{folder}: the denoiser cannot be read: {_reason(error)}") from None
    if not card.t_star <= card.t_max <= timesteps:
        raise InputError(f"{folder}/{CARD_FILE}: t_star {card.t_star}, t_max {card.t_max}, T {timesteps} disagree")
    denoiser = Denoiser(
        unet,
        alphas_cumprod,
        t_max=card.t_max,
        t_star=card.t_star,
        num_inference_steps=card.num_inference_steps,
        sampler=card.sampler,
        timestep_scale=card.timestep_scale,
    )
    denoiser.filters = filters
    denoiser.to(device or "cpu").eval()
    set_precision(denoiser, precision)
    return denoiser


def _open_unet(folder: Path) -> UNet2DModel | ShuffledNetwork:
    names = ("FixedHeadsUNet2DModel", "ShuffledNetwork", "UNet2DModel")
    name = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8")).get("_class_name")
    if name not in names:
        raise InputError(f"{folder / MODEL_FILE}: a network of class {name}, expected one of {list(names)}")
    if name == "ShuffledNetwork":
        return open_shuffled(folder)
    # Here and not above: diffusers takes seconds to import.
    from diffusers import UNet2DModel

    from eclipse_ray.diffusion.improved_diffusion import FixedHeadsUNet2DModel

    network = UNet2DModel if name == "UNet2DModel" else FixedHeadsUNet2DModel
    unet, report = network.from_pretrained(
        folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    # diffusers would go on with random numbers for what is missing.
    if strange := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise InputError(f"{folder / WEIGHTS_FILE}: {strange[0]} is missing or unknown to {MODEL_FILE}")
    return unet


def parse_schedule(where: str, data: bytes) -> Tensor:
    """Return alphas_cumprod, float64 (T,), of the scheduler file `data`. Raises InputError naming `where`."""
    try:
        return _read_schedule(where, json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{where}: {_reason(error)}") from None


def _read_schedule(where: str | Path, schedule: dict[str, Any]) -> Tensor:
    kind, timesteps = schedule.get("beta_schedule"), int(schedule["num_train_timesteps"])
    if schedule.get("prediction_type") != "epsilon" or kind not in _SCHEDULE_NAMES.values():
        raise InputError(f"{where}: expected epsilon prediction and the cosine or the linear schedule")
    if kind == "linear":
        return linear_alphas_cumprod(timesteps, float(schedule["beta_start"]), float(schedule["beta_end"]))
    return cosine_alphas_cumprod(timesteps)


def weights_digest(folder: str | Path) -> str:
    """Return 32 hex digits of SHA-256 over the files that decide what the denoiser computes."""
    state = hashlib.sha256()
    for name in (WEIGHTS_FILE, MODEL_FILE, SCHEDULER_FILE):
        try:
            state.update((Path(folder) / name).read_bytes())
        except OSError as error:
            raise InputError(f"{folder}: the denoiser cannot be read: {_reason(error)}") from None
    for each in read_card(folder).filters:
        state.update(each.model_dump_json().encode())
    return state.hexdigest()[:32]


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"is unreadable: {str(error).splitlines()[0][:200]}"
