"""What tests of optimised poisons share: a tiny learnable dataset, tiny numbers, kills, checks of all of them."""

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F

from eclipse_ray.config import PoisonConfig
from eclipse_ray.poisons import (
    PoisonSettings,
    fit_poison,
    poison_fitted,
    poison_settings,
    resolved_poison,
    settings_of,
)
from eclipse_ray.poisons.interface import LabelledImages, Session, State
from eclipse_ray.victims.training import classify

CLASSES = 4
CPU = torch.device("cpu")


def tiny_images(count: int = 64, size: int = 16, seed: int = 0) -> LabelledImages:
    """Return noisy images of four colours; a class is a colour, so that a few epochs are enough to learn it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    # Far enough apart to be learnt at once, near enough for 8/255 to lead from one to the next.
    colours = torch.tensor([[108, 120, 120], [120, 108, 120], [120, 120, 108], [112, 112, 112]])
    spread = 8 * torch.randn(count, size, size, 3, generator=generator)
    images = (colours[labels][:, None, None] + spread).clamp(0, 255).to(torch.uint8)
    return LabelledImages(images, labels, [f"image-{index}" for index in range(count)], CLASSES)


def part(data: LabelledImages, rows: list[int]) -> LabelledImages:
    """Return some images of a dataset."""
    return LabelledImages(data.images[rows], data.labels[rows], [data.ids[row] for row in rows], data.num_classes)


def tiny_config(name: str, **settings: object) -> PoisonConfig:
    """Return a resolved config at a cost that a test can pay; all settings of its poison are attributes."""
    numbers = {
        "surrogate_batch_size": 32,
        "surrogate_learning_rate": 0.1,
        "surrogate_epochs": 3,
        "perturb_batch_size": 64,
        "steps": 3,
        "rounds": 3,
        "round_batches": 4,
        "stop_error": 0.0,
        "crop_padding": 2,
    }
    known = poison_settings()[name].model_fields
    small = {key: value for key, value in numbers.items() if key in known}
    return resolved_poison(PoisonConfig.model_validate({"name": name, "cost": "reduced", **small, **settings}))


def tiny_settings(name: str, **settings: object) -> PoisonSettings:
    """Return the settings that `tiny_config` resolves to."""
    return settings_of(tiny_config(name, **settings))


class Killed(Exception):
    """What happens to a fit in the middle of it."""


@dataclass
class Memory:
    """Keeps what a fit saves; kills it right after save number `kill_at`, if that is not 0."""

    kill_at: int = 0
    saved: list[State] = field(default_factory=list)

    def session(self) -> Session:
        """Return a session that begins where the last one was killed."""
        return Session(
            CPU, lambda _done, _total, _note: None, lambda: self.saved[-1] if self.saved else None, self._save
        )

    def _save(self, state: State) -> None:
        self.saved.append({key: value.clone() for key, value in state.items()})
        if len(self.saved) == self.kill_at:
            raise Killed


def check_resume(data, config, kill_at=1, denoiser=None):
    """Kill a fit right after save number `kill_at`, go on, compare with an undisturbed one; return its state."""
    memory, undisturbed = Memory(kill_at=kill_at), Memory()
    with pytest.raises(Killed):
        fit_poison(data, config, 3, replace(memory.session(), denoiser=denoiser))
    resumed = fit_poison(data, config, 3, replace(memory.session(), denoiser=denoiser))
    state = fit_poison(data, config, 3, replace(undisturbed.session(), denoiser=denoiser))
    assert kill_at < len(memory.saved) == len(undisturbed.saved), "nothing was left, or everything done again"
    assert state.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in state.items())
    return state


def check_storage(data, state, config, least=8, differing=0.01):
    """Check that the stored bound holds and is used, that order and chunks do not matter; return the images."""
    whole = poison_fitted(data, state, config, 3)
    assert whole.dtype == torch.uint8
    assert least <= int((whole.int() - data.images.int()).abs().max()) <= 8
    rows = torch.randperm(len(data.ids), generator=torch.Generator().manual_seed(1)).tolist()
    for some in (rows[:5], rows[5:]):
        again = poison_fitted(part(data, some), state, config, 3)
        # Sums in another order may turn the sign of a gradient that is almost nothing.
        assert float((again != whole[some]).float().mean()) <= differing
    return whole


def as_floats(images):
    """Return uint8 (B, H, W, 3) as float (B, 3, H, W) in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def losses(model, images, labels):
    """Return the cross-entropy of each of `images` (B, 3, H, W) in [0, 1]."""
    return F.cross_entropy(classify(model, images), labels, reduction="none")
