"""A report as one HTML file that contains its styles, script and pictures."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eclipse_ray.reports.blocks import Charts, Section
from eclipse_ray.reports.folder import open_folder, without_credentials
from eclipse_ray.reports.sections import sections_of
from eclipse_ray.results import ReportResult

TEMPLATES, REPORT = "templates", "report"
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


def write_report(url: str, audits: Sequence[str] = ()) -> ReportResult:
    """Write report/index.html and its charts into the output folder `url`; `audits` are audits of its data.

    Only a few images of a purification are read, however many there are. Raises InputError for a folder of no
    known kind, InputError or StorageError for a damaged one.
    """
    folder = open_folder(url)
    sections = sections_of(folder, audits)
    page = to_html(TITLES[folder.kind], without_credentials(folder.store.url), sections)
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
