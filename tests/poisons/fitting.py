"""What tests of optimised poisons share: a tiny dataset, sessions that are interrupted, and common checks."""

import torch
import torch.nn.functional as F

from eclipse_ray.config import PoisonConfig
from eclipse_ray.poisons import LabelledImages, Session, fit_poison, poison_fitted, quiet_session, resolved_poison
from eclipse_ray.poisons.surrogate import classify

CPU = torch.device("cpu")
CLASSES = 4
TINY = {
    "surrogate": "small",
    "cost": "reduced",
    "surrogate_batch_size": 16,
    "perturb_batch_size": 24,
    "surrogate_learning_rate": 0.05,
}


def tiny_config(name, **settings):
    """Return a resolved config of so little work that a test takes seconds."""
    return resolved_poison(PoisonConfig.model_validate({"name": name, **TINY, **settings}))


def tiny_data(count=48, size=16, seed=0):
    """Return images of four classes that a network can tell apart: a colour each, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    colours = torch.tensor([[200, 80, 80], [80, 200, 80], [80, 80, 200], [150, 150, 60]])[labels]
    images = colours[:, None, None] + 40 * torch.randn(count, size, size, 3, generator=generator)
    ids = [f"image-{index}" for index in range(count)]
    return LabelledImages(images.clamp(0, 255).to(torch.uint8), labels, ids, CLASSES)


def part_of(data, rows):
    """Return the images `rows` of a dataset."""
    chosen = torch.as_tensor(rows, dtype=torch.int64)
    ids = [data.ids[row] for row in chosen.tolist()]
    return LabelledImages(data.images[chosen], data.labels[chosen], ids, data.num_classes)


class Interrupted(Exception):
    """What stops a fit in the middle."""


def interrupting(after, **parts):
    """Return a session that keeps what is saved and raises at save number `after`, and where it keeps it."""
    kept = []

    def save(state):
        kept.append({key: value.clone() for key, value in state.items()})
        if len(kept) == after:
            raise Interrupted

    load = lambda: kept[-1] if kept else None  # noqa: E731
    return Session(CPU, lambda _done, _total, _note: None, load, save, **parts), kept


def check_resume(data, config, after=1, **parts):
    """Stop a fit at its save number `after`, go on, and compare with one that never stopped; return the state."""
    session, kept = interrupting(after, **parts)
    try:
        fit_poison(data, config, 3, session)
    except Interrupted:
        pass
    else:
        raise AssertionError("the fit ended before it could be interrupted")
    resumed = fit_poison(data, config, 3, session)
    assert len(kept) > after, "nothing was left to do after the interruption"
    state = fit_poison(data, config, 3, interrupting(-1, **parts)[0])
    assert state.keys() == resumed.keys()
    for key, value in state.items():
        assert torch.equal(value, resumed[key]), key
    return state


def check_storage(data, state, config, limit=8):
    """Check that the stored bound holds and is used, and that order and chunks do not matter; return the images."""
    whole = poison_fitted(data, state, config, 3)
    difference = (whole.int() - data.images.int()).abs()
    assert whole.dtype == torch.uint8
    assert int(difference.max()) == limit
    order = torch.randperm(len(data.ids), generator=torch.Generator().manual_seed(1))
    differing = 0
    for rows in order.split(7):
        again = poison_fitted(part_of(data, rows), state, config, 3)
        differing += int((again != whole[rows]).sum())
    # Sums in another order may turn the sign of a gradient that is almost nothing.
    assert differing <= 0.01 * whole.numel()
    assert poison_fitted(part_of(data, []), state, config, 3).shape == (0, *data.images.shape[1:])
    return whole


def as_floats(images):
    """Return uint8 (B, H, W, 3) as float (B, 3, H, W) in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def losses(model, images, labels):
    """Return the cross-entropy of each of `images` (B, 3, H, W) in [0, 1]."""
    return F.cross_entropy(classify(model, images), labels, reduction="none")


__all__ = ["CPU", "check_resume", "check_storage", "quiet_session", "tiny_config", "tiny_data"]
