"""What every command shares: the app, common options, and how a result is shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from eclipse_ray.config import parse_assignment
from eclipse_ray.results import Result, to_json

app = typer.Typer(
    name="eclipse-ray",
    help="Purify availability-poisoned image datasets with sparse diffusion denoisers, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[str | None, typer.Option("--config", metavar="FILE", help="YAML file with settings.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; repeat for more."),
]
Resize = Annotated[
    int | None,
    typer.Option(metavar="N", help="Resize the central square of every image to N pixels; default: native size."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

_RESULT_FD = 1


def parsed(assignments: list[str] | None) -> dict[str, Any]:
    """Return the settings that --set gave, {"section.key": value}; raises ConfigError for another form."""
    return dict(parse_assignment(text) for text in assignments or [])


def show(result: Result, as_json: bool, text: Callable[[], str]) -> None:
    """Print a result on standard output: one JSON object, or `text`."""
    line = json.dumps(to_json(result)) if as_json else text()
    with os.fdopen(os.dup(_RESULT_FD), "w", encoding="utf-8") as stream:
        print(line, file=stream)


def reserve_standard_output() -> None:
    """Send whatever else prints, libraries and their child processes included, to standard error."""
    global _RESULT_FD
    sys.stdout.flush()
    _RESULT_FD = os.dup(1)
    os.dup2(2, 1)
