"""What a purification did, first for the owner of the data: images, classes, failures, cost; then the theory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from eclipse_ray.datasets.images import centre_crop, encode_image, resize_image
from eclipse_ray.diffusion.sampling import absorb, to_model_range, to_uint8
from eclipse_ray.log import counted
from eclipse_ray.progress import duration, volume
from eclipse_ray.quality import EQUAL_PSNR
from eclipse_ray.reports.blocks import (
    Block,
    Chart,
    Charts,
    Facts,
    Gallery,
    Picture,
    Pixels,
    Section,
    Slider,
    Specimen,
    Table,
    Text,
)
from eclipse_ray.reports.charts import AMPLIFY, DASHES, LIGHT, amplified, draw, image_grid, lines
from eclipse_ray.reports.folder import Floats, Noise, Purification, Sample, spread

COLUMNS = 8
"""Images of the gallery."""
LARGEST = 128
"""Of larger images the gallery shows the central square of this side, because a perturbation changes pixels."""
SLIDER_SIDE = 160
"""Larger images are reduced to a square of this side under the slider."""
CLASSES_SHOWN = 100
REASONS_SHOWN = 20
"""At most this many classes and reasons of failure are listed."""


def sections(run: Purification) -> list[Section]:
    """Return the sections on a purification, the first ones for the owner of the data."""
    return [changed(run), *classes(run), *failures(run), *pictures(run), theory(run)]


def facts(run: Purification, quality: Sequence[str] = ()) -> Facts:
    """Return the first page: what was done, is it still good (after the sentences `quality`), and so on."""
    noise = run.noise
    steps = counted(noise.num_inference_steps, "step")
    left = run.planned - run.ok - run.failed
    end = f", and {left:,} are still to be done: the run is not finished" if left else ""
    failed = f"{run.failed:,} failed" if run.failed else "none failed"
    how = (
        f"They were noised to t_star = {noise.t_star:,} of {len(noise.alphas_cumprod):,} and denoised in {steps} "
        f"({noise.sampler}); compensation: {run.config.compensation.mode}."
    )
    done = f"{run.ok:,} of {run.planned:,} images were purified, {failed}{end}."
    over = [f"Of the source, {run.passed_over}."] if run.passed_over else []
    good = [*quality, *_likeness(run), *_perturbation(run)] or ["No image could be compared with what it was."]
    return Facts(
        [
            ("What was done?", [done, how, *over]),
            ("Is it still good?", good),
            ("What changed most and least?", _extremes(run) or ["No image could be compared."]),
            ("What failed?", [_failed(run)]),
            ("What did it cost?", _cost(run)),
        ]
    )


def _likeness(run: Purification) -> list[str]:
    psnr, ssim = _values(run, "psnr"), _values(run, "ssim")
    if not len(psnr):
        return []
    half = f"{np.median(psnr):.1f} dB PSNR" + (f" and {np.median(ssim):.2f} SSIM" if len(ssim) else "")
    return [
        f"Half of the images keep at least {half} to what they were; one in twenty has less than "
        f"{np.quantile(psnr, 0.05):.1f} dB ({_of(run)})."
    ]


def _perturbation(run: Purification) -> list[str]:
    if not run.paired:
        return []
    before, after = _perturbations(run.paired)
    return [
        f"Of the perturbation, {100 * part_left(after, before):.0f} % is left in {len(before):,} sampled images "
        "(least-squares fit)."
    ]


def _extremes(run: Purification) -> list[str]:
    def words(sample: Sample) -> str:
        label = run.class_name(sample.label)
        return f"{sample.id}{f' ({label})' if label else ''}, {_decibels(sample.psnr)}"

    ends = (("Most", run.most), ("Least", run.least))
    return [f"{name}: {words(samples[0])}." for name, samples in ends if samples]


def _failed(run: Purification) -> str:
    if not run.failed:
        return "Every image that was tried could be purified."
    (reason, _), *_ = Counter(failure.error for failure in run.failures).most_common(1)
    share = 100 * run.failed / max(run.planned, 1)
    images = counted(run.failed, "image")
    return f"{images} ({share:.2f} % of the plan); the most frequent reason: {reason.rstrip('.')}."


def _cost(run: Purification) -> list[str]:
    images = run.ok + run.failed
    if not images:
        return ["No shard is committed yet."]
    seconds = sum(status.seconds for status in run.done)
    committed = [shard for shard in run.plan.shards if shard.name in run.statuses]
    # Several shards may lie in one object of the source.
    read = {span.key: span.size for shard in committed for span in shard.spans}
    return [
        f"{1000 * seconds / images:,.1f} core-seconds per 1,000 images, {duration(seconds)} in all.",
        f"{volume(sum(read.values()))} in, {volume(sum(status.bytes for status in run.done))} out.",
    ]


def _of(run: Purification) -> str:
    count = len(_values(run, "psnr"))
    return f"all {counted(count, 'image')}" if count == run.ok else f"{count:,} of {counted(run.ok, 'image')}"


def _values(run: Purification, name: str) -> Floats:
    values: Floats = run.changes[name].drop_null().to_numpy().astype(np.float64)
    return values


def _decibels(value: float) -> str:
    return "not changed" if value >= EQUAL_PSNR else f"{value:.1f} dB"


def changed(run: Purification) -> Section:
    """Return the section on how far images were changed, with the most and the least changed under a slider."""
    psnr, ssim = _values(run, "psnr"), _values(run, "ssim")
    blocks: list[Block] = [Text(note, note=True) for note in run.notes]
    if not len(psnr):
        return Section("changed", "Which images changed", [*blocks, Text("There is no image to show.")])
    for name, samples in (("most", run.most), ("least", run.least)):
        if samples:
            caption = f"The {len(samples)} {name} changed images"
            blocks.append(Slider(name, caption, [_compared(sample, run) for sample in samples]))
    charts = [_histogram("changes-psnr", np.minimum(psnr, 60), "PSNR, dB", _of(run))]
    charts += [_histogram("changes-ssim", ssim, "SSIM", _of(run))] if len(ssim) else []
    return Section("changed", "Which images changed", [*blocks, Charts(charts)])


def _compared(sample: Sample, run: Purification) -> Specimen:
    def shown(image: np.ndarray, words: str) -> Pixels:
        large = max(image.shape[:2]) > SLIDER_SIDE
        return _pixels(resize_image(image, SLIDER_SIDE) if large else image, words, sample.id)

    label = run.class_name(sample.label)
    versions = [shown(sample.before, "before"), shown(sample.after, "after")]
    return Specimen(sample.id, label, versions, _decibels(sample.psnr))


def _histogram(name: str, values: Floats, words: str, of: str) -> Chart:
    def paint(axes: Axes) -> None:
        axes.hist(values, bins=min(40, 4 + len(values) // 4), color=LIGHT.series[0])
        axes.axvline(float(np.median(values)), color=LIGHT.series[1], linestyle=DASHES[1], label="median")
        axes.set(xlabel=f"{words}, after against before", ylabel="images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    alt = f"{words}: median {middle:.3g}, nine of ten images between {low:.3g} and {high:.3g}."
    return draw(name, alt, f"{alt} ({of})", paint)


def classes(run: Purification) -> list[Section]:
    """Return the section with one row per class, the most changed first; none for images without labels."""
    sums = run.changes.group_by("label").aggregate(
        [("id", "count"), ("psnr", "count"), ("psnr", "mean"), ("ssim", "mean")]
    )
    found = sorted(sums.to_pylist(), key=lambda row: (row["psnr_mean"] is None, row["psnr_mean"], row["label"]))
    if all(row["label"] is None for row in found):
        return []
    rows = [
        [
            run.class_name(row["label"]) or "unknown",
            f"{row['psnr_count']:,}",
            f"{row['id_count'] - row['psnr_count']:,}",
            "-" if row["psnr_mean"] is None else f"{row['psnr_mean']:.1f}",
            "-" if row["ssim_mean"] is None else f"{row['ssim_mean']:.3f}",
        ]
        for row in found
    ]
    first = f", the first {CLASSES_SHOWN} of {len(rows):,}" if len(rows) > CLASSES_SHOWN else ""
    caption = f"Classes, the most changed first{first} ({_of(run)})"
    head = ["class", "images", "failed", "mean PSNR, dB", "mean SSIM"]
    return [Section("classes", "Classes", [Table(caption, head, rows[:CLASSES_SHOWN])])]


def failures(run: Purification) -> list[Section]:
    """Return the section that lists images which could not be purified; none if all could."""
    if not run.failed:
        return []
    reasons = Counter(failure.error for failure in run.failures).most_common(REASONS_SHOWN)
    shown = f"the first {len(run.failures):,}" if len(run.failures) < run.failed else f"{run.failed:,}"
    rows = [[failure.id, failure.key, failure.error] for failure in run.failures]
    blocks: list[Block] = [
        Text("All are in _eclipse/errors/. Mend them in the source, then run purify again with --retry-failed."),
        Table("Reasons", ["reason", "images"], [[reason, f"{count:,}"] for reason, count in reasons]),
        Table(f"Failed images ({shown})", ["image", "file in the source", "reason"], rows, numeric=False),
    ]
    return [Section("failures", "Failed images", blocks)]


def pictures(run: Purification) -> list[Section]:
    """Return the section that shows a few images in all their versions, enlarged when chosen; none without any."""
    chosen = _of_many_classes(run.paired or run.samples, COLUMNS)
    if not chosen:
        return []
    versions = [_versions(sample, run) for sample in chosen]
    specimens = [
        Specimen(s.id, run.class_name(s.label), [_pixels(image, name, s.id) for name, image in each.items()])
        for s, each in zip(chosen, versions, strict=True)
    ]
    large = any(max(sample.before.shape[:2]) > LARGEST for sample in chosen)
    crop = f" Of larger images the central {LARGEST} × {LARGEST} pixels are shown." if large else ""
    unknown = (
        "" if run.paired else " No clean copies of these images are known, as is usual for data from elsewhere."
    )
    caption = f"Differences are enlarged {AMPLIFY} times around mid-gray.{unknown}{crop} Choose one to enlarge it."
    return [Section("pictures", "Samples", [Gallery(caption, list(versions[0]), specimens)])]


def _versions(sample: Sample, run: Purification) -> dict[str, np.ndarray]:
    before, after = _crop(sample.before), _crop(sample.after)
    noised = _noised(before, sample.id, run, run.noise.t_star)
    if sample.clean is None:
        change = amplified(after, before)
        return {"source": before, "noised": noised, "purified": after, f"change ×{AMPLIFY}": change}
    clean = _crop(sample.clean)
    return {
        "clean": clean,
        "poisoned": before,
        "noised": noised,
        "purified": after,
        f"perturbation ×{AMPLIFY}": amplified(before, clean),
        f"left ×{AMPLIFY}": amplified(after, clean),
    }


def _crop(image: np.ndarray) -> np.ndarray:
    return centre_crop(image, min(LARGEST, *image.shape[:2])) if max(image.shape[:2]) > LARGEST else image


def _noised(image: np.ndarray, id: str, run: Purification, depth: int) -> np.ndarray:
    x = to_model_range(torch.from_numpy(image[None].copy()))
    alphas = torch.from_numpy(run.noise.alphas_cumprod)
    noised: np.ndarray = to_uint8(absorb(x, alphas, depth, run.config.run.seed, [id])).numpy()[0]
    return noised


def _pixels(image: np.ndarray, words: str, id: str) -> Pixels:
    height, width = image.shape[:2]
    return Pixels(encode_image(image, "png"), width, height, f"{words}: {id}")


def _of_many_classes(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return `count` samples of as many different labels as possible, in their order."""
    first = {sample.label: index for index, sample in reversed(list(enumerate(samples)))}
    places = sorted(first.values())[:count]
    others = [index for index in range(len(samples)) if index not in places]
    places += [others[index] for index in spread(len(others), count - len(places))]
    return [samples[index] for index in sorted(places)]


DEPTHS = (25, 50, 100, 200, 400)
CURVE_POINTS = 200
SMALLEST_SHOWN = (0.05 * 2 / 255) ** 2
"""The power on [-1, 1] of a twentieth of a grey level; spectra are not drawn below it."""
PAPER_SQUARED_NORM = 2.0**2
"""|delta|^2 on [-1, 1] of a perturbation of L2 norm 1 on [0, 1], such as the paper's AR (arXiv 2406.15093)."""


def theory(run: Purification) -> Section:
    """Return the section for researchers: power spectra before and after, an image under noise, and its bound."""
    blocks: list[Block] = [Text(run.noise.note, note=True)] if run.noise.note else []
    changes = _changes(run)
    charts = [_spectrum(changes)] if changes else []
    charts.append(
        _bound_chart(run.noise, [float(np.vdot(delta, delta)) for delta in changes.get("perturbation", [])])
    )
    at = float(kl_nats(PAPER_SQUARED_NORM, run.noise.alphas_cumprod)[run.noise.t_star - 1])
    bound = (
        "Noise alone hides nothing from an ideal observer. A poisoned image noised to depth t and its clean copy "
        "are Gaussians whose divergence is KL = ᾱ ‖δ‖² / (2 (1 − ᾱ)) nats, summed over all pixels, δ on [−1, 1]. "
        "It bounds from above how far the noised datasets are apart. But it is a bound: "
        f"at t_star = {run.noise.t_star:,} it is still {at:,.0f} nats for a perturbation of norm 1, such as the "
        "paper's AR. The noise lets the denoiser drop the perturbation; it does not erase it."
    )
    chosen = _of_many_classes(run.paired or run.samples, 1)
    strip = [_strip(chosen[0], run)] if chosen else []
    return Section("theory", "For researchers", [*blocks, Charts(charts), Text(bound), *strip])


def _strip(sample: Sample, run: Purification) -> Picture:
    alphas = run.noise.alphas_cumprod
    depths = sorted({min(depth, len(alphas)) for depth in (*DEPTHS, run.noise.t_star)})
    before = _crop(sample.before)
    images = [before, *(_noised(before, sample.id, run, depth) for depth in depths)]
    rows = {"image": images}
    if sample.clean is not None:
        rows[f"perturbation ×{AMPLIFY}"] = [amplified(image, _crop(sample.clean)) for image in images]
    heads = ["no noise"]
    for depth in depths:
        mark = "t_star:\n" if depth == run.noise.t_star else ""
        heads.append(f"{mark}t = {depth:,}\nσ = {255 / 2 * np.sqrt(1 - alphas[depth - 1]):.1f}/255")
    words = "One image under growing noise; σ is the standard deviation of the noise in grey levels."
    return Picture(f"{words} The perturbation vanishes in it by eye.", words, image_grid(rows, heads, ""))


def _perturbations(paired: Sequence[Sample]) -> tuple[list[Floats], list[Floats]]:
    """Return how far the samples are from their clean copies before and after purification, on [-1, 1]."""
    both = [(sample, sample.clean) for sample in paired if sample.clean is not None]
    return [difference(s.before, clean) for s, clean in both], [difference(s.after, clean) for s, clean in both]


def _changes(run: Purification) -> dict[str, list[Floats]]:
    if run.paired:
        return dict(zip(("perturbation", "residual after purification"), _perturbations(run.paired), strict=True))
    changes = [difference(sample.after, sample.before) for sample in run.samples]
    return {"change by purification": changes} if changes else {}


def _spectrum(changes: dict[str, list[Floats]]) -> Chart:
    rings = {name: radial_mean(power_spectrum(each)) for name, each in changes.items()}
    curves = {name: (each, np.maximum(mean, SMALLEST_SHOWN)) for name, (each, mean) in rings.items()}
    paint = lines(curves, yscale="log", xlabel="cycles per pixel", ylabel="mean power", xlim=(0, 0.5))
    words = "; ".join(
        f"{name}: strongest at {frequencies[int(np.argmax(mean))]:.2f} cycles per pixel"
        for name, (frequencies, mean) in rings.items()
    )
    caption = (
        "Mean power at each frequency, on the [−1, 1] scale, over all directions and channels. Compensation "
        "removes mainly low frequencies, diffusion high ones."
    )
    return draw("spectrum", f"Power against frequency. {words}.", caption, paint)


def _bound_chart(noise: Noise, norms: Sequence[float]) -> Chart:
    depths = np.unique(np.geomspace(1, len(noise.alphas_cumprod), CURVE_POINTS).astype(int))
    unit = kl_nats(1.0, noise.alphas_cumprod)[depths - 1]
    curves = {"these images (median)": (depths, float(np.median(norms)) * unit)} if norms else {}
    curves["norm 1 (paper's AR)"] = depths, PAPER_SQUARED_NORM * unit
    scales = {"xscale": "log", "yscale": "log", "ylim": (0.1, None)}
    paint = lines(curves, xlabel="depth t", ylabel="KL of one image, nats", **scales)
    caption = "Divergence of one noised image from its noised clean copy: an upper bound for the datasets."
    return draw("kl", "KL of one noised image against depth t, falling.", caption, paint)


def difference(images: np.ndarray, reference: np.ndarray) -> Floats:
    """Return `images` minus `reference`, both uint8 of one shape, on the [-1, 1] scale of the denoiser."""
    return (images.astype(np.float64) - reference.astype(np.float64)) * (2 / 255)


def kl_nats(squared_norm: float, alphas_cumprod: Floats) -> Floats:
    """Return KL(noised poisoned image || noised clean one) in nats at depths 1 .. T.

    Both are Gaussians of variance 1 - abar whose means differ by sqrt(abar) delta, so it is
    abar |delta|^2 / (2 (1 - abar)), summed over all pixels and channels; `squared_norm` is |delta|^2 on [-1, 1].
    """
    return alphas_cumprod * squared_norm / (2 * (1 - alphas_cumprod))


def part_left(after: Sequence[Floats], before: Sequence[Floats]) -> float:
    """Return the part of the perturbations `before` that is left in the residuals `after`, 1 for all of it.

    It is the coefficient of a least-squares fit of the residuals by the perturbations, over all images.
    """
    energy = sum(float(np.vdot(one, one)) for one in before)
    return sum(float(np.vdot(a, b)) for a, b in zip(after, before, strict=True)) / energy if energy else math.nan


def power_spectrum(changes: Sequence[Floats]) -> Floats:
    """Return the mean power (S, S) of (H, W, 3) changes; S is the shortest side, larger ones are cropped to it.

    Divided by the number of pixels, so that the mean over all frequencies is the mean square of a pixel.
    """
    side = min(min(change.shape[:2]) for change in changes)
    total = np.zeros((side, side))
    for change in changes:
        top, left = (change.shape[0] - side) // 2, (change.shape[1] - side) // 2
        planes = np.fft.fft2(change[top : top + side, left : left + side], axes=(0, 1))
        total += (np.abs(planes) ** 2).mean(axis=2) / side**2
    return total / len(changes)


def radial_mean(power: Floats) -> tuple[Floats, Floats]:
    """Return frequencies in cycles per pixel, up to 1/2, and the mean power of each ring of `power` (S, S)."""
    side = len(power)
    frequencies = np.fft.fftfreq(side)
    rings = np.rint(np.hypot(frequencies[:, None], frequencies[None, :]) * side).astype(int)
    count = side // 2 + 1
    kept = rings < count
    sums = np.bincount(rings[kept], weights=power[kept], minlength=count)
    sizes = np.bincount(rings[kept], minlength=count)
    return np.arange(count) / side, sums / sizes
