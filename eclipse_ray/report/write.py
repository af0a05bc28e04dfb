"""Write the report of an output folder into it: one HTML file, and its charts as PNG and SVG."""

from __future__ import annotations

from eclipse_ray.report.blocks import charts_of
from eclipse_ray.report.folders import open_folder, without_credentials
from eclipse_ray.report.html import to_html
from eclipse_ray.report.kinds import sections_of
from eclipse_ray.results import ReportResult

REPORT = "report"
PAGE = f"{REPORT}/index.html"
TITLES = {
    "demo": "Demonstration",
    "train": "Denoiser",
    "purify": "Purification",
    "matrix": "Evaluation matrix",
    "evaluate": "Evaluation",
    "sweep": "Sweep",
    "audit": "Audit",
}


def write_report(url: str) -> ReportResult:
    """Write report/index.html and its charts into the output folder `url`.

    Only a few images of a purification are read, however many there are. Raises InputError for a folder of no
    known kind, InputError or StorageError for a damaged one.
    """
    folder = open_folder(url)
    sections = sections_of(folder)
    page = to_html(TITLES[folder.kind], without_credentials(folder.store.url), sections)
    for chart in charts_of(sections):
        folder.store.write(f"{REPORT}/{chart.name}.svg", chart.light)
        folder.store.write(f"{REPORT}/{chart.name}.png", chart.png)
    folder.store.write(PAGE, page.encode())
    return ReportResult(report=f"{folder.store.url}/{PAGE}", output=folder.store.url)
