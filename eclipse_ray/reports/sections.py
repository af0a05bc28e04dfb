"""The sections of a report: where an output came from, how its denoiser was trained, how a run went, an audit."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eclipse_ray.detection import views as features
from eclipse_ray.detection.verdict import class_means
from eclipse_ray.detection.views import Images
from eclipse_ray.diffusion.checkpoint import Card
from eclipse_ray.errors import EclipseError, InputError
from eclipse_ray.ledger import layout, read_fingerprint
from eclipse_ray.reports import experiments
from eclipse_ray.reports.blocks import Block, Chart, Charts, Code, Picture, Section, Table, Text
from eclipse_ray.reports.charts import DASHES, MARKERS, Theme, draw, png
from eclipse_ray.reports.folder import (
    AUDIT,
    COMMAND,
    FAILURES_SHOWN,
    Folder,
    Purification,
    kind_of,
    now,
    read_card,
    read_config,
    read_json,
    read_purification,
    software,
    without_credentials,
)
from eclipse_ray.reports.pictures import assimilation, pictures, spectra
from eclipse_ray.results import AuditResult, to_json
from eclipse_ray.storage.store import Store

VERBS = {"purify": "purify", "train": "train", "matrix": "evaluate", "evaluate": "evaluate", "sweep": "sweep"}
"""Kind of folder: the command that makes the same folder when it is given the settings in it."""


def provenance(folder: Folder, *parts: Folder) -> Section:
    """Return the section that says what made the folder, and each of its `parts`."""
    blocks: list[Block] = []
    for each in (folder, *parts):
        blocks += _commands(each)
    rows = [row for each in (folder, *parts) for row in _fingerprint(each)]
    if rows:
        blocks.append(Table("Fingerprints", ["", "value"], rows, numeric=False))
    for each in (folder, *parts):
        blocks += _settings(each)
    versions = software()
    rows = [[name, value] for name, value in versions["versions"].items()]
    caption = f"Versions that made this report, {now()}, on {versions['platform']}"
    blocks.append(Table(caption, ["", "version"], rows, numeric=False))
    return Section("provenance", "To get the same again", blocks)


def _commands(folder: Folder) -> list[Block]:
    settings = f"{without_credentials(folder.store.url)}/{layout.CONFIG}"
    if not folder.store.exists(COMMAND):
        verb = VERBS.get(folder.kind)
        if verb is None or not folder.store.exists(layout.CONFIG):
            return []
        text = f"eclipse-ray {verb} --config {settings}"
        return [Code(f"{folder.name}: the command was not recorded; this one does the same", text, open=True)]
    note = read_json(folder.store, COMMAND)
    made = note.get("versions")
    found: list[Block] = [
        Code(f"{folder.name}: command, finished {note.get('finished')}", str(note.get("command")), open=True)
    ]
    if isinstance(made, dict):
        words = ", ".join(f"{name} {value}" for name, value in made.items())
        found.append(Text(f"Versions of that run: {words}; {note.get('platform')}."))
    return found


def _fingerprint(folder: Folder) -> list[list[str]]:
    if not folder.store.exists(layout.FINGERPRINT):
        return []
    try:
        found: Any = read_fingerprint(folder.store)
    except InputError as error:
        return [[folder.name, str(error)]]
    parts = [["fingerprint", found.value], ["input", found.input], ["weights", found.weights or "-"]]
    return [[f"{folder.name}: {name}", value] for name, value in parts]


def _settings(folder: Folder) -> list[Block]:
    data = layout.read_optional(folder.store, layout.CONFIG)
    if data is None:
        return []
    text = without_credentials(data.decode("utf-8", "replace"))
    return [Code(f"{folder.name}: all settings ({layout.CONFIG})", text)]


SHARDS_SHOWN = 300
"""Up to this many shards, each has a bar; above, a histogram counts shards by pace."""
REASONS_SHOWN = 20
"""At most this many reasons of failure are listed, the most frequent first."""


def outcome(run: Purification) -> list[str]:
    """Return the first sentences of the summary: how many images were purified or failed, and how."""
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
        ["images per second of work, median shard", f"{np.median(paces):,.1f}"],
        ["slowest and fastest shard", f"{paces.min():,.1f} and {paces.max():,.1f} images/s"],
        ["shards that were retried", f"{sum(status.generation > 0 for status in run.done):,}"],
        ["written", f"{stored / 2**20:,.1f} MiB"],
    ]
    lead = (
        f"A shard took {seconds / len(paces):,.1f} s of work on average, {np.median(paces):,.0f} images per "
        "second in the median."
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
    """Return the section that lists images which could not be purified, and counts files that were not read."""
    left: list[Block] = [Text(f"Of the source, {run.passed_over}.")] if run.passed_over else []
    if not run.failed:
        return Section("failures", "Failed images", [Text("Every image that was tried could be purified."), *left])
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
    return Section("failures", "Failed images", [*blocks, *left])


def _caption(paces: np.ndarray) -> str:
    if len(paces) > SHARDS_SHOWN:
        return f"How many of {len(paces):,} shards were done at which pace."
    return "Pace of each shard, in plan order; the line is the median."


def _paint(axes: Axes, theme: Theme, paces: np.ndarray) -> None:
    if len(paces) > SHARDS_SHOWN:
        axes.hist(paces, bins=40, color=theme.series[0])
        axes.set(xlabel="images per second of work", ylabel="shards")
        return
    axes.bar(np.arange(len(paces)), paces, color=theme.series[0], width=0.7)
    axes.axhline(float(np.median(paces)), color=theme.series[1], linestyle="--", linewidth=1.2)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="shard", ylabel="images per second of work", ylim=(0, None))


SHOWN = 10
"""The means of at most this many classes are shown."""


def write_audit(output: str, settings: str, result: AuditResult, sample: Images, clean: Images | None) -> None:
    """Write config.yaml, audit.png and, last, audit.json into the folder `output`, over earlier ones."""
    store = Store(output)
    store.write("config.yaml", settings.encode())
    store.write("audit.png", audit_picture(result, sample, clean))
    store.write("audit.json", json.dumps(to_json(result), indent=1).encode())


def audit_picture(result: AuditResult, sample: Images, clean: Images | None) -> bytes:
    """Return a PNG: odd part of class means under mirroring, p-values, energy of the residual by frequency."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    title = f"{result.verdict}, p = {result.p_value:.2g}"
    if result.frequency:
        title += f", {result.frequency} frequency, {result.scope}-wise"
    figure.suptitle(title, fontsize=12)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 2))
    top, bottom = parts
    _draw_means(top, sample)
    left, right = bottom.subplots(1, 2)
    _draw_p_values(left, result.evidence)
    _draw_bands(right, sample, clean)
    return png(figure, dpi=110)


def _draw_means(figure: Any, sample: Images) -> None:
    assert sample.labels is not None
    found, labels = torch.unique(sample.labels, return_inverse=True)
    means = class_means(sample, labels, torch.ones_like(labels, dtype=torch.bool))[:SHOWN]
    # The same gain for all classes, so that a more strongly poisoned class looks stronger.
    gain = 100 / max(1.0, float(means.abs().max()))
    figure.suptitle(f"odd part of class means, times {gain:.1f}", fontsize=9)
    axes = figure.subplots(1, len(means), squeeze=False)[0]
    for axis, mean, label in zip(axes, means, found.tolist(), strict=False):
        pixels = (128 + gain * mean).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(f"class {label}", fontsize=8)
        axis.set_axis_off()


def _draw_p_values(axis: Axes, evidence: Sequence[dict[str, Any]]) -> None:
    names = [score["name"] for score in evidence]
    heights = [-math.log10(score["p_value"]) for score in evidence]
    axis.barh(names[::-1], heights[::-1], color="tab:red")
    axis.set_xlabel("-log10 p, each score alone")


def _draw_bands(axis: Axes, sample: Images, clean: Images | None) -> None:
    assert sample.labels is not None
    rows = features.rows_of(sample, features.bands)
    middles = (np.arange(features.BANDS) + 0.5) / (2 * features.BANDS)
    for label in torch.unique(sample.labels)[:SHOWN].tolist():
        axis.plot(middles, rows[sample.labels == label].mean(0).numpy(), color="tab:red", alpha=0.4, linewidth=1)
    axis.plot([], [], color="tab:red", label="classes of the dataset")
    if clean is not None:
        theirs = features.rows_of(clean, features.bands).mean(0).numpy()
        axis.plot(middles, theirs, color="black", linewidth=2, label="clean set")
    axis.set_xlabel("radial frequency, cycles per pixel")
    axis.set_ylabel("log energy of the residual, mean over images")
    axis.legend(fontsize=8)


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


def _decibels(value: float | None) -> str:
    return "never measured" if value is None else f"{value:.2f} dB"


def audit(store: Store) -> Section:
    """Return the section on an audit: its verdict and the evidence. Raises InputError if it is damaged."""
    found = read_json(store, AUDIT)
    try:
        verdict, _, evidence = str(found["words"]).partition(". ")
        scores = [
            [
                score["name"].replace("_", " "),
                f"{score['effect']:.3f}",
                f"{score['p_value']:.2g}",
                score["detail"],
            ]
            for score in found["evidence"]
            # Older audits also hold scores that the verdict does not use.
            if score.get("counted", True)
        ]
        against = f" and {found['clean_images']:,} clean ones" if found["clean_images"] else ""
        looked_at = f"{found['images']:,} images of {found['classes']:,} classes{against} were looked at."
        advice = {key: value for key, value in found["recommended"].items() if value is not None}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{store.path(AUDIT)}: damaged ({error}); run the same audit command again") from error
    lead = f"{verdict.rstrip('.')}. {looked_at}"
    blocks: list[Block] = [Text(lead)]
    blocks += [Text(f"Evidence: {evidence}")] if evidence else []
    if advice:
        blocks.append(Text(f"Purify with {', '.join(f'{key} {value:g}' for key, value in advice.items())}."))
    png = layout.read_optional(store, "audit.png")
    if png is not None:
        words = "Class means, p-values of the scores, and energy of the residual by frequency"
        blocks.append(Picture(f"{words}; the table holds every number.", f"{words}.", png))
    head = ["score", "effect", "p", "what it found"]
    return Section("audit", "Audit", [*blocks, Table("Scores", head, scores, numeric=False)], [lead])


SUMMARY = "summary"


def sections_of(folder: Folder) -> list[Section]:
    """Return the sections of a folder in order, the summary first. Raises InputError or StorageError."""
    leads, sections = KINDS[folder.kind](folder)
    leads = [*leads, *(lead for section in sections for lead in section.leads)]
    return [Section(SUMMARY, "Summary", [], leads), *(_once(section, leads) for section in sections)]


def _once(section: Section, leads: list[str]) -> Section:
    """Return the section without its first sentence if the summary above consists of that sentence."""
    repeated = [Text(lead) for lead in leads] == list(section.blocks[:1])
    return replace(section, blocks=section.blocks[1:]) if repeated else section


Found = tuple[list[str], list[Section]]


def _train(folder: Folder) -> Found:
    return [], [denoiser(read_card(folder.store)), provenance(folder)]


def _purify(folder: Folder) -> Found:
    run = read_purification(folder.store)
    trained = _denoiser_of(run)
    return outcome(run), [*_seen(run), *trained, throughput(run), failures(run), provenance(folder)]


def _demo(folder: Folder) -> Found:
    leads: list[str] = []
    sections: list[Section] = [experiments.demo(folder.store)]
    purified, trained = folder.part("purified"), folder.part("denoiser")
    # The demo's own folders, wherever the whole of it lies by now.
    url = folder.store.url
    moved = {"data.source": f"{url}/poisoned", "purify.denoiser": f"{url}/denoiser"}
    run = read_purification(purified.store, moved, f"{url}/split/rest") if purified else None
    if run:
        leads = outcome(run)
        sections += _seen(run)
    if trained:
        sections.append(denoiser(read_card(trained.store)))
    if run:
        sections += [throughput(run), failures(run)]
    parts = [part for part in (trained, purified) if part]
    return leads, [*sections, provenance(folder, *parts)]


def _matrix(folder: Folder) -> Found:
    config = read_config(folder.store)
    dataset = config.matrix.published if config else None
    return [], [experiments.matrix(folder.store, dataset), provenance(folder)]


def _seen(run: Purification) -> list[Section]:
    return [pictures(run), spectra(run), assimilation(run)]


def _denoiser_of(run: Purification) -> list[Section]:
    """Return the section on the denoiser that a purification used, if that can still be read."""
    url = run.config.purify.denoiser
    try:
        store = Store(url) if url else None
        return [denoiser(read_card(store))] if store and kind_of(store) == "train" else []
    except (EclipseError, OSError):
        # The section on the noise has said so already.
        return []


KINDS: dict[str, Callable[[Folder], Found]] = {
    "demo": _demo,
    "train": _train,
    "purify": _purify,
    "matrix": _matrix,
    "evaluate": lambda folder: ([], [experiments.evaluation(folder.store), provenance(folder)]),
    "sweep": lambda folder: ([], [experiments.sweep(folder.store), provenance(folder)]),
    "audit": lambda folder: ([], [audit(folder.store), provenance(folder)]),
}
"""Kind of folder: the function that returns the sentences of its summary and its sections."""
