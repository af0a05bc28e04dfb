"""A report as one HTML file that needs nothing else: styles, script and pictures are in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eclipse_ray.report.blocks import Section

TEMPLATES = "templates"


def to_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the page. All text in it is escaped; what may run or style it is named by its hash."""
    style, script = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    environment = Environment(
        loader=PackageLoader("eclipse_ray.report", TEMPLATES),
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
    return files("eclipse_ray.report").joinpath(TEMPLATES, name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
