"""A filter per class, as CUDA (arXiv 2303.04278) puts on images: found from trusted images, and undone.

Noise cannot drown a blur, and a denoiser cannot see that it differs from class to class. But a blur leaves traces
that hardly depend on what an image shows: the power spectrum gives the filter up to a point reflection, and how
steep edges are on their two sides tells the reflection. Sets of trusted images are blurred by random filters, a
small network learns to tell the filter from such traces, and it is then shown each class of the suspicious set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eclipse_ray.config import content_hash

SIDE = 5
"""Taps along each side of a filter. Its largest tap is in the middle, so 3 x 3 taps fit wherever that was."""
WINDOW, INSET = 32, 3
"""Central pixels that are looked at, and those of their border that are not: a poison may have padded it."""
NARROWEST = 24
"""Pixels along each side that an image needs."""
SETS = 4000
"""Sets of trusted images that are blurred for the network to learn from."""
SET_IMAGES = (40, 160)
"""Fewest and most images of such a set."""
FEWEST_TRUSTED = 100
"""Trusted images without which no filter is looked for."""
FEWEST_PIXELS = 200 * 32 * 32
"""Pixels that the images of a class need together."""
FOUND = 0.35
"""Distance from the identity, L2 over the taps, from which on a class counts as filtered."""
SURE = 0.15
"""Largest error on blurred sets of trusted images with which the network is believed, in the same unit."""
NOISE = 0.02
"""Power of the noise relative to the image in Wiener's filter: what the blur took wholly is not brought back."""
RIM = 2
"""Pixels of the border that are replaced by their neighbours: what was blurred into them is not known."""
SUPPORT = 8
"""Pixels by which an image is mirrored beyond its border before its filter is undone."""

STEPS, BATCH, RATE = 1500, 256, 1e-3
REACH = 4
LAGS = [(down, right) for down in range(REACH + 1) for right in range(-REACH, REACH + 1) if (down, right) > (0, 0)]
DERIVATIVES = (
    ((0, 0, 0), (0, -1, 1), (0, 0, 0)),
    ((0, 0, 0), (0, -1, 0), (0, 1, 0)),
    ((0, 0, 0), (0, -1, 0), (0, 0, 1)),
    ((0, 0, 0), (0, 0, 1), (0, -1, 0)),
    ((0, -1, 0), (-1, 4, -1), (0, -1, 0)),
)
HIGHEST = 4.0
"""Derivatives beyond this many standard deviations are cut: single edges would decide fourth moments."""

Told = Callable[[int], None]
Estimate = Callable[[Tensor], Tensor]
"""From the traces of images to the filter that they went through."""


def find_filters(
    trusted: Tensor, suspicious: Tensor, labels: Tensor, seed: int, sets: int, told: Told
) -> dict[int, Tensor] | None:
    """Return the filter, float32 (SIDE, SIDE) of sum 1, of each class of `suspicious` that went through one.

    Images are uint8 (N, H, W, 3), `labels` (N,) those of the suspicious ones; a filter is a correlation. `sets`
    sets of trusted images are made, and `told` hears after each how many there are. Returns None if it cannot be
    told: with too few trusted images, too small ones, or a network that is not SURE.
    """
    if len(trusted) < FEWEST_TRUSTED or min(*trusted.shape[1:3], *suspicious.shape[1:3]) < NARROWEST:
        return None
    threads = torch.get_num_threads()
    # Each step is so small that threads would wait for each other, for most of the time on busy cores.
    torch.set_num_threads(1)
    try:
        return _find(suspicious, labels, _learn(trusted, seed, sets, told))
    finally:
        torch.set_num_threads(threads)


def _find(suspicious: Tensor, labels: Tensor, estimate: Estimate | None) -> dict[int, Tensor] | None:
    if estimate is None:
        return None
    found = {}
    for label in sorted(set(labels.tolist())):
        images = suspicious[labels == label]
        taps = estimate(traces(_gray(images)))
        pixels = len(images) * images.shape[1] * images.shape[2]
        if pixels >= FEWEST_PIXELS and float((taps - identity()).norm()) >= FOUND:
            found[label] = taps / taps.sum()
    return found


def undo_filters(images: Tensor, taps: Tensor) -> Tensor:
    """Return uint8 images (B, H, W, 3) without their filters `taps`, float32 (B, SIDE, SIDE), by Wiener's filter.

    The border of RIM pixels repeats the pixels next to it. Sides are at least NARROWEST.
    """
    inner = images.permute(0, 3, 1, 2).to(torch.float32)[:, :, RIM:-RIM, RIM:-RIM]
    inner = F.pad(inner, (SUPPORT + RIM,) * 4, mode="reflect")
    height, width = inner.shape[2:]
    placed = F.pad(taps.to(inner.device), (0, width - SIDE, 0, height - SIDE)).roll((-(SIDE // 2),) * 2, (1, 2))
    # A correlation's transfer function is the conjugate; the factor keeps brightness.
    transfer = torch.fft.rfft2(placed).conj()
    inverse = (1 + NOISE) * transfer.conj() / (transfer.abs().square() + NOISE)
    sharp = torch.fft.irfft2(torch.fft.rfft2(inner) * inverse[:, None], s=(height, width))
    edge = SUPPORT + RIM
    sharp = F.pad(sharp[:, :, edge:-edge, edge:-edge], (RIM,) * 4, mode="replicate")
    return sharp.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def undo_known(images: Tensor, filters: Mapping[str, Tensor]) -> Tensor:
    """Return uint8 images (B, H, W, 3) without the filters that `filters` names by content hash; others stay."""
    if not filters:
        return images
    taps = [filters.get(content_hash(image)) for image in images.cpu().numpy()]
    rows = [row for row, found in enumerate(taps) if found is not None]
    if not rows:
        return images
    result = images.clone()
    result[rows] = undo_filters(images[rows], torch.stack([found for found in taps if found is not None]))
    return result


def identity() -> Tensor:
    """Return the filter that changes nothing, float32 (SIDE, SIDE)."""
    taps = torch.zeros(SIDE, SIDE)
    taps[SIDE // 2, SIDE // 2] = 1
    return taps


def _learn(trusted: Tensor, seed: int, sets: int, told: Told) -> Estimate | None:
    """Return a function from traces to taps, or None if it is not `SURE` about sets that it did not learn from."""
    generator = torch.Generator().manual_seed(seed)
    rows, answers = _examples(_gray(trusted), sets, generator, told)
    mean, deviation = rows.mean(0), rows.std(0) + 1e-6

    def scaled(values: Tensor) -> Tensor:
        return ((values - mean) / deviation).clamp(-6, 6)

    held = sets // 10
    if held < 2:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _fit(scaled(rows[held:]), answers[held:])

    def estimate(found: Tensor) -> Tensor:
        with torch.inference_mode():
            taps: Tensor = network(scaled(found)).view(*found.shape[:-1], SIDE, SIDE)
        return taps.clone()

    error = (estimate(rows[:held]).flatten(1) - answers[:held]).square().sum(1).mean().sqrt()
    return estimate if error <= SURE else None


def _fit(rows: Tensor, answers: Tensor) -> nn.Module:
    width = 256
    network = nn.Sequential(
        *(nn.Linear(rows.shape[1], width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, width), nn.SiLU()),
        nn.Linear(width, SIDE * SIDE),
    )
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(rows), (BATCH,))
        loss = (network(rows[chosen]) - answers[chosen]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        # Without it a high rate can end with a network that says the same of everything.
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def _examples(images: Tensor, sets: int, generator: torch.Generator, told: Told) -> tuple[Tensor, Tensor]:
    """Return the traces (sets, F) of blurred sets of `images`, (N, H, W), and their filters (sets, SIDE**2).

    Every second set is of images that look alike, as those of a class do.
    """
    look = F.adaptive_avg_pool2d(images[:, None], 4).flatten(1)
    rows, answers = [], []
    for done in range(sets):
        count = int(torch.randint(*SET_IMAGES, (), generator=generator))
        if done % 2:
            anchor = int(torch.randint(len(images), (), generator=generator))
            chosen = images[(look - look[anchor]).norm(dim=1).argsort()[:count]]
        else:
            chosen = images[torch.randperm(len(images), generator=generator)[:count]]
        if torch.rand((), generator=generator) < 0.5:
            chosen = chosen.flip(2)
        taps = random_filter(generator)
        blurred = F.conv2d(F.pad(chosen[:, None], (SIDE // 2,) * 4, mode="reflect"), taps[None, None])[:, 0]
        # Stored in 8 bits, as bright as it gets: the network must not learn from the precision of floats.
        brightest = blurred.amax((1, 2), keepdim=True).clamp_min(1e-3)
        rows.append(traces((blurred / brightest * 255).round() / 255))
        answers.append(taps.flatten())
        told(done + 1)
    return torch.stack(rows), torch.stack(answers)


def random_filter(generator: torch.Generator) -> Tensor:
    """Return a random blur (SIDE, SIDE) of sum 1: none, a Gaussian of any direction, or 3 x 3 taps."""
    kind = float(torch.rand((), generator=generator))
    if kind < 0.1:
        return identity()
    if kind < 0.4:
        angle, wide, high = torch.rand(3, generator=generator).tolist()
        places = torch.arange(SIDE) - SIDE // 2
        down, right = torch.meshgrid(places.float(), places.float(), indexing="ij")
        cosine, sine = math.cos(math.pi * angle), math.sin(math.pi * angle)
        along, across = right * cosine + down * sine, down * cosine - right * sine
        taps = torch.exp(-((along / (0.25 + wide)) ** 2 + (across / (0.25 + high)) ** 2) / 2)
        return taps / taps.sum()
    small = (torch.rand(9, generator=generator) * 0.45 - 0.05) * torch.rand(1, generator=generator).sqrt()
    largest = int(torch.randint(9, (), generator=generator))
    small[largest] = 1
    return recentred(small.view(3, 3))


def recentred(taps: Tensor) -> Tensor:
    """Return 3 x 3 `taps` as (SIDE, SIDE) of sum 1 with the largest in the middle, which only shifts the image."""
    down, right = divmod(int(taps.argmax()), 3)
    wide = torch.zeros(7, 7)
    wide[3 - down : 6 - down, 3 - right : 6 - right] = taps
    return wide[1:-1, 1:-1] / taps.sum()


def _gray(images: Tensor) -> Tensor:
    """Return the central WINDOW of uint8 images (N, H, W, 3) as gray values (N, h, w) in [0, 1]."""
    height, width = images.shape[1:3]
    top, left = max(0, height - WINDOW) // 2, max(0, width - WINDOW) // 2
    return images[:, top : top + WINDOW, left : left + WINDOW].float().mean(-1) / 255


def traces(images: Tensor) -> Tensor:
    """Return what a filter leaves in gray images (N, h, w), as means over them: (F,).

    The cepstrum, to which a filter adds its own; and third and fourth moments of neighbouring derivatives. Their
    antisymmetric parts change sign with a point reflection.
    """
    inner = images[:, INSET:-INSET, INSET:-INSET]
    inner = inner - inner.mean((1, 2), keepdim=True)
    inner = inner / (inner.std((1, 2), keepdim=True) + 0.05)
    height, width = inner.shape[1:]
    fade = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(width, periodic=False)
    power = torch.fft.fft2(inner * fade).abs().square().mean(0)
    cepstrum = torch.fft.ifft2(power.clamp_min(1e-12).log()).real
    kernels = torch.tensor(DERIVATIVES, dtype=torch.float32)[:, None]
    slopes = F.conv2d(inner[:, None], kernels)
    slopes = slopes / slopes.square().mean((0, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
    moments = _moments(slopes.clamp(-HIGHEST, HIGHEST))
    return torch.cat([torch.stack([cepstrum[place] for place in LAGS]), *moments])


def _moments(slopes: Tensor) -> Iterator[Tensor]:
    """Yield moments of derivatives (N, D, h, w) and their neighbours at LAGS, each as (LAGS x D,)."""
    height, width = slopes.shape[2:]
    room = (height + REACH, width + REACH)
    first, second, third = (torch.fft.rfft2(slopes**power, s=room) for power in (1, 2, 3))
    for one, other in ((third, first), (second, first), (second, second)):
        # Sums over all places of one value and its neighbour's, for every lag at once.
        sums = torch.fft.irfft2((one.conj() * other).mean(0), s=room) / (height * width)
        ahead = torch.stack([sums[:, down, right] for down, right in LAGS])
        behind = torch.stack([sums[:, -down, -right] for down, right in LAGS])
        yield (ahead - behind).flatten()
        yield (ahead + behind).flatten()
