"""The command that runs another one on a cluster."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
import typer.core

from eclipse_ray.cli.common import RUN, Json, app, during_run, examples, parsed, show, take_interrupts
from eclipse_ray.errors import EXIT_OK, ConfigError

HERE_ONLY = ("submit", "demo", "import-checkpoint", "report")
"""Commands that work on this machine's own files."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples(
        "eclipse-ray submit purify --config s3://bucket/run.yaml",
        "eclipse-ray submit train --config s3://bucket/run.yaml --no-wait",
    ),
)
def submit(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(metavar="VERB", help="Another command, followed by its arguments.")],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Dashboard, http://host:8265; else RAY_API_SERVER_ADDRESS.", rich_help_panel=RUN
        ),
    ] = None,
    insecure: Annotated[bool, during_run("--insecure", "Submit to a cluster without tokens.")] = False,
    image_has_deps: Annotated[
        bool, during_run("--image-has-deps", "Install nothing: the nodes have torch and the rest.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Variable of the job and its workers; repeat.", rich_help_panel=RUN
        ),
    ] = None,
    no_wait: Annotated[bool, during_run("--no-wait", "Return once it is submitted.")] = False,
    again: Annotated[bool, during_run("--again", "Run it anew although it succeeded before.")] = False,
    as_json: Json = False,
) -> None:
    """Run a command on a Ray cluster: follow its log, end with its exit code.

    Submitted again, a run is joined while it runs and resumed if it was stopped. Ctrl-C asks whether to stop it;
    off a terminal it goes on.
    """
    from eclipse_ray import api

    arguments, given = translated(verb, context.args)
    take_interrupts()
    result = api.submit(
        verb,
        arguments,
        address=address,
        insecure=insecure,
        wait=not no_wait,
        again=again or bool(given.get("extend") or given.get("retry_failed")),
        image_has_deps=image_has_deps,
        env=_variables(env or []),
        stop_on_interrupt=_ask,
        config=given.get("config"),
        settings=parsed(given.get("assign")),
    )
    show(result, as_json, lambda: f"job {result.submission_id}: {result.status}")
    raise typer.Exit(result.exit_code or EXIT_OK)


def translated(verb: str, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return a command's arguments in one spelling, less --config, --set and --json; and all values by name.

    Raises ConfigError for a command that cannot be submitted, or a local path that means nothing elsewhere; a
    wrong argument ends the process as it would here.
    """
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands.get(verb)
    if command is None or verb in HERE_ONLY:
        known = ", ".join(name for name in group.commands if name not in HERE_ONLY)
        raise ConfigError(f"submit {verb}: expected one of {known}")
    given = command.make_context(verb, list(words)).params
    arguments: list[str] = []
    for parameter in command.params:
        if parameter.name in ("config", "assign", "as_json", "help"):
            continue
        arguments += _spelled(verb, parameter, given.get(str(parameter.name)))
    return arguments, given


def _spelled(verb: str, parameter: Any, value: Any) -> list[str]:
    if value is None or value is False or value == parameter.default:
        return []
    if parameter.metavar in ("SRC", "DST", "DIR", "FILE"):
        _refuse_relative(verb, str(value))
    if isinstance(parameter, typer.core.TyperArgument):
        return [str(value)]
    return [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]


def _refuse_relative(verb: str, location: str) -> None:
    if "://" not in location and not os.path.isabs(location):
        raise ConfigError(
            f"submit {verb}: {location} is a path of this machine; name a URL, or the full path of a folder that "
            "every node of the cluster sees"
        )


def _variables(assignments: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in assignments]
    for name, separator, _ in pairs:
        if not name or not separator:
            raise ConfigError(f"--env {name}: expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _ask(job: str) -> bool:
    """Ask at a terminal whether to stop the job; without one, or at a second Ctrl-C, it goes on."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(f"\nstop job {job}? (no: it goes on without this terminal)", err=True)
    except (typer.Abort, KeyboardInterrupt):
        return False
