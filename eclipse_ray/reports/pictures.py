"""What purification does to single images: side by side, under growing noise, and by frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes

from eclipse_ray.datasets.images import encode_image
from eclipse_ray.diffusion.sampling import absorb, to_model_range, to_uint8
from eclipse_ray.reports.blocks import Block, Chart, Charts, Gallery, Note, Pixels, Section, Specimen, Strip, Text
from eclipse_ray.reports.charts import DASHES, Theme, draw, plain_numbers
from eclipse_ray.reports.folder import Noise, Purification, Sample, spread
from eclipse_ray.reports.measures import (
    AMPLIFY,
    Floats,
    amplified,
    bands_left,
    central_square,
    difference,
    kl_nats,
    paper_squared_norm,
    part_left,
    power_spectrum,
    radial_mean,
    share_below,
)

COLUMNS = 8
LARGEST = 128
"""Of larger images the central square of this side is shown, because a perturbation changes single pixels."""
CURVE_POINTS = 200
DEPTHS = (25, 50, 100, 200, 400)


def pictures(run: Purification) -> Section:
    """Return the section that shows a few images in all their versions."""
    notes: list[Block] = [Note(note) for note in run.samples.notes]
    chosen = _of_many_classes(run.samples.paired or run.samples.images, COLUMNS)
    if not chosen:
        return Section("pictures", "The images", [*notes, Text("There is no image to show.")])
    versions = [_versions(sample, run) for sample in chosen]
    gallery = Gallery(
        caption=_caption(chosen),
        rows=list(versions[0]),
        specimens=[
            Specimen(sample.id, sample.label, [_pixels(image, name, sample) for name, image in each.items()])
            for sample, each in zip(chosen, versions, strict=True)
        ],
    )
    return Section("pictures", "The images", [*notes, gallery], _leads(run))


def assimilation(run: Purification) -> Section:
    """Return the section that shows what the noise alone does to an image, and its limit."""
    chosen = _of_many_classes(run.samples.paired or run.samples.images, 1)
    blocks: list[Block] = [Note(run.noise.note)] if run.noise.note else []
    if chosen:
        blocks += _strip(chosen[0], run)
    deltas = [difference(sample.before, sample.clean) for sample in run.samples.paired if sample.clean is not None]
    return Section("assimilation", "Under the noise", [*blocks, *_bound(run.noise, deltas)])


def _versions(sample: Sample, run: Purification) -> dict[str, np.ndarray]:
    before, after = _shown(sample.before), _shown(sample.after)
    noised = _noised(before, sample.id, run, run.noise.t_star)
    if sample.clean is None:
        change = amplified(after, before)
        return {"source": before, "noised": noised, "purified": after, f"change ×{AMPLIFY}": change}
    clean = _shown(sample.clean)
    return {
        "clean": clean,
        "poisoned": before,
        "noised": noised,
        "purified": after,
        f"perturbation ×{AMPLIFY}": amplified(before, clean),
        f"left ×{AMPLIFY}": amplified(after, clean),
    }


def _caption(chosen: Sequence[Sample]) -> str:
    large = any(max(sample.before.shape[:2]) > LARGEST for sample in chosen)
    crop = f" Of larger images the central {LARGEST} × {LARGEST} pixels are shown." if large else ""
    if chosen[0].clean is None:
        return (
            "The same images as they came, noised to depth t_star, and purified; the change is enlarged "
            f"{AMPLIFY} times around mid-gray.{crop} Choose one to enlarge it."
        )
    return (
        "The same images clean, poisoned, noised to depth t_star, and purified. Below, what the poison added and "
        f"what differs from the clean image after purification, enlarged {AMPLIFY} times around mid-gray: "
        f"its structure should fade; lost detail shows as well.{crop} Choose one to enlarge it."
    )


def _leads(run: Purification) -> list[str]:
    paired = run.samples.paired
    if not paired:
        changes = [difference(sample.after, sample.before) for sample in run.samples.images]
        return [
            f"Purification changed a pixel by {_grey_levels(changes):.1f} grey levels of 255 on average (root "
            f"mean square of {len(changes):,} sampled images)."
        ]
    before = [difference(s.before, s.clean) for s in paired if s.clean is not None]
    after = [difference(s.after, s.clean) for s in paired if s.clean is not None]
    left = part_left(after, before)
    return [
        f"Of the perturbation, {100 * left:.0f} % is left in {len(paired):,} sampled images (least-squares fit); "
        f"they differ from their clean copies by {_grey_levels(before):.1f} grey levels of 255 before and "
        f"{_grey_levels(after):.1f} after purification (root mean square, lost detail included)."
    ]


def _grey_levels(changes: Sequence[Floats]) -> float:
    energy = sum(float(np.vdot(change, change)) for change in changes)
    return float(np.sqrt(energy / sum(change.size for change in changes))) * 255 / 2


def _strip(sample: Sample, run: Purification) -> list[Block]:
    alphas = run.noise.alphas_cumprod
    depths = sorted({min(depth, len(alphas)) for depth in (*DEPTHS, run.noise.t_star)})
    before = _shown(sample.before)
    noised = [_noised(before, sample.id, run, depth) for depth in depths]
    heads = [["no noise"]]
    for depth in depths:
        levels = 255 / 2 * np.sqrt(1 - alphas[depth - 1])
        mark = ["t_star:"] if depth == run.noise.t_star else []
        heads.append([*mark, f"t = {depth:,}", f"σ = {levels:.1f}/255"])
    rows = [("image", [_pixels(image, _at(i, depths), sample) for i, image in enumerate([before, *noised])])]
    if sample.clean is not None:
        clean = _shown(sample.clean)
        changes = [amplified(image, clean) for image in (before, *noised)]
        words = [f"perturbation {_at(i, depths)}, times {AMPLIFY}" for i in range(len(changes))]
        rows.append(
            (f"perturbation ×{AMPLIFY}", [_pixels(c, w, sample) for c, w in zip(changes, words, strict=True)])
        )
    caption = (
        "Absorbing: noise grows from left to right until the perturbation cannot be told from it by eye; t_star "
        "is the depth of this run. σ is the standard deviation of the noise in grey levels. The perturbation row "
        "shows noise and perturbation together."
    )
    return [Strip(caption if sample.clean is not None else caption.rpartition(" The")[0], heads, rows)]


def _at(index: int, depths: Sequence[int]) -> str:
    return f"noised to t = {depths[index - 1]}" if index else "without noise"


def _bound(noise: Noise, deltas: Sequence[Floats]) -> list[Block]:
    norms = [float(np.vdot(delta, delta)) for delta in deltas]
    at = float(kl_nats(1.0, noise.alphas_cumprod)[noise.t_star - 1])
    paper = f"{paper_squared_norm() * at:,.0f} nats"
    statement = (
        "Noise alone hides nothing from an ideal observer. A poisoned image noised to depth t and its clean copy "
        "are Gaussians whose divergence is KL = ᾱ ‖δ‖² / (2 (1 − ᾱ)) nats, summed over all pixels, δ on [−1, 1]. "
        "It falls as t grows, and it bounds from above how far the noised poisoned dataset is from the noised "
        f"clean one. But it is a bound: at t_star = {noise.t_star:,} it is still {paper} for a perturbation of "
        "norm 1, such as the paper's AR. The noise lets the denoiser drop the perturbation; it does not erase it."
    )
    blocks: list[Block] = [Text(statement)]
    if norms:
        low, middle, high = (at * value for value in np.quantile(norms, (0.05, 0.5, 0.95)))
        blocks.append(
            Text(
                f"Of the {len(norms):,} sampled images, the median is {middle:,.0f} nats at t_star, and nine of "
                f"ten lie between {low:,.0f} and {high:,.0f}."
            )
        )
    return [*blocks, _bound_chart(noise, norms, paper)]


def _bound_chart(noise: Noise, norms: Sequence[float], paper: str) -> Block:
    depths = np.unique(np.geomspace(1, len(noise.alphas_cumprod), CURVE_POINTS).astype(int))
    unit = kl_nats(1.0, noise.alphas_cumprod)[depths - 1]

    def paint(axes: Axes, theme: Theme) -> None:
        if norms:
            low, middle, high = np.quantile(norms, (0.05, 0.5, 0.95))
            axes.fill_between(depths, low * unit, high * unit, color=theme.series[0], alpha=0.25, linewidth=0)
            axes.plot(depths, middle * unit, color=theme.series[0], label="these images (median)")
        axes.plot(
            depths,
            paper_squared_norm() * unit,
            color=theme.series[1],
            linestyle=DASHES[1],
            label="norm 1 (paper's AR)",
        )
        axes.axvline(noise.t_star, color=theme.muted, linewidth=1, linestyle=":")
        axes.annotate(
            f" t_star = {noise.t_star:,}",
            (noise.t_star, 0.03),
            xycoords=("data", "axes fraction"),
            color=theme.muted,
        )
        axes.set(xscale="log", yscale="log", xlabel="depth t", ylabel="KL of one image, nats")
        axes.set_ylim(bottom=0.1)
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.legend()

    alt = f"KL of one noised image against depth t, falling; a perturbation of norm 1 still has {paper} at t_star."
    caption = "Divergence of one noised image from its noised clean copy: an upper bound for the datasets."
    caption += " The band holds nine of ten of these images." if norms else ""
    return draw("kl", alt, caption, paint)


def _noised(image: np.ndarray, id: str, run: Purification, depth: int) -> np.ndarray:
    x = to_model_range(torch.from_numpy(image[None].copy()))
    alphas = torch.from_numpy(run.noise.alphas_cumprod)
    noised: np.ndarray = to_uint8(absorb(x, alphas, depth, run.config.run.seed, [id])).numpy()[0]
    return noised


def _shown(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    return central_square(image, LARGEST) if side > LARGEST else image


def _pixels(image: np.ndarray, words: str, sample: Sample) -> Pixels:
    height, width = image.shape[:2]
    name = f"{sample.id}, {sample.label}" if sample.label else sample.id
    return Pixels(encode_image(image, "png"), width, height, f"{words}: {name}")


def _of_many_classes(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return `count` samples of as many different labels as possible, in their order."""
    first: dict[str, int] = {}
    for index, sample in enumerate(samples):
        first.setdefault(sample.label, index)
    places = list(first.values())[:count]
    others = [index for index in range(len(samples)) if index not in places]
    places += [others[index] for index in spread(len(others), count - len(places))] if len(places) < count else []
    return [samples[index] for index in sorted(places)]


LOW = 0.125
"""A frequency below this many cycles per pixel is low: its waves are longer than 8 pixels."""
SMALLEST_SHOWN = (0.05 * 2 / 255) ** 2
"""The power on [-1, 1] of a twentieth of a grey level; spectra are not drawn below it."""


def spectra(run: Purification) -> Section:
    """Return the section on power spectra of the perturbation and of what is left after purification."""
    title = "Frequencies"
    changes = _changes(run)
    if not changes:
        return Section("spectra", title, [Text("There is no image to measure.")])
    power = {name: power_spectrum(each) for name, each in changes.items()}
    first = next(iter(power))
    low = share_below(power[first], LOW)
    where = "mostly low frequencies" if low > 0.5 else "mostly high frequencies"
    count = len(next(iter(changes.values())))
    lead = (
        f"The {first} has {where}: {100 * low:.0f} % of its power lies below {LOW:g} cycles per pixel "
        f"({count:,} sampled images)."
    )
    if len(changes) > 1:
        before, after = changes.values()
        low_left, high_left = bands_left(after, before, LOW)
        lead += (
            f" Of the part below, {100 * low_left:.0f} % is left after purification, of the part above "
            f"{100 * high_left:.0f} %."
        )
    blocks: list[Block] = [
        Text(
            f"{lead} Low-frequency poisons are removed mainly by compensation (grayscale and noise while the "
            "victim trains), high-frequency ones by diffusion itself."
        ),
        _curves(power),
        Charts(_maps(power)),
    ]
    return Section("spectra", title, blocks, [lead])


def _changes(run: Purification) -> dict[str, list[Floats]]:
    paired = [(s.before, s.after, s.clean) for s in run.samples.paired if s.clean is not None]
    if paired:
        return {
            "perturbation": [difference(before, clean) for before, _, clean in paired],
            "residual after purification": [difference(after, clean) for _, after, clean in paired],
        }
    samples = run.samples.images
    return {"change by purification": [difference(s.after, s.before) for s in samples]} if samples else {}


def _curves(power: Mapping[str, Floats]) -> Chart:
    rings = {name: radial_mean(each) for name, each in power.items()}

    def paint(axes: Axes, theme: Theme) -> None:
        for index, (name, (frequencies, mean)) in enumerate(rings.items()):
            shown = np.maximum(mean, SMALLEST_SHOWN)
            axes.plot(frequencies, shown, color=theme.series[index], linestyle=DASHES[index], label=name)
        axes.set(yscale="log", xlabel="cycles per pixel", ylabel="mean power", xlim=(0, 0.5))
        plain_numbers(axes.yaxis)
        axes.legend(loc="best")

    words = "; ".join(
        f"{name}: strongest at {frequencies[int(np.argmax(mean))]:.2f} cycles per pixel"
        for name, (frequencies, mean) in rings.items()
    )
    caption = "Mean power at each frequency, on the [−1, 1] scale, over all directions and channels."
    return draw("spectrum", f"Power against frequency. {words}.", caption, paint)


def _maps(power: Mapping[str, Floats]) -> list[Chart]:
    logs = {name: np.log10(np.maximum(each, SMALLEST_SHOWN)) for name, each in power.items()}
    low, high = min(float(each.min()) for each in logs.values()), max(float(each.max()) for each in logs.values())

    def chart(index: int, name: str) -> Chart:
        def paint(axes: Axes, theme: Theme) -> None:
            shown = axes.imshow(logs[name], cmap="cividis", vmin=low, vmax=high, extent=(-0.5, 0.5, -0.5, 0.5))
            axes.grid(visible=False)
            axes.set(xlabel="cycles per pixel, across", ylabel="down")
            bar = axes.figure.colorbar(shown, ax=axes, label="log₁₀ power")
            bar.outline.set_visible(False)

        title = name[0].upper() + name[1:]
        alt = f"Map of the power of the {name} by direction and frequency; the centre is frequency 0."
        return draw(f"spectrum-{index + 1}", alt, f"{title}: all directions, frequency 0 in the middle.", paint)

    return [chart(index, name) for index, name in enumerate(logs)]
