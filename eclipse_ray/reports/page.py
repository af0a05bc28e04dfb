"""A report as one HTML file that needs nothing else: styles, script and pictures are in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eclipse_ray.reports.blocks import Section, charts_of
from eclipse_ray.reports.folder import open_folder, without_credentials
from eclipse_ray.reports.sections import sections_of
from eclipse_ray.results import ReportResult

TEMPLATES = "templates"


def to_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the page. All text in it is escaped; what may run or style it is named by its hash."""
    style, script = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    environment = Environment(
        loader=PackageLoader("eclipse_ray.reports", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        policy=policy,
        # The only text that is not escaped: files of this package.
        style=Markup(style),
        script=Markup(script),
    )


def _asset(name: str) -> str:
    return files("eclipse_ray.reports").joinpath(TEMPLATES, name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
