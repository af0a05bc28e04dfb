"""The command that tunes: sweep."""

from __future__ import annotations

from typing import Annotated

import typer

from eclipse_ray.cli.common import (
    DATA,
    Assignments,
    ConfigFile,
    Json,
    app,
    during_run,
    examples,
    parsed,
    show,
)
from eclipse_ray.cli.reports import NoReport, conclude
from eclipse_ray.errors import EXIT_FAILURE
from eclipse_ray.results import SweepPlan, SweepResult


@app.command(
    epilog=examples(
        "eclipse-ray sweep --data my/data --clean my/held --denoiser my/den --out sweep",
        "eclipse-ray sweep --config configs/sweep-quick.yaml --dry-run",
    )
)
def sweep(
    data: Annotated[
        str | None, typer.Option(metavar="SRC", help="Labelled dataset to purify later.", rich_help_panel=DATA)
    ] = None,
    clean: Annotated[
        str | None, typer.Option(metavar="SRC", help="Sparse clean set.", rich_help_panel=DATA)
    ] = None,
    denoiser: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Denoiser; without one, a part of --clean trains them.", rich_help_panel=DATA
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of results.", rich_help_panel=DATA)
    ] = None,
    dry_run: Annotated[bool, during_run("--dry-run", "Only list trials and time them.")] = False,
    no_report: NoReport = False,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Search for the settings to purify a dataset with, without a test set; the same command goes on."""
    from eclipse_ray import api

    settings = parsed(assign)
    if dry_run:
        plan = api.sweep_plan(data=data, clean=clean, denoiser=denoiser, out=out, config=config, settings=settings)
        show(plan, as_json, lambda: _describe_plan(plan))
        return
    result = api.sweep(data=data, clean=clean, denoiser=denoiser, out=out, config=config, settings=settings)
    then = ("purify", "SRC", "DST", "--config", f"{result.output.rstrip('/')}/best.yaml")
    show(result, as_json, lambda: _describe(result), then)
    conclude(result.output, no_report)
    if result.failed:
        raise typer.Exit(EXIT_FAILURE)


def _describe(result: SweepResult) -> str:
    lines = [f"failed: {title}: {message}" for title, message in result.failures.items()]
    best = {f"{section}.{key}": value for section, keys in result.best.items() for key, value in keys.items()}
    return "\n".join(
        [
            *lines,
            f"best of {result.trials:,} trials (score {result.score:.2f}): "
            + ", ".join(f"{key} {value}" for key, value in best.items()),
        ]
    )


def _describe_plan(plan: SweepPlan) -> str:
    unknown = f", and what cannot be timed: {', '.join(plan.unknown)}" if plan.unknown else ""
    return "\n".join(
        [
            *plan.missing,
            f"{plan.done:,} of {plan.trials:,} trials are measured; {plan.denoisers:,} denoisers to train, "
            f"{plan.purifications:,} purifications, then the trials: about {plan.seconds_left / 60:,.1f} minutes "
            f"on this machine{unknown}; nothing was written to {plan.output}",
        ]
    )
