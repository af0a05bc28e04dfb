"""The command that asks whether a dataset is poisoned."""

from __future__ import annotations

from typing import Annotated

import typer

from eclipse_ray.cli.common import Assignments, ConfigFile, Json, Resize, app, parsed, show
from eclipse_ray.results import AuditResult


@app.command()
def audit(
    source: Annotated[str | None, typer.Argument(metavar="SRC", help="Labelled dataset.")] = None,
    clean: Annotated[str | None, typer.Option(metavar="SRC", help="Clean set of the same kind, disjoint.")] = None,
    denoiser: Annotated[str | None, typer.Option(metavar="DIR", help="Look at what it removes.")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder for audit.json and audit.png.")] = None,
    resize: Resize = None,
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


def _describe(result: AuditResult) -> str:
    lines = [result.words, ""]
    for score in result.evidence:
        mark = "" if score["counted"] else " (not counted)"
        lines.append(
            f"  {score['name']:<18} effect {score['effect']:7.3f} (tolerance {score['tolerance']:g})  "
            f"p {score['p_value']:<8.2g} {score['detail']}{mark}"
        )
    if result.verdict == "poisoned":
        advice = ", ".join(f"{name} {value}" for name, value in result.recommended.items())
        lines += ["", f"Recommended: purify with {advice}."]
    return "\n".join(lines)
