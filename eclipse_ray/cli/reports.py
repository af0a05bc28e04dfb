"""The command `report`, and the report that other commands leave when they have finished."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from eclipse_ray.cli.common import Json, app, show
from eclipse_ray.errors import EclipseError, InterruptedRunError

NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write a report into the output folder.")]


@app.command()
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
        from eclipse_ray.report.folders import record_command

        record_command(output, shlex.join(["eclipse-ray", *sys.argv[1:]]))
        if not no_report:
            print(f"report: {api.report(output).report}", file=sys.stderr)
    except InterruptedRunError:
        raise
    except (EclipseError, OSError) as error:
        print(f"note: no report was written: {error}", file=sys.stderr)
    except Exception as error:  # noqa: BLE001 - a mistake in the report must not turn a finished run into a failed one
        print(f"note: no report was written: {type(error).__name__}: {error}", file=sys.stderr)
