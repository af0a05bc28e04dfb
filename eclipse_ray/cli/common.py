"""What every command shares: the app, common options, how help is written and how a result is shown."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer

from eclipse_ray.config import parse_assignment
from eclipse_ray.config.words import describe
from eclipse_ray.results import Result, to_json

app = typer.Typer(
    name="eclipse-ray",
    help="Purify availability-poisoned image datasets with sparse diffusion denoisers, on Ray.",
    epilog="First: eclipse-ray doctor, then eclipse-ray demo. Settings of every command: docs/settings.md.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Panels of --help, in the order in which people ask: where, how, with what means, in which form.
DATA, METHOD, RUN, OUTPUT = "Data", "Method", "Run", "Settings and output"


def setting(
    key: str, *names: str, metavar: str | None = None, panel: str = METHOD, help: str | None = None
) -> Any:
    """Return an option for the setting `key`, with the description, range and default of the configuration."""
    found = describe(key)
    text = (help or found.text).rstrip(".")
    bounds = f"; {found.bounds}" if found.bounds else ""
    default = f" (default {found.default})" if found.default != "null" else ""
    return typer.Option(*names, metavar=metavar, help=f"{text}{bounds}{default}.", rich_help_panel=panel)


def during_run(name: str, help: str) -> Any:
    """Return an option that is no setting: what this one run is to do."""
    return typer.Option(name, help=help, rich_help_panel=RUN)


ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="YAML file with settings.", rich_help_panel=OUTPUT),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Override one setting; repeat for more.", rich_help_panel=OUTPUT
    ),
]
Resize = Annotated[
    int | None,
    setting("data.resize", "--resize", metavar="N", help="Resize the central square of every image to N pixels"),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT)
]

_RESULT_FD = 1


def examples(*lines: str) -> str:
    """Return the end of a command's help: `@app.command(epilog=examples("eclipse-ray verb ...", ...))`.

    A test parses each line with the command's real parser, and asks for two at least, of at most 78 characters.
    """
    return "\n\n".join(["Examples:", *lines])


def take_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on: the command decides what it means, and takes its time."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def parsed(assignments: list[str] | None) -> dict[str, Any]:
    """Return the settings that --set gave, {"section.key": value}; raises ConfigError for another form."""
    return dict(parse_assignment(text) for text in assignments or [])


def show(result: Result, as_json: bool, text: Callable[[], str], then: tuple[str, ...] = ()) -> None:
    """Print a result on standard output: one JSON object, or `text` and the command to type next, `then`."""
    lines = [json.dumps(to_json(result)) if as_json else text()]
    if then and not as_json:
        lines.append(f"next: {command(*then)}")
    with os.fdopen(os.dup(_RESULT_FD), "w", encoding="utf-8") as stream:
        print("\n".join(lines), file=stream)


def command(*words: str) -> str:
    """Return a command of ours as it can be typed, its words quoted where a shell needs it."""
    return shlex.join(("eclipse-ray", *words))


def reserve_standard_output() -> None:
    """Send whatever else prints, libraries and their child processes included, to standard error."""
    global _RESULT_FD
    sys.stdout.flush()
    _RESULT_FD = os.dup(1)
    os.dup2(2, 1)
