"""The command line: one Typer command for each verb, with the parameters that the verb declares.

What follows a verb stands at the end: its result in words, the next command, the report, the exit code.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer
import typer.core

from eclipse_ray import results as made
from eclipse_ray import verbs
from eclipse_ray.config import LOCATIONS, Config, meant, require_everywhere
from eclipse_ray.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_RUN_AGAIN,
    EXIT_TOO_MANY_FAILED,
    STOPPED,
    ConfigError,
    EclipseError,
    InterruptedRunError,
    end_at_once,
)
from eclipse_ray.log import counted, say
from eclipse_ray.parameters import (
    OUTPUT,
    PLACES,
    PLANS,
    RUN,
    VERBS,
    Described,
    Parameter,
    Verb,
    check_arguments,
    declared,
    describe,
    describe_section,
    resolved,
    submittable,
)
from eclipse_ray.progress import close_all, duration, last_words, pace, volume
from eclipse_ray.results import Result

# Typer carries a click of its own in some versions; this is its UsageError wherever it lies.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

NARROW = 72
"""Terminals of fewer columns get help without tables."""

app = typer.Typer(
    name="eclipse-ray",
    help="Purify availability-poisoned image datasets with sparse diffusion denoisers, on Ray.",
    epilog="First: eclipse-ray doctor, then eclipse-ray demo. All settings: eclipse-ray settings.",
    pretty_exceptions_enable=False,
    # Tables cut the names of options where they have no room.
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= NARROW else None,
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
    # Without the line breaks within a paragraph, which Typer would keep.
    help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(verb.function) or "")
    app.command(
        name,
        help=help,
        short_help=help.partition("\n\n")[0],
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
    check_arguments(verb.function, values)
    values |= _pairs(verb, values)
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


def _pairs(verb: Verb, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of a verb that are given as NAME=VALUE, as mappings."""
    pairs = {key: one.pair for key, (_, one) in declared(verb.function).items() if one.pair}
    return {key: dict(map(pair, values[key] or [])) for key, pair in pairs.items()}


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
    # What an argument replaces is not read there, so it may lie anywhere.
    replaced = [one.setting for name, (_, one) in declared(VERBS[verb].function).items() if given.get(name)]
    unread = dict.fromkeys(LOCATIONS.intersection(replaced))
    return {
        "arguments": arguments,
        "again": again or bool(given.get("extend") or given.get("retry_failed")),
        "stop_on_interrupt": _ask,
        "config": given.get("config"),
        "settings": given["settings"] | unread,
    }


def translated(verb: str, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return a command's arguments in one spelling, less --config, --set and --json; and all values by name.

    Raises ConfigError for a command that cannot be submitted, or a local path that means nothing elsewhere; a
    wrong argument ends the process as it would here.
    """
    function = submittable(verb).function
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands[verb]
    given = command.make_context(verb, list(words)).params
    check_arguments(function, given)
    arguments: list[str] = []
    for parameter in command.params:
        if parameter.name not in ("config", "settings", "json", "help"):
            arguments += _spelled(verb, parameter, given.get(str(parameter.name)))
    return arguments, given | _pairs(VERBS[verb], given)


def _spelled(verb: str, parameter: Any, value: Any) -> list[str]:
    if value is None or value is False or value == parameter.default:
        return []
    *words, kind = (parameter.metavar or "").split("|")
    if kind in PLACES and value not in words:
        require_everywhere(f"submit {verb}: ", value)
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


@app.command(
    "settings",
    rich_help_panel="Start here",
    epilog="Examples:\n\neclipse-ray settings purify\n\neclipse-ray settings denoiser.preset --json",
)
def settings(
    key: Annotated[
        str,
        typer.Argument(
            metavar="SECTION[.KEY]", help="Only these, for example purify or purify.t_star.", show_default=False
        ),
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Say what --set and --config can set: each setting with its type, range and default."""
    every = {one.key: one for section in Config.model_fields for one in describe_section(section)}
    within = key.rstrip(".")
    found = [one for one in every.values() if not within or f"{one.key}.".startswith(f"{within}.")]
    if not found:
        near = meant("", within, ()) or difflib.get_close_matches(within, [*Config.model_fields, *every], n=1)
        hint = f"did you mean {' or '.join(near)}?" if near else f"sections: {', '.join(Config.model_fields)}"
        raise ConfigError(f"{key} is no setting and no section; {hint}")
    _print(
        json.dumps({"settings": [asdict(one) for one in found]}) if as_json else "\n".join(map(_setting, found))
    )


def _setting(one: Described) -> str:
    """Return a setting in words, for a terminal."""
    head = f"{one.key}  {one.kind}{f', {one.bounds}' if one.bounds else ''}; default {one.default}"
    text = textwrap.wrap(one.text, shutil.get_terminal_size().columns - 4)
    return "\n    ".join([head, *text])


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
    except (SystemExit, OSError) as end:
        reason = end.__context__ if isinstance(end, SystemExit) else end
        if not isinstance(reason, OSError) or (words and "--help" not in words):
            raise
        # Whoever reads only the beginning of the help, such as `head`, makes no mistake.
        code = EXIT_OK if isinstance(reason, BrokenPipeError) else EXIT_FAILURE
        _end("" if code == EXIT_OK else f"the help could not be printed: {reason}", code)
    sys.exit(code or EXIT_OK)


def stop() -> None:
    """Say that the command was stopped, and end the process at once; nothing is shown after that.

    Where a whole process group is told to stop, by `timeout` or Slurm, the cluster of this machine is told, too,
    and Ray ends a driver that has lost its cluster.
    """
    with last_words():
        say(f"error: {STOPPED}", level="error", exit_code=EXIT_RUN_AGAIN)
        end_at_once(EXIT_RUN_AGAIN)


def usage_sentence(error: Any) -> str:
    """Return one sentence for a command line that cannot be parsed, with the nearest right spelling."""
    context = error.ctx
    option = getattr(error, "option_name", None)
    if option and context is not None and "No such option" in error.message:
        known = [name[2:] for one in context.command.params for name in one.opts if name.startswith("--")]
        close = [f"--{one}" for one in difflib.get_close_matches(option.lstrip("-"), known, n=1)]
        # Most settings have no option of their own.
        close = close or [f"--set {one}=VALUE" for one in meant("", option.lstrip("-").replace("-", "_"), ())]
        text = f"no such option: {option}" + (f"; did you mean {' or '.join(close)}?" if close else "")
    else:
        text = error.format_message().replace("Value error, ", "").rstrip(".")
        text = re.sub("Input should be ([^,]*).*", r"it must be \1", text)
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


_RESULT_FD = 1


def reserve_standard_output() -> None:
    """Send whatever else prints, libraries and their child processes included, to standard error."""
    global _RESULT_FD
    sys.stdout.flush()
    _RESULT_FD = os.dup(1)
    os.dup2(2, 1)


def show(result: Result, as_json: bool, given: Mapping[str, Any]) -> None:
    """Print a result on standard output: one JSON object, or words and the command to type next."""
    lines = [json.dumps(asdict(result)) if as_json else in_words(result)]
    if not as_json and (then := next_words(result, given)):
        here = f"{os.getcwd()}/"
        lines.append(f"next: {shlex.join(['eclipse-ray', *(word.removeprefix(here) for word in then)])}")
    _print("\n".join(lines))


def _print(text: str) -> None:
    try:
        with os.fdopen(os.dup(_RESULT_FD), "w", encoding="utf-8", errors="backslashreplace") as stream:
            print(text, file=stream)
    except BrokenPipeError:
        # A reader that has gone, such as `head`, makes no mistake of a finished run.
        pass
    except OSError as error:
        say(f"note: the result could not be printed: {error}; the run itself is done")


def exit_code(result: Result, config: Config | None) -> int:
    """Return the exit code of a command that has ended with this result."""
    match result:
        case made.PurifyResult() if config and result.failed > config.purify.max_failed_fraction * result.planned:
            return EXIT_TOO_MANY_FAILED
        case made.DoctorResult(ok=False) | made.VerifyResult(ok=False):
            return EXIT_FAILURE
        case made.MatrixResult() | made.SweepResult():
            return EXIT_FAILURE if result.failed else EXIT_OK
        case made.SubmitResult():
            return result.exit_code or EXIT_OK
    return EXIT_OK


def folder_of(result: Result, config: Config | None) -> str | None:
    """Return the folder in which the command is recorded, and whose report is written; None if there is none."""
    match result:
        case made.TrainResult():
            return result.denoiser
        case (
            made.PurifyResult() | made.MatrixResult() | made.SweepResult() | made.AuditResult() | made.DemoResult()
        ):
            return result.output
        case made.EvaluateResult():
            return config.data.output if config else None
    return None


def conclude(output: str, no_report: bool = False) -> None:
    """Record the command that has just finished `output`, and write its report unless told not to.

    A run that is done stays done: what goes wrong here is said on standard error and changes no exit code.
    """
    try:
        from eclipse_ray.reports.folder import record_command

        record_command(output, shlex.join(["eclipse-ray", *sys.argv[1:]]))
        if not no_report:
            say(f"report: {verbs.report(output).report}")
    except (EclipseError, OSError) as error:
        say(f"note: no report was written: {error}")
    except Exception as error:  # noqa: BLE001 - a mistake in the report must not turn a finished run into a failed one
        say(f"note: no report was written: {type(error).__name__}: {error}")


def next_words(result: Result, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words of the command that people type next, () if none is obvious."""
    match result:
        case made.StatusResult():
            again = () if given["watch"] else ("status", given["output"], "--watch")
            return ("verify", given["output"]) if result.shards_done == result.shards else again
        case made.DoctorResult():
            return ("demo",) if result.ok else ()
        case made.DemoResult():
            return ("split", "SRC", "--clean", "500", "--out", "DIR")
        case made.DatasetResult(details={"clean": _, "rest": _}):
            return ("train", "--clean", f"{result.output}/clean", "--out", f"{result.output}/denoiser")
        case made.DatasetResult(details={"poison": _} | {"half": _}):
            return ("evaluate", result.output, "--test", "TEST")
        case made.TrainResult() | made.ImportResult():
            return ("purify", "SRC", "DST", "--denoiser", result.denoiser)
        case made.PurifyResult():
            return ("verify", result.output)
        case made.VerifyResult():
            return ("evaluate", given["output"], "--test", "TEST") if result.ok else ()
        case made.SweepResult():
            return ("purify", "SRC", "DST", "--config", f"{result.output.rstrip('/')}/best.yaml")
    return ()


def in_words(result: Result) -> str:
    """Return a result as people read it."""
    match result:
        case made.DemoResult():
            from eclipse_ray.demonstration import demo_table

            return demo_table(result)
        case made.DoctorResult():
            return _checks(result)
        case made.AuditResult():
            return _audit(result)
        case (
            made.MatrixResult() | made.MatrixPlan() | made.SweepResult() | made.SweepPlan() | made.EvaluateResult()
        ):
            return _experiment(result)
        case made.DatasetResult():
            return _dataset(result)
        case made.DryRunResult():
            return (
                f"{result.images_left:,} of {counted(result.planned, 'image')} to purify, in "
                f"{result.shards_left:,} of {counted(result.shards, 'shard')}, from {volume(result.input_bytes)}; "
                f"about {volume(result.output_bytes)} to write, {duration(3600 * result.device_hours)} on one "
                f"such {result.device} as here, {duration(3600 * result.cpu_hours)} of one core to decode and "
                f"encode; nothing was written to {result.output}"
            )
    return _sentence(result)


def _sentence(result: Result) -> str:
    match result:
        case made.TrainResult():
            return (
                f"denoiser in {result.denoiser}: {result.denoise_psnr:.2f} dB on held-out images "
                f"(noised: {result.noisy_psnr:.2f} dB) after {counted(result.iterations, 'iteration')}"
            )
        case made.ImportResult():
            return (
                f"denoiser in {result.denoiser}: {result.parameters:,} parameters, channels "
                f"{result.block_out_channels}, attention at levels {result.attention_levels}, "
                f"recommended t_star {result.t_star}"
            )
        case made.PurifyResult():
            rate = result.images_per_second
            speed = pace(rate, "images") if rate else "all before this run"
            counts = f"{result.ok:,} of {counted(result.planned, 'image')} purified, {result.failed:,} failed"
            return f"{counts}, {speed}, in {result.output}"
        case made.StatusResult():
            shards = f"{result.shards_done:,} of {counted(result.shards, 'shard')}"
            return f"{shards}, {result.ok:,} of {counted(result.planned, 'image')}, {result.failed:,} failed"
        case made.VerifyResult():
            counts = (
                f"{counted(result.images, 'image')} and {counted(result.failed, 'failure')} of {result.planned:,}"
            )
            return "\n".join([*result.mismatched, counts, "ok" if result.ok else "NOT ok"])
        case made.GcResult():
            uploads = f"{counted(result.uploads_aborted, 'upload')} aborted"
            return f"{counted(result.removed, 'leftover')} removed, {uploads} in {result.output}"
        case made.ReportResult():
            return f"report: {result.report}"
        case made.SubmitResult():
            return f"job {result.submission_id}: {result.status}"
    raise TypeError(f"no words for {type(result).__name__}")


def _dataset(result: made.DatasetResult) -> str:
    match result.details:
        case {"clean": clean, "rest": rest}:
            return f"{counted(clean, 'image')} in {result.output}/clean, {rest:,} in {result.output}/rest"
        case {"matched": matched}:
            return f"{matched:,} of {counted(result.images, 'image')} matched and labelled in {result.output}"
        case {"poison": _} | {"half": _}:
            words = ", ".join(f"{key} {value}" for key, value in result.details.items() if value not in (None, ""))
            return f"{counted(result.images, 'image')} poisoned ({words}) in {result.output}"
    return f"{counted(result.images, 'image')} written to {result.output}"


def _checks(result: made.DoctorResult) -> str:
    width = max(len(check.name) for check in result.checks)
    lines = []
    for check in result.checks:
        lines.append(f"{check.verdict:<8} {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {check.fix}")
    failed = sum(check.verdict == "failed" for check in result.checks)
    verdict = "ready" if result.ok else f"NOT ready: {failed} of {len(result.checks)} checks failed"
    return "\n".join([*lines, verdict])


def _audit(result: made.AuditResult) -> str:
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


def _experiment(
    result: made.EvaluateResult | made.MatrixResult | made.MatrixPlan | made.SweepResult | made.SweepPlan,
) -> str:
    if isinstance(result, made.EvaluateResult):
        return (
            f"test accuracy {result.test_accuracy:.2f} ± {result.test_accuracy_std:.2f} % "
            f"(n = {result.seeds}, {result.victim}, {counted(result.epochs, 'epoch')}, compensation "
            f"{result.compensation})"
        )
    if isinstance(result, made.MatrixResult | made.SweepResult):
        lines = [f"failed: {title}: {message}" for title, message in result.failures.items()]
        if isinstance(result, made.MatrixResult):
            return "\n".join(
                [*lines, f"{result.done:,} of {counted(result.cells, 'cell')} measured; see {result.table}"]
            )
        best = [f"{section}.{key} {value}" for section, keys in result.best.items() for key, value in keys.items()]
        found = f"best of {counted(result.trials, 'trial')} (score {result.score:.2f})"
        return "\n".join([*lines, f"{found}: {', '.join(best)}"])
    if isinstance(result, made.MatrixPlan):
        work = (
            f"{result.done:,} of {counted(result.cells, 'cell')} measured, "
            f"{counted(len(result.missing), 'training')} left"
        )
    else:
        work = (
            f"{result.done:,} of {counted(result.trials, 'trial')} measured; "
            f"{counted(result.denoisers, 'denoiser')} to train, "
            f"{counted(result.purifications, 'purification')}, then the trials"
        )
    left = f"about {duration(result.seconds_left)} on this machine"
    if result.unknown:
        left = f"{left}, and what was" if result.seconds_left else "their time is not known yet,"
        left += f" never measured here: {', '.join(result.unknown)}"
    end = f"{work}: {left}; nothing was written to {result.output}"
    return "\n".join([*result.missing, end])
