"""How the work of a purification went: pace of each shard, and what failed."""

from __future__ import annotations

from collections import Counter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from eclipse_ray.report.blocks import Block, Section, Table, Text
from eclipse_ray.report.draw import Theme, draw
from eclipse_ray.report.purification import FAILURES_SHOWN, Purification

SHARDS_SHOWN = 300
"""More shards than this are counted by pace instead of drawn one by one."""
REASONS_SHOWN = 20


def outcome(run: Purification) -> list[str]:
    """Return the sentences a summary begins with: how many images ended how, and with what settings."""
    noise = run.noise
    steps = f"{noise.num_inference_steps:,} step{'s' if noise.num_inference_steps > 1 else ''}"
    left = run.planned - run.ok - run.failed
    end = f", and {left:,} are still to be done: the run is not finished" if left else ""
    failed = f"{run.failed:,} failed" if run.failed else "none failed"
    return [
        f"{run.ok:,} of {run.planned:,} images were purified, {failed}{end}.",
        f"They were noised to t_star = {noise.t_star:,} of {len(noise.alphas_cumprod):,} and denoised in {steps} "
        f"({noise.sampler}); compensation: {run.config.compensation.mode}.",
    ]


def throughput(run: Purification) -> Section:
    """Return the section on how fast shards were done."""
    title = "Throughput"
    paces = np.array([(status.ok + status.failed) / max(status.seconds, 1e-9) for status in run.done])
    if not len(paces):
        return Section("throughput", title, [Text("No shard is committed yet.")])
    seconds = sum(status.seconds for status in run.done)
    stored = sum(status.bytes for status in run.done)
    facts = [
        ["shards committed", f"{len(run.done):,} of {len(run.shards):,}"],
        ["images in them", f"{run.ok + run.failed:,}"],
        ["work of all stages", f"{seconds:,.0f} s"],
        ["images a second of work, median shard", f"{np.median(paces):,.1f}"],
        ["slowest and fastest shard", f"{paces.min():,.1f} and {paces.max():,.1f} images/s"],
        ["shards that were retried", f"{sum(status.generation > 0 for status in run.done):,}"],
        ["written", f"{stored / 2**20:,.1f} MiB"],
    ]
    lead = (
        f"A shard took {seconds / len(paces):,.1f} s of work on average, {np.median(paces):,.0f} images a second "
        "in the median."
    )
    blocks: list[Block] = [
        Text(
            "Work is the time that a shard spent being read, decoded, denoised, encoded and written, without the "
            "time that it waited; several shards are in work at once, so the run as a whole was faster."
        ),
        draw("throughput", f"Pace of the shards. {lead}", _caption(paces), lambda a, t: _paint(a, t, paces)),
        Table("The run in numbers", ["", "value"], facts),
    ]
    return Section("throughput", title, blocks, [lead])


def failures(run: Purification) -> Section:
    """Return the section that lists images which could not be purified."""
    if not run.failed:
        return Section("failures", "Failed images", [Text("Every image that was tried could be purified.")])
    reasons = Counter(failure.error for failure in run.failures).most_common(REASONS_SHOWN)
    shown = len(run.failures)
    first = f"the first {shown:,} of them" if shown < run.failed else "they"
    blocks: list[Block] = [
        Text(
            f"{run.failed:,} images ({100 * run.failed / max(run.planned, 1):.2f} % of the plan) could not be "
            f"purified; {first} are listed. All are in _eclipse/errors/. Mend them in the source if they can be "
            "mended, then run the same purify command with --retry-failed."
        ),
        Table("Reasons", ["reason", "images"], [[reason, f"{count:,}"] for reason, count in reasons]),
        Table(
            f"Failed images ({'the first ' if shown < run.failed else ''}{min(shown, FAILURES_SHOWN):,})",
            ["image", "file in the source", "reason"],
            [[failure.id, failure.key, failure.error] for failure in run.failures],
            numeric=False,
        ),
    ]
    return Section("failures", "Failed images", blocks)


def _caption(paces: np.ndarray) -> str:
    if len(paces) > SHARDS_SHOWN:
        return f"How many of {len(paces):,} shards were done at which pace."
    return "Pace of each shard, in plan order; the line is the median."


def _paint(axes: Axes, theme: Theme, paces: np.ndarray) -> None:
    if len(paces) > SHARDS_SHOWN:
        axes.hist(paces, bins=40, color=theme.series[0])
        axes.set(xlabel="images a second of work", ylabel="shards")
        return
    axes.bar(np.arange(len(paces)), paces, color=theme.series[0], width=0.7)
    axes.axhline(float(np.median(paces)), color=theme.series[1], linestyle="--", linewidth=1.2)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="shard", ylabel="images a second of work", ylim=(0, None))
