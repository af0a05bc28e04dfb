"""Training curves: of the denoiser, from its card, and of victims, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from eclipse_ray.diffusion.checkpoint import Card
from eclipse_ray.reports.blocks import Block, Chart, Charts, Section, Table, Text
from eclipse_ray.reports.charts import DASHES, MARKERS, Theme, draw, legible

Curves = Mapping[str, Sequence[Sequence[float]]]
"""Name: for each victim, its test accuracy after every epoch."""


def denoiser(card: Card) -> Section:
    """Return the section on how the denoiser was trained and how well it denoises held-out images."""
    lead = _lead(card)
    ratio = f"{card.sparse_images:,}" if card.sparse_images else "unknown"
    rows = [
        ["sparse clean images", ratio],
        ["iterations", f"{card.iterations:,}" if card.iterations else "unknown"],
        ["trained on timesteps below", f"{card.t_max:,}"],
        ["recommended t_star", f"{card.t_star:,}"],
        ["recommended steps and sampler", f"{card.num_inference_steps:,}, {card.sampler}"],
        ["held-out PSNR, denoised", _decibels(card.denoise_psnr)],
        ["held-out PSNR, noised", _decibels(card.noisy_psnr)],
    ]
    blocks: list[Block] = [Text(lead)]
    if len(card.history) > 1:
        blocks.append(Charts([_loss(card), _psnr(card)]))
    else:
        blocks.append(Text("No training curve is recorded: the denoiser was imported, or trained for too short."))
    blocks.append(Table("The denoiser", ["", "value"], rows))
    return Section("training", "Training of the denoiser", blocks, [lead])


def victims(curves: Curves, name: str = "victims", words: str = "") -> list[Chart]:
    """Return a chart of test accuracy by epoch, one line a name; empty if there are no epochs to join.

    `words` begin its caption.
    """
    if not any(len(run) > 1 for runs in curves.values() for run in runs):
        return []

    def paint(axes: Axes, theme: Theme) -> None:
        for index, (label, runs) in enumerate(curves.items()):
            style = index % len(theme.series)
            mean, epochs = _over_victims(runs)
            colour = theme.series[style]
            (line,) = axes.plot(epochs, mean, color=colour, marker=MARKERS[style], linestyle=DASHES[style])
            line.set_label(legible(label))
            if len(runs) > 1:
                values = np.array([run[: len(mean)] for run in runs])
                axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(0, 100))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")

    last = "; ".join(f"{label} ends at {_over_victims(runs)[0][-1]:.1f} %" for label, runs in curves.items())
    caption = f"{words}Test accuracy after each epoch: mean, least and most over victims. The last epoch decides."
    return [draw(name, f"{words}Test accuracy by epoch: {last}.", caption, paint)]


def _lead(card: Card) -> str:
    if card.denoise_psnr is None or card.noisy_psnr is None:
        return "The denoiser was imported; its quality on held-out images was never measured."
    gain = card.denoise_psnr - card.noisy_psnr
    return (
        f"The denoiser was trained on {card.sparse_images:,} sparse clean images for {card.iterations:,} "
        f"iterations and raises held-out images from {card.noisy_psnr:.2f} to {card.denoise_psnr:.2f} dB PSNR at "
        f"depth {card.t_star:,} (a gain of {gain:.2f} dB)."
    )


def _loss(card: Card) -> Chart:
    iterations = [entry["iteration"] for entry in card.history]
    losses = [entry["loss"] for entry in card.history]

    def paint(axes: Axes, theme: Theme) -> None:
        axes.plot(iterations, losses, color=theme.series[0], marker=MARKERS[0])
        axes.set(xlabel="iteration", ylabel="training loss", ylim=(0, None), xlim=(0, None))

    alt = f"Training loss by iteration, from {losses[0]:.3f} to {losses[-1]:.3f}."
    return draw("loss", alt, "Training loss: mean since the last report.", paint)


def _psnr(card: Card) -> Chart:
    iterations = [entry["iteration"] for entry in card.history]
    denoised = [entry["denoise_psnr"] for entry in card.history]
    noised = [entry["noisy_psnr"] for entry in card.history]

    def paint(axes: Axes, theme: Theme) -> None:
        axes.plot(iterations, denoised, color=theme.series[0], marker=MARKERS[0], label="denoised")
        axes.plot(iterations, noised, color=theme.series[1], linestyle=DASHES[1], label="noised")
        axes.set(xlabel="iteration", ylabel="PSNR, dB", xlim=(0, None))
        axes.legend(loc="best")

    alt = (
        f"Held-out PSNR by iteration, from {denoised[0]:.2f} to {denoised[-1]:.2f} dB; noised {noised[-1]:.2f} dB."
    )
    return draw("psnr", alt, "Held-out images at the recommended depth, denoised in one step.", paint)


def _over_victims(runs: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    epochs = min(len(run) for run in runs)
    return np.mean([run[:epochs] for run in runs], axis=0), np.arange(1, epochs + 1)


def _decibels(value: float | None) -> str:
    return "never measured" if value is None else f"{value:.2f} dB"
