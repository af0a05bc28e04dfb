"""The command `report`, and the report that other commands leave when they have finished."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from eclipse_ray.cli.common import OUTPUT, Json, app, examples, show
from eclipse_ray.errors import EclipseError, InterruptedRunError
from eclipse_ray.log import say

NoReport = Annotated[
    bool,
    typer.Option("--no-report", help="Do not write a report into the output folder.", rich_help_panel=OUTPUT),
]


@app.command(epilog=examples("eclipse-ray report my/purified", "eclipse-ray report runs/demo --json"))
def report(
    output: Annotated[
        str, typer.Argument(metavar="DIR", help="Output of train, purify, evaluate, sweep, audit or demo.")
    ],
    as_json: Json = False,
) -> None:
    """Write DIR/report/index.html: one page, complete in itself, on what an output folder holds."""
    from eclipse_ray import api

    result = api.report(output)
    show(result, as_json, lambda: f"report: {result.report}")


def conclude(output: str, no_report: bool = False) -> None:
    """Record the command that has just finished `output`, and write its report unless told not to.

    A run that is done stays done: what goes wrong here is said on standard error and changes no exit code.
    """
    try:
        from eclipse_ray import api
        from eclipse_ray.reports.folder import record_command

        record_command(output, shlex.join(["eclipse-ray", *sys.argv[1:]]))
        if not no_report:
            say(f"report: {api.report(output).report}")
    except InterruptedRunError:
        raise
    except (EclipseError, OSError) as error:
        say(f"note: no report was written: {error}")
    except Exception as error:  # noqa: BLE001 - a mistake in the report must not turn a finished run into a failed one
        say(f"note: no report was written: {type(error).__name__}: {error}")
