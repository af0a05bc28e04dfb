"""Checks that every optimised poison has to pass, for the tests of rem, sep, efp and adp."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eclipse_ray.poisons import fit_poison, poison_fitted
from eclipse_ray.victims.training import classify
from tests.poisons.helpers import Killed, Memory, part


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


def check_storage(data, state, config, limit=8):
    """Check that the stored bound holds and is used, that order and chunks do not matter; return the images."""
    whole = poison_fitted(data, state, config, 3)
    assert whole.dtype == torch.uint8
    assert int((whole.int() - data.images.int()).abs().max()) == limit
    rows = torch.randperm(len(data.ids), generator=torch.Generator().manual_seed(1)).tolist()
    for some in (rows[:5], rows[5:]):
        again = poison_fitted(part(data, some), state, config, 3)
        # Sums in another order may turn the sign of a gradient that is almost nothing.
        assert float((again != whole[some]).float().mean()) <= 0.01
    return whole


def as_floats(images):
    """Return uint8 (B, H, W, 3) as float (B, 3, H, W) in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def losses(model, images, labels):
    """Return the cross-entropy of each of `images` (B, 3, H, W) in [0, 1]."""
    return F.cross_entropy(classify(model, images), labels, reduction="none")
