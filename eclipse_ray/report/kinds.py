"""Which sections the report of each kind of folder has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from eclipse_ray.data.store import Store
from eclipse_ray.errors import EclipseError
from eclipse_ray.report import accuracy, others
from eclipse_ray.report.blocks import Section, Text
from eclipse_ray.report.folders import Folder, kind_of, read_card, read_config
from eclipse_ray.report.learning import denoiser
from eclipse_ray.report.pictures import assimilation, pictures
from eclipse_ray.report.provenance import provenance
from eclipse_ray.report.purification import Purification, read_purification
from eclipse_ray.report.spectra import spectra
from eclipse_ray.report.work import failures, outcome, throughput

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
    "sweep": lambda folder: ([], [others.sweep(folder.store), provenance(folder)]),
    "audit": lambda folder: ([], [others.audit(folder.store), provenance(folder)]),
}
"""Kind of folder: what makes its leading sentences and its sections."""
