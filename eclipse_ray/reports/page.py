"""A report: the sections of a folder, as one HTML file that contains its styles, script and pictures."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from eclipse_ray.detection import BANDS, Images, bands, class_means, rows_of
from eclipse_ray.diffusion.checkpoint import Card
from eclipse_ray.errors import EclipseError, InputError, did_you_mean
from eclipse_ray.ledger import layout, read_fingerprint, read_settings
from eclipse_ray.reports import experiments, purified
from eclipse_ray.reports.blocks import Block, Chart, Charts, Code, Picture, Section, Table, Text
from eclipse_ray.reports.charts import draw, lines, png
from eclipse_ray.reports.folder import (
    AUDIT,
    COMMAND,
    Folder,
    Purification,
    kind_of,
    now,
    open_folder,
    read_card,
    read_mapping,
    software,
    without_credentials,
)
from eclipse_ray.results import AuditResult, ReportResult
from eclipse_ray.storage.store import Store

TEMPLATES, REPORT = "templates", "report"
PAGE = f"{REPORT}/index.html"


def write_report(url: str, audits: Sequence[str] = ()) -> ReportResult:
    """Write report/index.html and its charts into the output folder `url`; `audits` are audits of its data.

    Only a few images of a purification are read, however many there are. Raises InputError for a folder of no
    known kind, InputError or StorageError for a damaged one.
    """
    folder = open_folder(url)
    sections = sections_of(folder, audits)
    page = to_html(KINDS[folder.kind][0], without_credentials(folder.store.url), sections)
    blocks = [block for section in sections for block in section.blocks]
    for chart in (chart for block in blocks if isinstance(block, Charts) for chart in block.charts):
        folder.store.write(f"{REPORT}/{chart.name}.svg", chart.light)
        folder.store.write(f"{REPORT}/{chart.name}.png", chart.png)
    folder.store.write(PAGE, page.encode())
    return ReportResult(report=f"{folder.store.url}/{PAGE}", output=folder.store.url)


def to_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the page. All text is escaped; its policy allows only the style and the script of these hashes."""
    style, script = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    environment = Environment(
        loader=PackageLoader("eclipse_ray.reports", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["uri"] = lambda data, media: f"data:image/{media};base64,{base64.b64encode(data).decode()}"
    # Files of this package are the only text that is not escaped.
    assets = {"policy": policy, "style": Markup(style), "script": Markup(script)}
    template = environment.get_template("report.html")
    return template.render(title=title, subtitle=subtitle, sections=sections, **assets)


def _asset(name: str) -> str:
    return files("eclipse_ray.reports").joinpath(TEMPLATES, name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


VERBS = {"purify": "purify", "train": "train", "matrix": "evaluate", "evaluate": "evaluate", "sweep": "sweep"}
"""Kind of folder: the command that makes the same folder when it is given the settings in it."""


def provenance(folder: Folder, *parts: Folder) -> Section:
    """Return the section that says what made the folder, and each of its `parts`."""
    every = (folder, *parts)
    blocks = [block for each in every for block in _commands(each)]
    rows = [row for each in every for row in _fingerprint(each)]
    blocks += [Table("Fingerprints", ["", "value"], rows, numeric=False)] if rows else []
    for each in every:
        data = layout.read_optional(each.store, layout.CONFIG)
        if data is not None:
            text = without_credentials(data.decode("utf-8", "replace"))
            blocks.append(Code(f"{each.name}: all settings ({layout.CONFIG})", text))
    blocks.append(Text(f"Versions that made this report, {now()}: {_versions(software())}."))
    return Section("provenance", "To get the same again", blocks)


def _versions(note: Mapping[str, Any]) -> str:
    words = ", ".join(f"{name} {value}" for name, value in note["versions"].items())
    return f"{words}; {note.get('platform')}"


def _commands(folder: Folder) -> list[Block]:
    if folder.store.exists(COMMAND):
        note = read_mapping(folder.store, COMMAND)
        title = f"{folder.name}: command, finished {note.get('finished')}"
        found: list[Block] = [Code(title, str(note.get("command")), open=True)]
        return [*found, Text(f"Versions of that run: {_versions(note)}.")] if note.get("versions") else found
    verb = VERBS.get(folder.kind)
    if verb is None or not folder.store.exists(layout.CONFIG):
        return []
    text = f"eclipse-ray {verb} --config {without_credentials(folder.store.url)}/{layout.CONFIG}"
    return [Code(f"{folder.name}: the command was not recorded; this one does the same", text, open=True)]


def _fingerprint(folder: Folder) -> list[list[str]]:
    if not folder.store.exists(layout.FINGERPRINT):
        return []
    try:
        found = read_fingerprint(folder.store)
    except InputError as error:
        return [[folder.name, str(error)]]
    parts = {"fingerprint": found.value, "input": found.input, "weights": found.weights or "-"}
    return [[f"{folder.name}: {name}", value] for name, value in parts.items()]


SHOWN = 10
"""The means of at most this many classes are shown."""


def write_audit(output: str, settings: str, result: AuditResult, sample: Images, clean: Images | None) -> None:
    """Write config.yaml, audit.png and, last, audit.json into the folder `output`, over earlier ones."""
    store = Store(output)
    store.write("config.yaml", settings.encode())
    store.write("audit.png", audit_picture(result, sample, clean))
    store.write("audit.json", json.dumps(asdict(result), indent=1).encode())


def audit_picture(result: AuditResult, sample: Images, clean: Images | None) -> bytes:
    """Return a PNG: odd part of class means under mirroring, and energy of the residual by frequency."""
    assert sample.labels is not None
    figure = Figure(figsize=(11, 6), layout="constrained")
    kind = f", {result.frequency} frequency, {result.scope}-wise" if result.frequency else ""
    figure.suptitle(f"{result.verdict}, p = {result.p_value:.2g}{kind}", fontsize=12)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 2))
    top, bottom = parts
    found, labels = torch.unique(sample.labels, return_inverse=True)
    means = class_means(sample, labels, torch.ones_like(labels, dtype=torch.bool))[:SHOWN]
    # The same gain for all classes, so that a more strongly poisoned class looks stronger.
    gain = 100 / max(1.0, float(means.abs().max()))
    top.suptitle(f"odd part of class means, times {gain:.1f}", fontsize=9)
    for axis, mean, label in zip(top.subplots(1, len(means), squeeze=False)[0], means, found, strict=False):
        axis.imshow((128 + gain * mean).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())
        axis.set_title(f"class {label}", fontsize=8)
        axis.set_axis_off()
    axis = bottom.subplots()
    rows = rows_of(sample, bands)
    middles = (np.arange(BANDS) + 0.5) / (2 * BANDS)
    for label in found[:SHOWN]:
        axis.plot(middles, rows[sample.labels == label].mean(0).numpy(), color="tab:red", alpha=0.4, linewidth=1)
    axis.plot([], [], color="tab:red", label="classes of the dataset")
    if clean is not None:
        theirs = rows_of(clean, bands).mean(0).numpy()
        axis.plot(middles, theirs, color="black", linewidth=2, label="clean set")
    axis.set(xlabel="radial frequency, cycles per pixel", ylabel="log energy of the residual, mean over images")
    axis.legend(fontsize=8)
    return png(figure, dpi=110)


def denoiser(store: Store) -> Section:
    """Return the section on how the denoiser was trained and how well it denoises held-out images."""
    card = read_card(store)
    lead = _lead(card)
    advice = (
        f"It was trained on timesteps below {card.t_max:,}; recommended: t_star {card.t_star:,}, "
        f"num_inference_steps {card.num_inference_steps:,}, sampler {card.sampler}."
    )
    blocks: list[Block] = [Text(lead), Text(advice)]
    if len(card.history) > 1:
        loss = _history(card, "loss", "training loss", "Training loss: mean since the last report.", loss="loss")
        caption = "Held-out images at the recommended depth, denoised in one step."
        psnr = _history(card, "psnr", "PSNR, dB", caption, denoise_psnr="denoised", noisy_psnr="noised")
        blocks.append(Charts([loss, psnr]))
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


def _history(card: Card, name: str, words: str, caption: str, **columns: str) -> Chart:
    """Return a chart of columns of the training history by iteration, each with its label."""
    iterations = [entry["iteration"] for entry in card.history]
    curves = {label: (iterations, [entry[column] for entry in card.history]) for column, label in columns.items()}
    ends = "; ".join(f"{label} from {values[0]:.3g} to {values[-1]:.3g}" for label, (_, values) in curves.items())
    paint = lines(curves, xlabel="iteration", ylabel=words, xlim=(0, None))
    return draw(name, f"{words} by iteration: {ends}.", caption, paint)


def verdicts(run: Purification, audits: Sequence[str]) -> list[str]:
    """Return a sentence per audit: what it said of the data before or after.

    Raises InputError for a folder without an audit, and for an audit of other data.
    """
    source, output = run.config.data.source, run.store.url
    places = {Store(source).url if source else "": "before", output: "after"}
    found: dict[str, list[str]] = {"before": [], "after": []}
    for url in audits:
        store = Store(url)
        config = read_settings(store, "config.yaml")
        if config is None or not store.exists(AUDIT):
            raise InputError(
                f"{url}: no audit here ({AUDIT} and config.yaml are expected)"
                f"{did_you_mean(url) or '; name the folder that `eclipse-ray audit SRC --out DIR` has written'}"
            )
        audited = config.data.source
        when = places.get(Store(audited).url) if audited else None
        if when is None:
            raise InputError(f"{url}: an audit of {audited}, which is neither the source of {output} nor {output}")
        verdict = str(read_mapping(store, AUDIT).get("words")).partition(". ")[0].rstrip(".")
        found[when].append(f"An audit of the data {when} purification: {verdict}.")
    return [*found["before"], *found["after"]]


def audit(store: Store) -> Section:
    """Return the section on an audit: its verdict and the evidence. Raises InputError if it is damaged."""
    found = read_mapping(store, AUDIT)
    try:
        verdict, _, evidence = str(found["words"]).partition(". ")
        scores = [
            [score["name"].replace("_", " "), f"{score['effect']:.3f}", f"{score['p_value']:.2g}", score["detail"]]
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
        words = "Class means, and energy of the residual by frequency"
        blocks.append(Picture(f"{words}; the table holds every number.", f"{words}.", png))
    head = ["score", "effect", "p", "what it found"]
    return Section("audit", "Audit", [*blocks, Table("Scores", head, scores, numeric=False)], [lead])


def sections_of(folder: Folder, audits: Sequence[str] = ()) -> list[Section]:
    """Return the sections of a folder in order, the summary first; `audits` are folders of audits of its data.

    Raises InputError or StorageError.
    """
    section_of = KINDS[folder.kind][1]
    if section_of is None:
        summary, sections = _purified(folder, audits)
        return [Section("summary", "Summary", summary), *sections]
    if audits:
        raise InputError(f"{folder.store.url}: audits are shown with a purification, this is a {folder.kind}")
    section = section_of(folder.store)
    # A first sentence that the summary consists of is not said twice.
    repeated = [Text(lead) for lead in section.leads] == list(section.blocks[:1])
    shown = section._replace(blocks=section.blocks[1:]) if repeated else section
    return [Section("summary", "Summary", [Text(lead) for lead in section.leads]), shown, provenance(folder)]


def _purified(folder: Folder, audits: Sequence[str]) -> tuple[list[Block], list[Section]]:
    """Return the first page of a purification or a demo, and the sections that follow."""
    if folder.kind == "purify":
        run = Purification(folder.store)
        return [purified.facts(run, verdicts(run, audits))], [*_of_run(run), provenance(folder)]
    judged = experiments.demo(folder.store)
    parts = {name: part for name in ("denoiser", "purified") if (part := folder.part(name))}
    own = provenance(folder, *parts.values())
    if "purified" not in parts:
        return [Text(lead) for lead in judged.leads], [judged, own]
    # The demo's own folders, wherever the whole of it lies by now.
    url = folder.store.url
    moved = {"data.source": f"{url}/poisoned", "purify.denoiser": f"{url}/denoiser"}
    run = Purification(parts["purified"].store, moved, f"{url}/split/rest")
    return [purified.facts(run, [*judged.leads, *verdicts(run, audits)])], [judged, *_of_run(run), own]


def _of_run(run: Purification) -> list[Section]:
    """Return the sections on a purification and on the denoiser that it used, if that can still be read."""
    found = purified.sections(run)
    url = run.config.purify.denoiser
    try:
        store = Store(url) if url else None
        return [*found, denoiser(store)] if store and kind_of(store) == "train" else found
    except (EclipseError, OSError):
        # The section for researchers has said so already.
        return found


KINDS: dict[str, tuple[str, Callable[[Store], Section] | None]] = {
    "demo": ("Demonstration", None),
    "train": ("Denoiser", denoiser),
    "purify": ("Purification", None),
    "matrix": ("Evaluation matrix", experiments.matrix),
    "evaluate": ("Evaluation", experiments.evaluation),
    "sweep": ("Sweep", experiments.sweep),
    "audit": ("Audit", audit),
}
"""Kind of folder: title of its page, and what returns the section on what it holds (None: there are several)."""
