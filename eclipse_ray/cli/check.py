"""The command that looks before anything runs: doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from eclipse_ray.cli.common import DATA, Assignments, ConfigFile, Json, app, examples, parsed, show
from eclipse_ray.errors import EXIT_FAILURE
from eclipse_ray.results import DoctorResult


@app.command(epilog=examples("eclipse-ray doctor", "eclipse-ray doctor --store s3://bucket/purified"))
def doctor(
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Place for outputs to try out; one object comes and goes.", rich_help_panel=DATA
        ),
    ] = None,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Say whether machine, Ray cluster and store are fit for a run, and what to mend; exit 1 if not."""
    from eclipse_ray import api

    result = api.doctor(store=store, config=config, settings=parsed(assign))
    show(result, as_json, lambda: _table(result), ("demo",) if result.ok else ())
    if not result.ok:
        raise typer.Exit(EXIT_FAILURE)


def _table(result: DoctorResult) -> str:
    width = max(len(check.name) for check in result.checks)
    lines = []
    for check in result.checks:
        lines.append(f"{check.verdict:<8} {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.fix}")
    failed = sum(check.verdict == "failed" for check in result.checks)
    return "\n".join(
        [*lines, "ready" if result.ok else f"NOT ready: {failed} of {len(result.checks)} checks failed"]
    )
