"""Is a dataset poisoned: what of an image changes when it is mirrored, the scores of that, and their verdict.

A view maps images to rows whose sign turns when the image is mirrored left to right. Where an image and its
mirror image are equally likely, as in photographs, such a row is as likely as its negative: the audit's null.

Each score has an effect, a tolerance, a p-value of an effect beyond it, and a null. The verdict has one p-value,
and says low or high frequency, class or sample.

A null distribution comes from relabelling: signs that turn with the mirror, or which of two sets a row is of. A
p-value is (1 + relabellings at least as extreme) / (1 + relabellings), which is valid for any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eclipse_ray.errors import InputError
from eclipse_ray.log import counted
from eclipse_ray.quality import LUMA

Verdict = Literal["clean", "poisoned"]
Frequency = Literal["low", "high"]
Scope = Literal["class", "sample"]

GRID = 8
"""Cells along each side in which low frequencies are looked at; sides are multiples of it."""
LAGS = 2
"""Largest distance, in pixels along each axis, over which the residual is correlated."""
BANDS = 6
"""Rings of radial frequency from 0 to half a cycle per pixel."""
CELL = 4
"""Frequencies along each axis that the convolution view averages."""
CHUNK = 256
"""Images looked at together: bounds the memory of intermediate values."""
FEW = 16
"""Images whose patches are laid out together."""
PATCHES = 8
"""Patches of an image that filters are made of."""
STRIDE = 2
"""Pixels between two places where a filter looks."""


@dataclass(frozen=True)
class Images:
    """A sample: uint8 `images` (N, 3, S, S), int64 `labels` (N) or None, what a denoiser made of them or None.

    S is a multiple of GRID. `denoised` must be mirrored when `images` are; see `auditing.Denoised`.
    """

    images: Tensor
    labels: Tensor | None
    denoised: Tensor | None = None

    def take(self, rows: Tensor) -> Images:
        """Return the images of these rows."""
        labels = None if self.labels is None else self.labels[rows]
        denoised = None if self.denoised is None else self.denoised[rows]
        return Images(self.images[rows], labels, denoised)

    def residual(self, rows: slice) -> Tensor:
        """Return the residual of some images, float32 (n, 3, S, S) in 1/255: what smoothing takes away."""
        images = self.images[rows].float()
        smooth = _blur(images) if self.denoised is None else self.denoised[rows].float()
        return images - smooth


def rows_of(sample: Images, view: Callable[[Images, slice], Tensor]) -> Tensor:
    """Return a view of all images, float32 (N, features), one chunk after another."""
    starts = range(0, len(sample.images), CHUNK)
    return torch.cat([view(sample, slice(start, start + CHUNK)) for start in starts])


def pattern(sample: Images, rows: slice) -> Tensor:
    """Return the odd part of the residual, left half, (n, 3 * S * S / 2)."""
    return _odd(sample.residual(rows)).flatten(1)


def coarse(sample: Images, rows: slice) -> Tensor:
    """Return the odd part of the image's means on a GRID x GRID grid."""
    return _odd(F.adaptive_avg_pool2d(sample.images[rows].float(), GRID)).flatten(1)


def colour(sample: Images, rows: slice) -> Tensor:
    """Return the odd part of what grayscale takes from the residual: red and blue less luma."""
    residual = sample.residual(rows)
    luma = (residual * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return _odd((residual - luma)[:, ::2]).flatten(1)


def autocorrelation(sample: Images, rows: slice) -> Tensor:
    """Return how correlations of neighbouring residuals, within and across channels, differ from the mirror's."""
    residual = sample.residual(rows)
    side = residual.shape[-1]
    inner = slice(LAGS, side - LAGS)
    core = residual[:, :, inner, inner].flatten(2)
    scale = core.square().sum(2)
    scale = (scale[:, :, None] * scale[:, None, :]).sqrt() + 1.0

    def correlation(down: int, right: int) -> Tensor:
        moved = residual[:, :, LAGS + down : side - LAGS + down, LAGS + right : side - LAGS + right]
        return torch.bmm(core, moved.flatten(2).transpose(1, 2)) / scale

    odd = []
    for right in range(1, LAGS + 1):
        level = correlation(0, right)
        odd.append((level - correlation(0, -right)).flatten(1))
        odd += [(correlation(down, right) - correlation(down, -right)).flatten(1) for down in range(1, LAGS + 1)]
    return torch.cat(odd, 1)


def convolution(sample: Images, rows: slice) -> Tensor:
    """Return how the logarithm of the image's power spectrum differs from the mirror's, in cells of CELL x CELL.

    What is added to an image hardly changes the strong part of its spectrum; a filter changes all of it.
    """
    luma = (sample.images[rows].float() * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1)
    side = luma.shape[-1]
    power = _power(torch.stack([luma, luma.flip(-1)], 1))
    power = torch.fft.fftshift(power, dim=2)[..., : side // 2]
    logs = F.avg_pool2d(power, CELL).clamp_min(1e-2).log()
    return (logs[:, 0] - logs[:, 1]).flatten(1)


VIEWS: dict[str, Callable[[Images, slice], Tensor]] = {
    "predictability": pattern,
    "coarse": coarse,
    "colour": colour,
    "autocorrelation": autocorrelation,
    "convolution": convolution,
}
"""Views whose sign turns with the mirror, by the name of the score that looks at them."""


def bands(sample: Images, rows: slice) -> Tensor:
    """Return the logarithm of the residual's energy in BANDS rings of radial frequency, (n, BANDS)."""
    side = sample.images.shape[-1]
    power = _power(sample.residual(rows)).sum(1)
    ring = (_radius(side) * 2 * BANDS).long().clamp_max(BANDS - 1)
    weights = F.one_hot(ring.flatten(), BANDS).float()
    weights /= weights.sum(0)
    return (power.flatten(1) @ weights).clamp_min(1e-3).log()


def random_filters(sample: Images, count: int, generator: torch.Generator, side: int = 5) -> Tensor:
    """Return `count` filters (count, 3, side, side): whitened random patches of the residual."""
    chosen = torch.randint(0, len(sample.images), (max(500, count),), generator=generator)
    residual = rows_of(sample.take(chosen), Images.residual)
    patches = []
    for _ in range(PATCHES):
        top, left = torch.randint(0, residual.shape[-1] - side + 1, (2,), generator=generator).tolist()
        patches.append(residual[:, :, top : top + side, left : left + side].flatten(1))
    mixed = torch.cat(patches)[torch.randperm(PATCHES * len(chosen), generator=generator)]
    mixed -= mixed.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(mixed.T @ mixed / len(mixed))
    whiten = vectors @ torch.diag((values.clamp_min(0) + 10.0).rsqrt()) @ vectors.T
    filters = mixed[:count] @ whiten
    filters = filters / filters.norm(dim=1, keepdim=True).clamp_min(1e-6) @ whiten
    return filters.view(count, 3, side, side)


def responses(residual: Tensor, filters: Tensor) -> Tensor:
    """Return what filters find in residuals (n, 3, S, S), both signs, in each quarter: (n, 8 * filters)."""
    side = filters.shape[-1]
    places = (residual.shape[-1] - side) // STRIDE + 1
    # A product of matrices, a few images at a time: convolutions of three channels are slow on a CPU.
    found = torch.cat(
        [filters.flatten(1) @ F.unfold(part, side, stride=STRIDE) for part in torch.split(residual, FEW)]
    )
    found = found.view(len(residual), len(filters), places, places)
    both = torch.cat([F.relu(found - 0.5), F.relu(-found - 0.5)], 1)
    return F.adaptive_avg_pool2d(both, 2).flatten(1)


def _odd(maps: Tensor) -> Tensor:
    odd = (maps - maps.flip(-1)) / 2
    return odd[..., : maps.shape[-1] // 2]


def _blur(images: Tensor) -> Tensor:
    taps = torch.exp(-0.5 * torch.arange(-2.0, 3.0).square())
    taps = (taps / taps.sum()).repeat(3, 1)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    across = F.conv2d(padded, taps.view(3, 1, 1, 5), groups=3)
    return F.conv2d(across, taps.view(3, 1, 5, 1), groups=3)


def _power(maps: Tensor) -> Tensor:
    window = torch.hann_window(maps.shape[-1], periodic=False)
    centred = maps - maps.mean((-2, -1), keepdim=True)
    return torch.fft.rfft2(centred * window[:, None] * window).abs().square()


def _radius(side: int) -> Tensor:
    down, right = torch.fft.fftfreq(side), torch.fft.rfftfreq(side)
    return (down[:, None].square() + right.square()).sqrt()


RIDGE = 0.3
"""Weight of the penalty, in mean squares of a feature."""


def fit_probe(rows: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Return a function from rows (n, d) to class scores (n, classes), fitted to `rows` and `labels` (N)."""
    centre = rows.mean(0)
    centred = rows - centre
    scale = float(centred.square().mean().sqrt()) or 1.0
    centred = centred / scale
    targets = F.one_hot(labels, classes).float()
    targets = targets - targets.mean(0)
    count, width = centred.shape
    penalty = RIDGE * count
    if width <= count:
        weights = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(width), centred.T @ targets)
    else:
        weights = centred.T @ torch.linalg.solve(centred @ centred.T + penalty * torch.eye(count), targets)
    return lambda others: (others - centre) / scale @ weights


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the score of each row's own class above the mean of all, (n)."""
    return scores.gather(1, labels[:, None])[:, 0] - scores.mean(1)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the part of rows whose own class scores highest, 0-1."""
    return float((scores.argmax(1) == labels).float().mean())


MIRROR = "within a class, an image and its mirror image are equally likely"
SAME = "the clean set is a sample of the same kind"

TOLERANCE = 0.05
"""Effects of the mirror up to this are taken for nature's, in root mean squares (docs/audit.md)."""
CLASS_MEAN_TOLERANCE = 0.002
"""Part of the odd residual's energy that class means may hold beyond chance."""
SAME_TOLERANCE = 0.1
"""Difference from the clean set, in standard deviations, that is taken for a difference of processing."""
FLIPS, MEAN_FLIPS, SWAPS = 9999, 1999, 1999
"""Relabellings of each kind of null."""
LEAST_IMAGES, LEAST_OF_CLASS = 100, 8
"""Fewer images, or fewer of two classes, cannot be audited."""
FILTERS = 48
"""Filters of the transfer score."""
LEARN_IMAGES, TEST_IMAGES = 2000, 1000
"""Most images that the transfer score learns from, and that it is tested on."""


@dataclass(frozen=True)
class Score:
    """One piece of evidence for the verdict; `detail` says for people what was seen."""

    name: str
    effect: float
    tolerance: float
    p_value: float
    null: str
    detail: str


def score_images(sample: Images, clean: Images | None, seed: int) -> list[Score]:
    """Return all scores of a labelled sample, with those that compare it with a clean set if there is one.

    Deterministic for one `seed` on one machine. Raises InputError for too few images or classes.
    """
    return [*mirror(sample, seed), *(compare(sample, clean, seed) if clean is not None else [])]


def mirror(sample: Images, seed: int) -> list[Score]:
    """Return the scores that need no clean set. Raises InputError for too few images or classes."""
    labels = check_labels(sample)
    generator = torch.Generator().manual_seed(seed)
    train, test = _halves(labels, generator)
    scores = []
    for name, view in VIEWS.items():
        rows = rows_of(sample, view)
        scores.append(_mirror(name, rows, labels, (train, test), generator))
        if name == "predictability":
            scores.append(_class_mean(rows, labels, generator))
    return scores


def compare(sample: Images, clean: Images, seed: int) -> list[Score]:
    """Is what a probe learns from half of a labelled sample worth more on the other half than on clean images?

    No score if these have no labels. Raises InputError for too few images.
    """
    labels = check_labels(sample)
    generator = torch.Generator().manual_seed(seed + 1)
    train, test = _halves(labels, generator)
    few = clean.take(torch.randperm(len(clean.images), generator=generator)[:TEST_IMAGES])
    if sample.labels is None or few.labels is None:
        return []
    # Labels of the clean set in the sample's renumbering; what is of no class of it is left out.
    found = torch.unique(sample.labels)
    numbers = torch.searchsorted(found, few.labels).clamp_max(len(found) - 1)
    known = found[numbers] == few.labels
    train, test = train[:LEARN_IMAGES], test[:TEST_IMAGES]
    filters = random_filters(sample, FILTERS, generator)

    def view(images: Images, rows: slice) -> Tensor:
        return responses(images.residual(rows), filters)

    learnt = rows_of(sample.take(train), view)
    centre, spread = learnt.mean(0), learnt.std(0) + 1e-6
    probe = fit_probe((learnt - centre) / spread, labels[train], int(labels.max()) + 1)
    own = probe((rows_of(sample.take(test), view) - centre) / spread)
    other, numbers = probe((rows_of(few, view) - centre) / spread)[known], numbers[known]
    detail = (
        f"a probe of local detail is right on {100 * accuracy(own, labels[test]):.1f} % of its own kind and "
        f"on {100 * accuracy(other, numbers):.1f} % of the clean set"
    )
    first, second = margins(own, labels[test]), margins(other, numbers)
    effect, p_value = two_samples(first, second, SAME_TOLERANCE, SWAPS, generator)
    return [Score("transfer", effect, SAME_TOLERANCE, p_value, SAME, detail)]


def _halves(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(labels), generator=generator)
    return order[: len(order) // 2], order[len(order) // 2 :]


def check_labels(sample: Images) -> Tensor:
    """Return the labels, renumbered from 0. Raises InputError unless there is enough to learn from."""
    if sample.labels is None:
        raise InputError("audit needs labels: a poison is what images of one label share; name their column")
    found, labels, counts = torch.unique(sample.labels, return_inverse=True, return_counts=True)
    if len(labels) < LEAST_IMAGES or len(found) < 2 or int(counts.min()) < LEAST_OF_CLASS:
        raise InputError(
            f"audit found {counted(len(labels), 'image')} of {counted(len(found), 'class')}, the smallest of "
            f"{int(counts.min())}; it needs {LEAST_IMAGES} images and two classes of {LEAST_OF_CLASS} or more"
        )
    return labels


def _mirror(
    name: str, rows: Tensor, labels: Tensor, halves: tuple[Tensor, Tensor], generator: torch.Generator
) -> Score:
    """Can a probe fitted to one half tell classes by what changes in the mirror? The other is turned at random."""
    train, test = halves
    # What all classes share, such as light from the left or a camera's own pattern, is no poison.
    odd = rows - rows[train].mean(0)
    classes = int(labels.max()) + 1
    found = fit_probe(odd[train], labels[train], classes)(odd[test])
    effect, p_value = sign_flips(margins(found, labels[test]), TOLERANCE, FLIPS, generator)
    right = 100 * accuracy(found, labels[test])
    detail = f"tells the class of {right:.1f} % of images by it, {100 / classes:.1f} % by chance"
    return Score(name, effect, TOLERANCE, p_value, MIRROR, detail)


def _class_mean(rows: Tensor, labels: Tensor, generator: torch.Generator) -> Score:
    odd = rows - rows.mean(0)
    effect, p_value = class_mean_flips(odd, labels, CLASS_MEAN_TOLERANCE, MEAN_FLIPS, generator)
    norms = [float(odd[labels == label].mean(0).norm()) for label in torch.unique(labels)]
    detail = f"L2 norms of class means {min(norms):.1f} to {max(norms):.1f}, in 1/255"
    return Score("class_mean", effect, CLASS_MEAN_TOLERANCE, p_value, MIRROR, detail)


RELABELLED_AT_ONCE = 500
"""Relabellings worked on at once."""


def p_of(observed: float, drawn: Tensor) -> float:
    """Return the one-sided p-value of a statistic among those `drawn` under the null."""
    return (1 + int((drawn >= observed).sum())) / (1 + len(drawn))


def sign_flips(values: Tensor, tolerance: float, count: int, generator: torch.Generator) -> tuple[float, float]:
    """Return (effect, p-value) of `values` (N) whose law is symmetric under the null.

    The effect is mean / root mean square. The p-value is of an effect beyond `tolerance`, which is in root mean
    squares: the values are first moved down by it.
    """
    size = float(values.square().mean().sqrt())
    if size == 0:
        return 0.0, 1.0
    moved = values / size - tolerance
    drawn = [moved @ signs for signs in _signs(len(values), count, generator)]
    return float(values.mean()) / size, p_of(float(moved.sum()), torch.cat(drawn))


def class_mean_flips(
    rows: Tensor, labels: Tensor, tolerance: float, count: int, generator: torch.Generator
) -> tuple[float, float]:
    """Return (effect, p-value) of the class means of `rows` (N, d), each row as likely as its negative.

    The effect is the part of the rows' energy that lies in class means, less what chance puts there; the p-value
    is of an effect beyond `tolerance`.
    """
    grams = _class_grams(rows, labels)
    drawn = []
    for signs in _signs(len(rows), count, generator):
        total = torch.zeros(signs.shape[1])
        for members, gram in grams:
            chosen = signs[members]
            total += (chosen * (gram @ chosen)).sum(0)
        drawn.append(total)
    observed = sum(float(gram.sum()) for _, gram in grams)
    return observed, p_of(observed - tolerance, torch.cat(drawn))


def class_mean_share(rows: Tensor, labels: Tensor) -> float:
    """Return the part of the energy of `rows` (N, d) in their class means, less what chance puts there."""
    return sum(float(gram.sum()) for _, gram in _class_grams(rows, labels))


def _class_grams(rows: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each class's members (N,) and inner products of its rows, whose sum is its share of all energy."""
    energy = max(float(rows.square().sum()), torch.finfo(rows.dtype).tiny)
    grams = []
    for label in torch.unique(labels):
        part = rows[labels == label]
        gram = part @ part.T
        # Signs leave the diagonal as it is: without it, the mean over all signs is 0.
        grams.append((labels == label, gram.fill_diagonal_(0) / max(1, len(part) - 1) / energy))
    return grams


def two_samples(
    first: Tensor, second: Tensor, tolerance: float, count: int, generator: torch.Generator
) -> tuple[float, float]:
    """Return (effect, p-value) of the mean of `first` (N) above that of `second` (M), exchangeable under the null.

    The effect is in standard deviations of both together; the p-value is of one beyond `tolerance`.
    """
    deviation = float(torch.cat([first - first.mean(), second - second.mean()]).square().mean().sqrt())
    if deviation == 0:
        return 0.0, 1.0
    both = torch.cat([first - tolerance * deviation, second]).double()
    # The difference of means grows with the sum of the first sample alone, for the sum of both is fixed.
    drawn = torch.stack(
        [both[torch.randperm(len(both), generator=generator)[: len(first)]].sum() for _ in range(count)]
    )
    observed = float(both[: len(first)].sum())
    return float(first.mean() - second.mean()) / deviation, p_of(observed, drawn)


def _signs(rows: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    for start in range(0, count, RELABELLED_AT_ONCE):
        size = min(RELABELLED_AT_ONCE, count - start)
        yield 2.0 * torch.randint(0, 2, (rows, size), generator=generator) - 1.0


LOW_SHARE = 0.4
"""Part of the class means' energy below 1/8 cycle per pixel from which a pattern is called low."""
COLOUR_SHARE = 0.02
"""Part of the colour residual's energy in class means from which a class shares a pattern: class-wise poisons
measured have 0.05 or more, sample-wise ones 0.005 or less."""
DRAWS = 20
"""Permutations of labels that say how much energy class means have by chance."""


@dataclass(frozen=True)
class Finding:
    """A verdict, its p-value (Holm), and the kind of poison; None where nothing was found or it cannot be told."""

    verdict: Verdict
    p_value: float
    frequency: Frequency | None
    scope: Scope | None
    words: str


def judge(sample: Images, scores: Sequence[Score], alpha: float) -> Finding:
    """Return the verdict at the false positive rate `alpha` under the nulls of the scores."""
    adjusted = holm({score.name: score.p_value for score in scores})
    p_value = min(adjusted.values())
    found = [score for score in scores if adjusted[score.name] <= alpha]
    if not found:
        words = (
            f"Likely clean: no score is beyond its tolerance (p = {p_value:.2g}, corrected for {len(adjusted)} "
            "scores). A poison that respects the mirror and changes no statistic looked at stays unseen."
        )
        return Finding("clean", p_value, None, None, words)
    names = {score.name for score in found}
    frequency = _frequency(sample, names)
    scope = _scope(sample, names, {score.name: score.effect for score in scores})
    evidence = "; ".join(f"{score.name} (effect {score.effect:.2f}): {score.detail}" for score in found)
    words = f"Likely poisoned: {frequency} frequency, {scope}-wise (p = {p_value:.2g}). {evidence}."
    return Finding("poisoned", p_value, frequency, scope, words)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number: the largest chance that any at most as small one is false."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def _frequency(sample: Images, names: set[str]) -> Frequency:
    """Low where the patterns that classes share lie, for a large part, below 1/8 cycle per pixel; else high."""
    if not names & {"predictability", "class_mean", "coarse", "colour"}:
        return "high"
    labels = check_labels(sample)
    generator = torch.Generator().manual_seed(0)
    chance = [_low_and_all(sample, labels[torch.randperm(len(labels), generator=generator)]) for _ in range(DRAWS)]
    low, everything = _low_and_all(sample, labels)
    noise = torch.tensor([each[0] for each in chance]).square().mean().sqrt()
    return "low" if low > 3 * float(noise) and low > LOW_SHARE * everything else "high"


def _low_and_all(sample: Images, labels: Tensor) -> tuple[float, float]:
    """Return (low, all) energy that the class means of two halves of the sample have in common.

    Low is a radial frequency of up to 1/8 cycle per pixel. What is noise in one half cancels on average.
    """
    halves = torch.arange(len(labels)) % 2
    one, other = (class_means(sample, labels, halves == half) for half in (0, 1))
    shared = (torch.fft.rfft2(one) * torch.fft.rfft2(other).conj()).real
    side = one.shape[-1]
    # Of frequencies of a real image that come twice, rfft2 keeps one.
    weight = torch.full((side // 2 + 1,), 2.0)
    weight[0] = weight[-1] = 1.0
    shared = (shared * weight).sum((0, 1))
    return float(shared[_radius(side) <= 1 / 8].sum()), float(shared.sum())


def class_means(sample: Images, labels: Tensor, chosen: Tensor) -> Tensor:
    """Return the odd part of each class's mean image less the mean of all classes, float32 (C, 3, S, S)."""
    means = torch.stack(
        [sample.images[chosen & (labels == label)].float().mean(0) for label in range(int(labels.max()) + 1)]
    )
    odd = (means - means.flip(-1)) / 2
    return odd - odd.mean(0)


def _scope(sample: Images, names: set[str], effects: dict[str, float]) -> Scope:
    """Class where its images share one pattern or one filter; else each image has a perturbation of its own."""
    # Natural images have little fine colour, so that a weak pattern of a class shows there first.
    rows = rows_of(sample, colour)
    share = class_mean_share(rows - rows.mean(0), check_labels(sample))
    shares_pattern = "class_mean" in names or share >= COLOUR_SHARE
    shares_filter = "convolution" in names and effects["convolution"] > effects["autocorrelation"]
    return "class" if shares_pattern or shares_filter else "sample"
