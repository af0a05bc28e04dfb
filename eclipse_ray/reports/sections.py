"""Training curves: of the denoiser, from its card, and of victims, epoch by epoch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eclipse_ray.config import flatten
from eclipse_ray.detection import views as features
from eclipse_ray.detection.verdict import class_means
from eclipse_ray.detection.views import Images
from eclipse_ray.errors import EclipseError, InputError
from eclipse_ray.ledger import layout, read_fingerprint
from eclipse_ray.reports import accuracy
from eclipse_ray.reports.accuracy import read_rows
from eclipse_ray.reports.blocks import Block, Charts, Code, Note, Picture, Section, Table, Text, value_words
from eclipse_ray.reports.charts import Theme, draw, png
from eclipse_ray.reports.folder import (
    AUDIT,
    BEST,
    COMMAND,
    FAILURES_SHOWN,
    RESULTS,
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
from eclipse_ray.reports.learning import denoiser
from eclipse_ray.reports.pictures import assimilation, pictures, spectra
from eclipse_ray.reports.sweep import OBJECTIVE, TIDY, best_first, heat_map, pareto_chart
from eclipse_ray.results import AuditResult, SweepView, to_json
from eclipse_ray.storage.store import Store

VERBS = {"purify": "purify", "train": "train", "matrix": "evaluate", "evaluate": "evaluate", "sweep": "sweep"}
"""Commands that do the same again when they are given the settings in the folder."""


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


SHOWN = 10
"""Most classes whose mean is shown."""


def write_audit(output: str, settings: str, result: AuditResult, sample: Images, clean: Images | None) -> None:
    """Leave config.yaml, audit.png and, last, audit.json in the folder `output`, in place of earlier ones."""
    store = Store(output)
    store.write("config.yaml", settings.encode())
    store.write("audit.png", audit_picture(result, sample, clean))
    store.write("audit.json", json.dumps(to_json(result), indent=1).encode())


def audit_picture(result: AuditResult, sample: Images, clean: Images | None) -> bytes:
    """Return a PNG: what class means lose in the mirror, p-values, and the residual's energy by frequency."""
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
    # One gain for all, so that a class that is poisoned more looks it.
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
    colours = ["tab:red" if score["counted"] else "tab:gray" for score in evidence]
    axis.barh(names[::-1], heights[::-1], color=colours[::-1])
    axis.set_xlabel("-log10 p, each score alone (gray: not counted)")


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
    axis.set_xlabel("radial frequency, cycles a pixel")
    axis.set_ylabel("log energy of the residual, mean over images")
    axis.legend(fontsize=8)


TRIALS_SHOWN = 100
SETTINGS = tuple(TIDY.names[: TIDY.names.index("point")])
"""Columns of a sweep's rows that say what was tried."""


def sweep(store: Store) -> Section:
    """Return the section on a sweep: its best settings, its pictures, its trials."""
    best = _mapping(store, BEST)
    rows = read_rows(store) if store.exists(RESULTS) else []
    settings = Table("The best settings", ["setting", "value"], _pairs(best), numeric=False)
    command = Code("Purify with them", f"eclipse-ray purify SRC DST --config {store.path(BEST)}", open=True)
    if not rows:
        lead = "No trial of this sweep is measured."
        return Section("sweep", "Sweep", [Note(lead), settings], [lead])
    missing = TIDY.names - rows[0].keys()
    if missing:
        raise InputError(f"{store.path(RESULTS)}: has no column {min(missing)}; run the same sweep command again")
    view = _view(rows, best)
    lead = _found(view)
    blocks: list[Block] = [Text(lead), Charts([pareto_chart(view), heat_map(view)]), settings, command]
    return Section("sweep", "Sweep", [*blocks, _trials(view)], [lead])


def _view(rows: list[dict[str, Any]], best: dict[str, Any]) -> SweepView:
    axes = [name for name in SETTINGS if len({str(row[name]) for row in rows}) > 1]
    return SweepView(axes, rows, best, f"{len(rows):,} trials")


def _found(view: SweepView) -> str:
    best = best_first(view.rows)[0]
    settings = ", ".join(
        f"{name} {value_words(best[name])}" for name in view.axes or ["t_star", "num_inference_steps"]
    )
    return (
        f"The best of {view.summary} has {settings}: a victim trained on what it purifies is right on "
        f"{best['proxy_accuracy']:.1f} % of held-out clean images, "
        f"and clean images keep {best['psnr']:.1f} dB PSNR."
    )


def _trials(view: SweepView) -> Table:
    """Return the trials, best first, with the columns that differ; results.parquet holds all of them."""
    head = [*view.axes, OBJECTIVE, "psnr", "score", "pareto", "stopped", "seconds"]
    ranked = best_first(view.rows)
    shown = [[value_words(row[name]) for name in head] for row in ranked[:TRIALS_SHOWN]]
    first = f"the best {TRIALS_SHOWN} of " if len(ranked) > TRIALS_SHOWN else ""
    return Table(f"Trials ({first}{len(ranked):,}), best first", head, shown)


def audit(store: Store) -> Section:
    """Return the section on an audit: its verdict and what speaks for it. Raises InputError if it is damaged."""
    found = read_json(store, AUDIT)
    try:
        verdict, _, evidence = str(found["words"]).partition(". ")
        scores = [
            [
                score["name"].replace("_", " "),
                f"{score['effect']:.3f}",
                f"{score['p_value']:.2g}",
                "yes" if score["counted"] else "no",
                score["detail"],
            ]
            for score in found["evidence"]
        ]
        against = f" and {found['clean_images']:,} clean ones" if found["clean_images"] else ""
        looked_at = f"{found['images']:,} images of {found['classes']:,} classes{against} were looked at."
        advice = {key: value for key, value in found["recommended"].items() if value is not None}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{store.path(AUDIT)}: damaged ({error}); run the same audit command again") from error
    lead = f"{verdict.rstrip('.')}. {looked_at}"
    blocks: list[Block] = [Text(lead)]
    blocks += [Text(f"What speaks for it: {evidence}")] if evidence else []
    if advice:
        blocks.append(Text(f"Purify with {', '.join(f'{key} {value:g}' for key, value in advice.items())}."))
    png = layout.read_optional(store, "audit.png")
    if png is not None:
        words = "Class means, p-values of the scores, and energy of the residual by frequency"
        blocks.append(Picture(f"{words}; the table holds every number.", f"{words}.", png))
    head = ["score", "effect", "p", "counts", "what it found"]
    return Section("audit", "Audit", [*blocks, Table("Scores", head, scores, numeric=False)], [lead])


def _mapping(store: Store, key: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(store.read(key))
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        raise InputError(f"{store.path(key)}: damaged; run the command that writes it again")
    return tree


def _pairs(tree: dict[str, Any]) -> list[list[str]]:
    return [[key, value_words(value)] for key, value in flatten(tree).items()]


SUMMARY = "summary"


def sections_of(folder: Folder) -> list[Section]:
    """Return the sections of a folder in order, the summary first. Raises InputError or StorageError."""
    leads, sections = KINDS[folder.kind](folder)
    leads = [*leads, *(lead for section in sections for lead in section.leads)]
    return [Section(SUMMARY, "Summary", [], leads), *(_once(section, leads) for section in sections)]


def _once(section: Section, leads: list[str]) -> Section:
    """Return the section without its lead if the summary just above says that and nothing else."""
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
    sections: list[Section] = [accuracy.demo(folder.store)]
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
    return [], [accuracy.matrix(folder.store, dataset), provenance(folder)]


def _seen(run: Purification) -> list[Section]:
    return [pictures(run), spectra(run), assimilation(run)]


def _denoiser_of(run: Purification) -> list[Section]:
    """Return the section on the denoiser that a purification used, if it is still where it was."""
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
    "evaluate": lambda folder: ([], [accuracy.evaluation(folder.store), provenance(folder)]),
    "sweep": lambda folder: ([], [sweep(folder.store), provenance(folder)]),
    "audit": lambda folder: ([], [audit(folder.store), provenance(folder)]),
}
"""Kind of folder: what makes its leading sentences and its sections."""
