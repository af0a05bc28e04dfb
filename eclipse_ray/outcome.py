"""What follows a verb on the command line: its result in words, the next command, the report, the exit code."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from eclipse_ray import results as made
from eclipse_ray import verbs
from eclipse_ray.config import Config
from eclipse_ray.errors import EXIT_FAILURE, EXIT_OK, EXIT_TOO_MANY_FAILED, EclipseError
from eclipse_ray.log import say
from eclipse_ray.progress import pace
from eclipse_ray.results import Result, to_json

_RESULT_FD = 1


def reserve_standard_output() -> None:
    """Send whatever else prints, libraries and their child processes included, to standard error."""
    global _RESULT_FD
    sys.stdout.flush()
    _RESULT_FD = os.dup(1)
    os.dup2(2, 1)


def show(result: Result, as_json: bool, given: Mapping[str, Any]) -> None:
    """Print a result on standard output: one JSON object, or words and the command to type next."""
    lines = [json.dumps(to_json(result)) if as_json else in_words(result)]
    if not as_json and (then := next_words(result, given)):
        lines.append(f"next: {shlex.join(('eclipse-ray', *then))}")
    # A reader that has gone, such as `head`, makes no mistake of a finished run.
    with suppress(BrokenPipeError), os.fdopen(os.dup(_RESULT_FD), "w", encoding="utf-8") as stream:
        print("\n".join(lines), file=stream)


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
                f"{result.images_left:,} of {result.planned:,} images to purify, in {result.shards_left:,} of "
                f"{result.shards:,} shards, from {result.input_bytes / 2**30:,.2f} GiB; about "
                f"{result.output_bytes / 2**30:,.2f} GiB to write, {result.device_hours:,.2f} hours on one such "
                f"{result.device} as here, {result.cpu_hours:,.2f} core hours to decode and encode; nothing was "
                f"written to {result.output}"
            )
    return _sentence(result)


def _sentence(result: Result) -> str:
    match result:
        case made.TrainResult():
            return (
                f"denoiser in {result.denoiser}: {result.denoise_psnr:.2f} dB on held-out images "
                f"(noised: {result.noisy_psnr:.2f} dB) after {result.iterations:,} iterations"
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
            counts = f"{result.ok:,} of {result.planned:,} images purified, {result.failed:,} failed"
            return f"{counts}, {speed}, in {result.output}"
        case made.StatusResult():
            shards = f"{result.shards_done:,} of {result.shards:,} shards"
            return f"{shards}, {result.ok:,} of {result.planned:,} images, {result.failed:,} failed"
        case made.VerifyResult():
            counts = f"{result.images:,} images and {result.failed:,} failures of {result.planned:,}"
            return "\n".join([*result.mismatched, counts, "ok" if result.ok else "NOT ok"])
        case made.GcResult():
            uploads = f"{result.uploads_aborted:,} uploads aborted"
            return f"{result.removed:,} leftovers removed, {uploads} in {result.output}"
        case made.ReportResult():
            return f"report: {result.report}"
        case made.SubmitResult():
            return f"job {result.submission_id}: {result.status}"
    raise TypeError(f"no words for {type(result).__name__}")


def _dataset(result: made.DatasetResult) -> str:
    match result.details:
        case {"clean": clean, "rest": rest}:
            return f"{clean:,} images in {result.output}/clean, {rest:,} in {result.output}/rest"
        case {"matched": matched}:
            return f"{matched:,} of {result.images:,} images matched and labelled in {result.output}"
        case {"poison": _} | {"half": _}:
            words = ", ".join(f"{key} {value}" for key, value in result.details.items() if value is not None)
            return f"{result.images:,} images poisoned ({words}) in {result.output}"
    return f"{result.images:,} images written to {result.output}"


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
            f"(n = {result.seeds}, {result.victim}, {result.epochs} epochs, compensation {result.compensation})"
        )
    if isinstance(result, made.MatrixResult | made.SweepResult):
        lines = [f"failed: {title}: {message}" for title, message in result.failures.items()]
        if isinstance(result, made.MatrixResult):
            return "\n".join([*lines, f"{result.done:,} of {result.cells:,} cells measured; see {result.table}"])
        best = [f"{section}.{key} {value}" for section, keys in result.best.items() for key, value in keys.items()]
        found = f"best of {result.trials:,} trials (score {result.score:.2f})"
        return "\n".join([*lines, f"{found}: {', '.join(best)}"])
    if isinstance(result, made.MatrixPlan):
        work = (
            f"{result.done:,} of {result.cells:,} cells are measured, {len(result.missing):,} trainings are left"
        )
        left = f"about {result.seconds_left / 3600:,.2f} hours"
    else:
        work = (
            f"{result.done:,} of {result.trials:,} trials are measured; {result.denoisers:,} denoisers to train, "
        )
        work += f"{result.purifications:,} purifications, then the trials"
        left = f"about {result.seconds_left / 60:,.1f} minutes"
    left += " on this machine"
    if result.unknown:
        left = f"{left}, and what was" if result.seconds_left else "their time is not known yet,"
        left += f" never measured here: {', '.join(result.unknown)}"
    end = f"{work}: {left}; nothing was written to {result.output}"
    return "\n".join([*result.missing, end])
