"""The command line: one Typer command for each verb, with the parameters that the verb declares."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer
import typer.core

import eclipse_ray.verbs  # noqa: F401 - its functions are the verbs
from eclipse_ray.errors import (
    EXIT_BAD_INPUT,
    EXIT_OK,
    EXIT_RUN_AGAIN,
    STOPPED,
    ConfigError,
    EclipseError,
    InterruptedRunError,
)
from eclipse_ray.log import say
from eclipse_ray.outcome import conclude, exit_code, folder_of, reserve_standard_output, show
from eclipse_ray.parameters import OUTPUT, PLANS, RUN, VERBS, Parameter, Verb, declared, describe, resolved
from eclipse_ray.progress import close_all, last_words

# Typer carries a click of its own in some versions; this is its UsageError wherever it lies.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="eclipse-ray",
    help="Purify availability-poisoned image datasets with sparse diffusion denoisers, on Ray.",
    epilog="First: eclipse-ray doctor, then eclipse-ray demo. Settings of every command: docs/settings.md.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _add(name: str, verb: Verb) -> None:
    def command(context: typer.Context, **values: Any) -> None:
        _run(name, verb, values, context.args)

    parameters = [_typed(*one) for one in declared(verb.function).values()]
    if verb.function in PLANS:
        parameters.append(_flag("dry_run", "Only say what would be done.", RUN))
    if verb.report:
        parameters.append(_flag("no_report", "Do not write a report into the output folder.", OUTPUT))
    parameters.append(_flag("json", "Print one JSON object on standard output.", OUTPUT))
    # Settings come last, as they do for every command.
    parameters.sort(key=lambda one: one.name in ("config", "settings", "json"))
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    vars(command)["__signature__"] = inspect.Signature([context, *parameters])
    command.__annotations__ = {one.name: one.annotation for one in (context, *parameters)}
    app.command(
        name,
        # Without the line breaks within a paragraph, which Typer would keep.
        help=re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(verb.function) or ""),
        epilog="\n\n".join(["Examples:", *verb.examples]),
        rich_help_panel=verb.group,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True} if name == "submit" else None,
    )(command)


def _typed(parameter: inspect.Parameter, declaration: Parameter) -> inspect.Parameter:
    """Return a parameter of a verb as Typer wants it."""
    typed, default, option = parameter.annotation, parameter.default, declaration.option
    if parameter.name == "config":
        typed = str | None
    if declaration.pair:
        typed = list[str] | None
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        info = typer.Argument(metavar=declaration.metavar, help=help_of(declaration, default))
    else:
        # A switch that turns something off.
        names = f" /{option}" if default is True else option or f"--{parameter.name.replace('_', '-')}"
        info = typer.Option(
            names,
            metavar=declaration.metavar,
            help=help_of(declaration, default),
            rich_help_panel=declaration.panel,
            min=declaration.minimum,
        )
    return _keyword(parameter.name, Annotated[typed, info], default)


def _flag(name: str, help: str, panel: str) -> inspect.Parameter:
    info = typer.Option(f"--{name.replace('_', '-')}", help=help, rich_help_panel=panel)
    return _keyword(name, Annotated[bool, info], False)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def help_of(declaration: Parameter, default: Any) -> str:
    """Return the help of a parameter; what may be left out gets the range and the default of its setting."""
    if not declaration.setting or default is inspect.Parameter.empty:
        return declaration.help
    setting = describe(declaration.setting)
    bounds = f"; {setting.bounds}" if setting.bounds else ""
    value = "" if setting.default in ("null", "false") else f" (default {setting.default})"
    return f"{(declaration.help or setting.text).rstrip('.')}{bounds}{value}."


def _run(name: str, verb: Verb, values: dict[str, Any], more: list[str]) -> None:
    as_json, no_report = values.pop("json"), values.pop("no_report", False)
    function = PLANS[verb.function] if values.pop("dry_run", False) else verb.function
    for key, (_, declaration) in declared(verb.function).items():
        if declaration.pair:
            values[key] = dict(map(declaration.pair, values[key] or []))
    if name == "submit":
        values |= _order(values["verb"], more, values["again"])
    config = None
    if any(one.setting for _, one in declared(verb.function).values()):
        # Read once, so that a file that changes meanwhile changes nothing.
        config = values["config"] = resolved(verb.function, values)
    with _interruptible() if verb.interruptible else nullcontext():
        result = function(**values)
    show(result, as_json, values)
    folder = folder_of(result, config)
    if folder:
        conclude(folder, no_report or not verb.report)
    raise typer.Exit(exit_code(result, config))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, and SIGTERM InterruptedRunError, in a verb that has its own end."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else InterruptedRunError(STOPPED)

    ended_by = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(STOPPED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(ended_by)


def _order(verb: str, words: list[str], again: bool) -> dict[str, Any]:
    """Return the arguments of `submit` that the command line of the submitted verb gives."""
    arguments, given = translated(verb, words)
    return {
        "arguments": arguments,
        "again": again or bool(given.get("extend") or given.get("retry_failed")),
        "stop_on_interrupt": _ask,
        "config": given.get("config"),
        "settings": given.get("settings"),
    }


def translated(verb: str, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return a command's arguments in one spelling, less --config, --set and --json; and all values by name.

    Raises ConfigError for a command that cannot be submitted, or a local path that means nothing elsewhere; a
    wrong argument ends the process as it would here.
    """
    known = [name for name, one in VERBS.items() if not one.here]
    if verb not in known:
        raise ConfigError(f"submit {verb}: expected one of {', '.join(known)}")
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands[verb]
    given = command.make_context(verb, list(words)).params
    arguments: list[str] = []
    for parameter in command.params:
        if parameter.name not in ("config", "settings", "json", "help"):
            arguments += _spelled(verb, parameter, given.get(str(parameter.name)))
    for key, (_, declaration) in declared(VERBS[verb].function).items():
        if declaration.pair:
            given[key] = dict(map(declaration.pair, given[key] or []))
    return arguments, given


def _spelled(verb: str, parameter: Any, value: Any) -> list[str]:
    if value is None or value is False or value == parameter.default:
        return []
    if parameter.metavar in ("SRC", "DST", "DIR", "FILE") and "://" not in str(value) and not os.path.isabs(value):
        raise ConfigError(
            f"submit {verb}: {value} is a path of this machine; name a URL, or the full path of a folder that "
            "every node of the cluster sees"
        )
    if isinstance(parameter, typer.core.TyperArgument):
        return [str(value)]
    return [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]


def _ask(job: str) -> bool:
    """Ask at a terminal whether to stop the job; without one, or at a second Ctrl-C, it goes on."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(f"\nstop job {job}? (no: it goes on without this terminal)", err=True)
    except (typer.Abort, KeyboardInterrupt):
        return False


for _name, _verb in VERBS.items():
    _add(_name, _verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (of this process, or `arguments`) and exit with a documented code: 0, 1, 2, 3 or 75."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--json" in words:
        reserve_standard_output()
    try:
        # Bare `eclipse-ray` is a question, not a mistake.
        code = app(words or ["--help"], prog_name="eclipse-ray", standalone_mode=False)
    except EclipseError as error:
        _end(str(error), error.exit_code)
    except UsageError as error:
        _end(usage_sentence(error), EXIT_BAD_INPUT)
    sys.exit(code or EXIT_OK)


def stop() -> None:
    """Say that the command was stopped, and end the process at once; nothing is shown after that.

    Where a whole process group is told to stop, by `timeout` or Slurm, the cluster of this machine is told, too,
    and Ray ends a driver that has lost its cluster.
    """
    with last_words():
        say(f"error: {STOPPED}", level="error", exit_code=EXIT_RUN_AGAIN)
        os._exit(EXIT_RUN_AGAIN)


def usage_sentence(error: Any) -> str:
    """Return one sentence for a command line that cannot be parsed, with the nearest right spelling."""
    context = error.ctx
    option = getattr(error, "option_name", None)
    if option and context is not None and "No such option" in error.message:
        known = [name for one in context.command.params for name in one.opts if name.startswith("--")]
        close = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
        text = f"no such option: {option}" + (f"; did you mean {close[0]}?" if close else "")
    else:
        text = error.format_message().replace("Value error, ", "").rstrip(".")
        text = text[:1].lower() + text[1:] + _nearest_choice(text)
    path = context.command_path if context is not None else "eclipse-ray"
    return text if not text else f"{text}{'' if text.endswith('?') else ';'} see {path} --help"


def _nearest_choice(text: str) -> str:
    found = re.search(r"'([^']*)' is not one of (.*)", text)
    close = found and difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


def _end(message: str, code: int) -> None:
    close_all()
    if message:
        say(f"error: {message}", level="error", exit_code=code)
    sys.exit(code)
