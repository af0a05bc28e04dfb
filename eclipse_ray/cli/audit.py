"""The command that asks whether a dataset is poisoned."""

from __future__ import annotations

from typing import Annotated

import typer

from eclipse_ray.cli.common import DATA, Assignments, ConfigFile, Json, Resize, app, examples, parsed, show
from eclipse_ray.cli.reports import NoReport, conclude
from eclipse_ray.results import AuditResult


@app.command(
    epilog=examples(
        "eclipse-ray audit my/dataset",
        "eclipse-ray audit my/dataset --clean my/trusted --out my/audit",
    )
)
def audit(
    source: Annotated[str | None, typer.Argument(metavar="SRC", help="Labelled dataset.")] = None,
    clean: Annotated[
        str | None, typer.Option(metavar="SRC", help="Clean set of the same kind, disjoint.", rich_help_panel=DATA)
    ] = None,
    denoiser: Annotated[
        str | None, typer.Option(metavar="DIR", help="Look at what it removes.", rich_help_panel=DATA)
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for audit.json and audit.png.", rich_help_panel=DATA)
    ] = None,
    resize: Resize = None,
    no_report: NoReport = False,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Say whether a dataset is poisoned, how sure that is, and by what kind of poison."""
    from eclipse_ray import api

    settings = parsed(assign)
    result = api.audit(
        source, clean=clean, denoiser=denoiser, out=out, resize=resize, config=config, settings=settings
    )
    show(result, as_json, lambda: _describe(result))
    if result.output:
        conclude(result.output, no_report)


def _describe(result: AuditResult) -> str:
    lines = [result.words, ""]
    for score in result.evidence:
        lines.append(
            f"  {score['name']:<18} effect {score['effect']:7.3f} (tolerance {score['tolerance']:g})  "
            f"p {score['p_value']:<8.2g} {score['detail']}"
        )
    if result.verdict == "poisoned":
        advice = ", ".join(f"{name} {value}" for name, value in result.recommended.items())
        lines += ["", f"Recommended: purify with {advice}."]
    return "\n".join(lines)
