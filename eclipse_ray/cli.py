"""The command line: one command for each function of the API, same names, same defaults."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

from eclipse_ray.config import Layout, ScheduleName, parse_assignment
from eclipse_ray.errors import EXIT_FAILURE, EXIT_OK, EXIT_TOO_MANY_FAILED, EclipseError, InterruptedRunError
from eclipse_ray.results import DryRunResult, EvaluateResult, MatrixPlan, MatrixResult, Result, to_json

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


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder for everything the demo makes.")] = "runs/demo",
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Poison a synthetic dataset, train a denoiser, purify, evaluate: a table and one picture."""
    from eclipse_ray.demo import demo as run
    from eclipse_ray.demo import demo_table

    result = run(output, config=config, settings=_settings(assign))
    _print(result, as_json, lambda: demo_table(result))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Any readable dataset.")],
    output: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
    layout: Annotated[Layout, typer.Option(help="folder: one a class; cifar: 32 x 32 only.")] = "parquet",
    resize: Resize = None,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Rewrite a dataset as canonical Parquet or in another layout; only --resize touches a pixel."""
    from eclipse_ray import api

    result = api.convert(source, output, layout=layout, resize=resize, config=config, settings=_settings(assign))
    _print(result, as_json, lambda: f"{result.images:,} images written to {result.output}")


@app.command()
def split(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Any readable dataset.")],
    clean: Annotated[int, typer.Option(help="Images of the sparse clean set.")],
    output: Annotated[str, typer.Option("--out", metavar="DIR", help="Gets DIR/clean and DIR/rest.")],
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Divide a dataset into a sparse clean set and the rest, disjoint by content, stratified by label."""
    from eclipse_ray import api

    result = api.split(source, clean=clean, output=output, config=config, settings=_settings(assign))
    _print(result, as_json, lambda: f"{result.images:,} images: {result.details}")


@app.command()
def poison(
    name: Annotated[str, typer.Argument(metavar="NAME", help="urp lsp ar cuda em tap rem sep efp adp")],
    source: Annotated[str, typer.Argument(metavar="SRC", help="Labelled dataset.")],
    output: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Write a poisoned copy of a labelled dataset, its norm checked after 8-bit storage; resumes if optimised."""
    from eclipse_ray import api

    result = api.poison(name, source, output, config=config, settings=_settings(assign))
    _print(result, as_json, lambda: f"{result.images:,} images poisoned ({result.details}) in {result.output}")


@app.command()
def train(
    clean: Annotated[str | None, typer.Option(metavar="SRC", help="Sparse clean set.")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the denoiser.")] = None,
    resize: Resize = None,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Fit a denoiser on a sparse clean set; the same command resumes."""
    from eclipse_ray import api

    result = api.train(clean=clean, out=out, resize=resize, config=config, settings=_settings(assign))
    _print(
        result,
        as_json,
        lambda: (
            f"denoiser in {result.denoiser}: {result.denoise_psnr:.2f} dB on held-out images "
            f"(noised: {result.noisy_psnr:.2f} dB) after {result.iterations:,} iterations"
        ),
    )


@app.command("import-checkpoint")
def import_checkpoint(
    file: Annotated[str, typer.Argument(metavar="FILE", help="State dict, such as ema_0.9999_250000.pt.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the denoiser.")],
    heads: Annotated[int, typer.Option(help="Attention heads, which the file does not tell.")] = 4,
    timesteps: Annotated[int, typer.Option(help="T of the training.")] = 4000,
    schedule: Annotated[ScheduleName, typer.Option(help="Noise schedule of it.")] = "cosine",
    as_json: Json = False,
) -> None:
    """Make a denoiser of weights saved by improved-diffusion or guided-diffusion."""
    from eclipse_ray import api

    result = api.import_checkpoint(file, out=out, heads=heads, timesteps=timesteps, schedule=schedule)
    _print(
        result,
        as_json,
        lambda: (
            f"denoiser in {result.denoiser}: {result.parameters:,} parameters, channels "
            f"{result.block_out_channels}, attention at levels {result.attention_levels}, "
            f"recommended t_star {result.t_star}"
        ),
    )


@app.command()
def purify(
    source: Annotated[str | None, typer.Argument(metavar="SRC", help="Dataset to purify.")] = None,
    output: Annotated[str | None, typer.Argument(metavar="DST", help="Output folder.")] = None,
    denoiser: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the denoiser.")] = None,
    resize: Resize = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do failed images again.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Also do objects that SRC has gained.")] = False,
    max_failed_fraction: Annotated[float | None, typer.Option(help="More failed images end in exit 3.")] = None,
    single_writer: Annotated[
        bool | None,
        typer.Option("--single-writer", help="DST has no conditional writes, and nobody else writes there."),
    ] = None,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Purify a dataset; the same command resumes. Exit 3: done, but more images failed than allowed."""
    from eclipse_ray import api

    named = {"purify.max_failed_fraction": max_failed_fraction, "purify.single_writer": single_writer}
    resolved = api.resolve(config, _settings(assign), named)
    if dry_run:
        plan = api.dry_run(source, output, denoiser=denoiser, resize=resize, extend=extend, config=resolved)
        _print(plan, as_json, lambda: _describe(plan))
        return
    result = api.purify(
        source,
        output,
        denoiser=denoiser,
        resize=resize,
        retry_failed=retry_failed,
        extend=extend,
        config=resolved,
    )
    _print(
        result,
        as_json,
        lambda: (
            f"{result.ok:,} of {result.planned:,} images purified, {result.failed:,} failed, "
            f"{result.images_per_second:,.1f} images/s, in {result.output}"
        ),
    )
    if result.failed > resolved.purify.max_failed_fraction * result.planned:
        raise typer.Exit(EXIT_TOO_MANY_FAILED)


def _describe(plan: DryRunResult) -> str:
    return (
        f"{plan.images_left:,} of {plan.planned:,} images to purify, in {plan.shards_left:,} of {plan.shards:,} "
        f"shards, from {plan.input_bytes / 2**30:,.2f} GiB; about {plan.output_bytes / 2**30:,.2f} GiB to write, "
        f"{plan.device_hours:,.2f} hours on one such {plan.device} as here, {plan.cpu_hours:,.2f} core hours to "
        f"decode and encode; nothing was written to {plan.output}"
    )


@app.command()
def status(
    output: Annotated[str, typer.Argument(metavar="DST", help="Output folder of purify.")], as_json: Json = False
) -> None:
    """Say how far a run is, also while it runs."""
    from eclipse_ray import api

    result = api.status(output)
    _print(
        result,
        as_json,
        lambda: (
            f"{result.shards_done:,} of {result.shards:,} shards, {result.ok:,} of {result.planned:,} images, "
            f"{result.failed:,} failed"
        ),
    )


@app.command()
def verify(
    output: Annotated[str, typer.Argument(metavar="DST", help="Output folder of purify.")], as_json: Json = False
) -> None:
    """Prove from the bytes that every planned image is there once; exit 1 if not."""
    from eclipse_ray import api

    result = api.verify(output)
    lines = [*result.mismatched, f"{result.images:,} images and {result.failed:,} failures of {result.planned:,}"]
    _print(result, as_json, lambda: "\n".join([*lines, "ok" if result.ok else "NOT ok"]))
    if not result.ok:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def gc(
    output: Annotated[str, typer.Argument(metavar="DST", help="Output folder of purify.")],
    idle: Annotated[
        bool, typer.Option("--idle", help="No run is writing there: unfinished shards' leftovers go too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove what dead workers left behind; never what a status names."""
    from eclipse_ray import api

    result = api.gc(output, idle=idle)
    _print(
        result,
        as_json,
        lambda: (
            f"{result.removed:,} leftovers removed, {result.uploads_aborted:,} uploads aborted in {result.output}"
        ),
    )


@app.command()
def evaluate(
    train: Annotated[str | None, typer.Option(metavar="SRC", help="Training set.")] = None,
    test: Annotated[str | None, typer.Option(metavar="SRC", help="Clean labelled test set.")] = None,
    clean: Annotated[str | None, typer.Option(metavar="SRC", help="Sparse set, checked to be disjoint.")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Matrix only: folder of results.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Matrix only: say what is missing.")] = False,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Train victims on a dataset and print their test accuracy after the last epoch.

    With a section `matrix` in the config: poisons x defenses x victims x seeds; the same command goes on.
    """
    from eclipse_ray import api

    settings = _settings(assign)
    if dry_run:
        plan = api.evaluate_plan(train=train, test=test, clean=clean, out=out, config=config, settings=settings)
        _print(plan, as_json, lambda: _describe_matrix(plan))
        return
    result = api.evaluate(train=train, test=test, clean=clean, out=out, config=config, settings=settings)
    _print(result, as_json, lambda: _describe_evaluation(result))
    if isinstance(result, MatrixResult) and result.failed:
        raise typer.Exit(EXIT_FAILURE)


def _describe_evaluation(result: EvaluateResult | MatrixResult) -> str:
    if isinstance(result, MatrixResult):
        lines = [f"failed: {title}: {message}" for title, message in result.failures.items()]
        return "\n".join([*lines, f"{result.done:,} of {result.cells:,} cells measured; see {result.table}"])
    return (
        f"test accuracy {result.test_accuracy:.2f} ± {result.test_accuracy_std:.2f} % "
        f"(n = {result.seeds}, {result.victim}, {result.epochs} epochs, compensation {result.compensation})"
    )


def _describe_matrix(plan: MatrixPlan) -> str:
    unknown = f", and what was never measured here: {', '.join(plan.unknown)}" if plan.unknown else ""
    return "\n".join(
        [
            *plan.missing,
            f"{plan.done:,} of {plan.cells:,} cells are measured, {len(plan.missing):,} trainings are left: "
            f"about {plan.seconds_left / 3600:,.2f} hours on this machine{unknown}; "
            f"nothing was written to {plan.output}",
        ]
    )


def _settings(assignments: list[str] | None) -> dict[str, Any]:
    return dict(parse_assignment(text) for text in assignments or [])


def _print(result: Result, as_json: bool, text: Callable[[], str]) -> None:
    line = json.dumps(to_json(result)) if as_json else text()
    with os.fdopen(os.dup(_RESULT_FD), "w", encoding="utf-8") as stream:
        print(line, file=stream)


_RESULT_FD = 1


def _reserve_standard_output() -> None:
    """Send whatever else prints, libraries and their child processes included, to standard error."""
    global _RESULT_FD
    sys.stdout.flush()
    _RESULT_FD = os.dup(1)
    os.dup2(2, 1)


def _stop(number: int, frame: FrameType | None) -> None:
    raise InterruptedRunError("stopped; run the same command again to resume")


def main() -> None:
    """Run the command line and exit with a documented code: 0, 1, 2, 3 or 75."""
    if "--json" in sys.argv:
        _reserve_standard_output()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except EclipseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(EXIT_OK)
