"""At which frequencies the perturbation lies, and what purification leaves of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from eclipse_ray.report.blocks import Block, Chart, Charts, Section, Text
from eclipse_ray.report.draw import DASHES, Theme, draw, plain_numbers
from eclipse_ray.report.measures import Floats, bands_left, difference, power_spectrum, radial_mean, share_below
from eclipse_ray.report.purification import Purification

LOW = 0.125
"""Cycles a pixel below which a frequency counts as low: waves longer than 8 pixels."""
SMALLEST_SHOWN = (0.05 * 2 / 255) ** 2
"""A twentieth of a grey level, as power on [-1, 1]: below, a spectrum says nothing."""


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
        f"The {first} has {where}: {100 * low:.0f} % of its power lies below {LOW:g} cycles a pixel "
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
        axes.set(yscale="log", xlabel="cycles a pixel", ylabel="mean power", xlim=(0, 0.5))
        plain_numbers(axes.yaxis)
        axes.legend(loc="best")

    words = "; ".join(
        f"{name}: strongest at {frequencies[int(np.argmax(mean))]:.2f} cycles a pixel"
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
            axes.set(xlabel="cycles a pixel, across", ylabel="down")
            bar = axes.figure.colorbar(shown, ax=axes, label="log₁₀ power")
            bar.outline.set_visible(False)

        title = name[0].upper() + name[1:]
        alt = f"Map of the power of the {name} by direction and frequency; the centre is frequency 0."
        return draw(f"spectrum-{index + 1}", alt, f"{title}: all directions, frequency 0 in the middle.", paint)

    return [chart(index, name) for index, name in enumerate(logs)]
